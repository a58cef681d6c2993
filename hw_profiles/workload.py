"""`Workload`: what a latency is the latency of."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from searchspace.errors import UserError, unknown

PHASES = ("prefill", "decode")
_PATTERN = re.compile(r"(?P<phase>[a-z]+)_b(?P<batch>\d+)_t(?P<tokens>\d+)")


@dataclass(frozen=True)
class Workload:
    """One forward pass: of a whole prompt, or of one token after others.

    Args:
        phase: ``"prefill"`` or ``"decode"``.
        batch: number of sequences.
        tokens: prompt length (prefill), or tokens already in the state (decode).

    Raises:
        UserError: for an unknown phase or sizes below 1.
    """

    phase: Literal["prefill", "decode"]
    batch: int
    tokens: int

    def __post_init__(self) -> None:
        if self.phase not in PHASES:
            raise unknown("workload phase", self.phase, PHASES)
        for field in ("batch", "tokens"):
            if getattr(self, field) < 1:
                raise UserError(f"workload {field}={getattr(self, field)} must be at least 1")

    @property
    def name(self) -> str:
        """A stable name, such as ``"prefill_b1_t256"``; `parse` reads it."""
        return f"{self.phase}_b{self.batch}_t{self.tokens}"

    @property
    def new_tokens(self) -> int:
        """Tokens of each sequence that one pass computes."""
        return self.tokens if self.phase == "prefill" else 1

    @property
    def max_tokens(self) -> int:
        """Tokens a state must have room for."""
        return self.tokens if self.phase == "prefill" else self.tokens + 1

    @classmethod
    def parse(cls, text: str) -> Workload:
        """Read a `name`.

        Raises:
            UserError: when the text is no workload.
        """
        match = _PATTERN.fullmatch(text.strip())
        if match is None:
            raise UserError(
                f"workload {text!r} is not understood: write PHASE_bBATCH_tTOKENS, "
                "such as prefill_b1_t256 or decode_b1_t256"
            )
        phase = match["phase"]
        if phase not in PHASES:
            raise unknown("workload phase", phase, PHASES)
        return cls(phase, int(match["batch"]), int(match["tokens"]))  # type: ignore[arg-type]


def prefill(batch: int, tokens: int) -> Workload:
    """Return the workload of one pass over `batch` prompts of `tokens` tokens."""
    return Workload("prefill", batch, tokens)


def decode(batch: int, context: int) -> Workload:
    """Return the workload of one more token for `batch` sequences of `context` tokens."""
    return Workload("decode", batch, context)
