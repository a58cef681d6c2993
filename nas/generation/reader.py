"""A decoder that reads one growing sequence, and can unread its newest tokens.

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from searchspace.state_mark import StateMark, can_rewind, rewind
from searchspace.subnet import Subnet


class Reader:
    """A network with its state over one sequence.

    Args:
        subnet: a decoder.
        max_tokens: length that the sequence may reach.
    """

    def __init__(self, subnet: Subnet, max_tokens: int) -> None:
        self.subnet = subnet
        self.num_read = 0
        self._state = subnet.init_state(1, max_tokens)
        self.rewinds = can_rewind(self._state)
        """Whether unreading is free; else what was read since the mark must be read again."""
        self._mark = StateMark([])
        self._marked = 0

    @torch.inference_mode()
    def read(self, sequence: Sequence[int], num_scored: int = 1) -> Tensor:
        """Read all of the sequence that is not read yet, in one call.

        Args:
            sequence: begins with what was read before.
            num_scored: how many logits to return; at most as many as there are unread tokens.

        Returns:
            The logits (num_scored, V) behind the last tokens.
        """
        tokens = torch.tensor([sequence[self.num_read :]])
        logits_TV: Tensor = self.subnet(tokens, self._state)[0, -num_scored:]
        self.num_read = len(sequence)
        return logits_TV

    def mark(self) -> None:
        """Note this point: `unread` goes back no further."""
        self._marked = self.num_read
        if not self.rewinds:
            self._mark = StateMark(self._state)

    def unread(self, length: int) -> None:
        """Forget all but the first `length` tokens, or more where the state cannot be set back.

        What was forgotten beyond that is read again by the next `read`, in the same call. At most
        one `unread` for every `mark`.
        """
        if length >= self.num_read:
            return
        assert length >= self._marked
        if self.rewinds:
            rewind(self._state, length)
            self.num_read = length
        else:
            self._mark.restore(self._state)
            self.num_read = self._marked
