"""Where several tokens read in one call might give another choice than one token at a time."""

from __future__ import annotations

from collections.abc import Sequence

from nas.generation.reader import Reader
from searchspace.subnet import Subnet

NEAR = 1e-5
"""Logits nearer than that, as a share of the largest, may come in another order: ten times the
largest difference that was measured in fp32, over all mixers."""
NEAR_ROUNDED = 1e-2
"""The same for other precisions: twice the largest difference that was measured. They round
activations to a grid, where the last bit can decide for the next point, or run other kernels for
more tokens."""


def rounds_activations(subnet: Subnet) -> bool:
    """Whether a difference in the last bit of an activation can become a much larger one."""
    layers = subnet.arch.layers
    return any(p != "fp32" for x in layers for p in (x.mixer_precision, x.ffn_precision))


def near_of(subnet: Subnet, exact: bool) -> float:
    """Return the share of the largest logit by which the choice may turn.

    Args:
        subnet: the network.
        exact: count rounded activations in, else only the order of additions.
    """
    return NEAR_ROUNDED if exact and rounds_activations(subnet) else NEAR


class Stepper:
    """A network read as plain decoding reads it: the prompt in one call, then token by token.

    Args:
        subnet: the network.
        prompt_length: tokens of the prompt.
        max_tokens: as the plain decoding's state has it, so that every number is the same.
    """

    def __init__(self, subnet: Subnet, prompt_length: int, max_tokens: int) -> None:
        self._subnet, self._prompt_length, self._max_tokens = subnet, prompt_length, max_tokens
        self._reader: Reader | None = None

    def choice(self, text: Sequence[int]) -> int:
        """Return the best token behind `text`, which begins with all texts asked about before."""
        if self._reader is None:
            self._reader = Reader(self._subnet, self._max_tokens)
            self._logits = self._reader.read(text[: self._prompt_length])
        for end in range(self._reader.num_read + 1, len(text) + 1):
            self._logits = self._reader.read(text[:end])
        return int(self._logits[0].argmax())
