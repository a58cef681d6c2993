"""Going back to an earlier state of a network: by its length where that is enough, by a copy else.

A cache with a place for every token forgets the newest tokens when its `length` is set back. What a
recurrence, a window or a convolution has mixed in or dropped cannot be undone, so that is copied
beforehand. States declare which of their tensors are which (`MixerState.by_position`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor


def can_rewind(state: Sequence[Any]) -> bool:
    """Whether setting its lengths back is enough for a state to forget its newest tokens."""
    return not any(_mixed(block) for block in state)


def rewind(state: Sequence[Any], length: int) -> None:
    """Let a state forget all but its first `length` tokens; only where `can_rewind` says so."""
    for block in state:
        if block is not None:
            block.length = length


class StateMark:
    """A point that a state can be brought back to, once.

    Only small tensors are copied; a cache is neither copied nor read. Tokens before the mark must
    not be forgotten meanwhile.

    Args:
        state: from `Subnet.init_state`, as it is to be kept.
    """

    def __init__(self, state: Sequence[Any]) -> None:
        self._lengths = [None if block is None else block.length for block in state]
        self._copies = [
            {name: tensor.clone() for name, tensor in _mixed(block).items()} for block in state
        ]

    def restore(self, state: Sequence[Any]) -> None:
        """Bring the state, the one that the mark was made of, back to what it was."""
        for block, length, copies in zip(state, self._lengths, self._copies, strict=True):
            if block is None:
                continue
            block.length = length
            for name, tensor in copies.items():
                setattr(block, name, tensor)


def _mixed(block: Any) -> dict[str, Tensor]:
    """Return the tensors of a sub-block's state that setting `length` back does not restore."""
    if block is None:
        return {}
    by_position: frozenset[str] = getattr(block, "by_position", frozenset())
    return {
        name: value
        for name, value in vars(block).items()
        if isinstance(value, Tensor) and name not in by_position
    }
