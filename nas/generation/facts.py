"""What drafting brought, measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class SpeculationFacts:
    """Counts and times of one text that was drafted and verified.

    Args:
        num_tokens: new tokens.
        num_drafted: tokens that the draft proposed.
        num_accepted: of those, the ones the target kept.
        target_calls: calls of the target, the one that read the prompt left out.
        num_recounted: ties that were settled step by step.
        near_enough: whether a tie within the rounding of a low precision was left as it came out,
            which can differ from decoding step by step.
        seconds: time of all new tokens but the first, which comes from reading the prompt.
        draft_seconds: of those, the draft's.
        plain_seconds_per_token: of the target alone, measured on the same text.
    """

    num_tokens: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    target_calls: int = 0
    num_recounted: int = 0
    near_enough: bool = False
    seconds: float = 0.0
    draft_seconds: float = 0.0
    plain_seconds_per_token: float = 0.0

    @property
    def acceptance(self) -> float:
        """Share of the drafted tokens that the target kept."""
        return self.num_accepted / max(1, self.num_drafted)

    @property
    def tokens_per_target_call(self) -> float:
        """New tokens for every call of the target; 1 without drafting."""
        return max(0, self.num_tokens - 1) / max(1, self.target_calls)

    @property
    def tokens_per_s(self) -> float:
        """New tokens a second, after the prompt."""
        return max(0, self.num_tokens - 1) / self.seconds if self.seconds else 0.0

    @property
    def speedup(self) -> float:
        """How many times as fast as the target alone; 0 where that was not measured."""
        return self.plain_seconds_per_token * self.tokens_per_s

    def to_dict(self) -> dict[str, Any]:
        """Return all figures, JSON-ready."""
        derived = ("acceptance", "tokens_per_target_call", "tokens_per_s", "speedup")
        return {**vars(self), **{name: getattr(self, name) for name in derived}}

    def sentence(self) -> str:
        """Return the figures for a person."""
        text = (
            f"drafting: {self.acceptance:.0%} of {self.num_drafted} drafted tokens accepted, "
            f"{self.tokens_per_target_call:.2f} tokens per call of the target, "
            f"{self.tokens_per_s:,.0f} tokens/s"
        )
        if self.speedup:
            text += (
                f", {self.speedup:.2f} times as fast as the target alone "
                f"({1 / self.plain_seconds_per_token:,.0f} tokens/s)"
            )
        if self.num_recounted:
            text += f"; {self.num_recounted} ties settled step by step"
        if self.near_enough:
            text += (
                "; the target computes in low precision, so tokens that are equally good within "
                "that may differ from decoding without a draft"
            )
        return text
