"""`Task`: what a run needs of anything that can be learnt.

Legend: B batch, T tokens, C channels or classes, H height, W width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol

from searchspace.family import Family

if TYPE_CHECKING:
    from torch import Tensor

IGNORED = -100
"""The target of a position that is neither learnt nor judged; `torch`'s own ``ignore_index``."""

HeldOut = Literal["validation", "test"]
Progress = Callable[[str], None]


class Task(Protocol):
    """Batches to learn from and to judge by; everything follows from the arguments.

    Decoder tasks have logits (B, T, V) and targets (B, T), where `IGNORED` is left out. Encoder and
    ViT tasks have logits (B, C) and targets (B,).
    """

    @property
    def family_facts(self) -> Mapping[str, Any]:
        """What a `searchspace.family.Family` must be told; empty for a plain decoder."""
        ...

    @property
    def vocab_size(self) -> int:
        """Token ids are below it; 0 for images."""
        ...

    @property
    def seq_len(self) -> int:
        """Tokens of one training input; 1 for images, whose tokens are the network's patches."""
        ...

    @property
    def unit(self) -> Literal["byte", "token", "example"]:
        """What losses are divided by."""
        ...

    @property
    def metric_name(self) -> Literal["loss", "accuracy"]:
        """What a person judges a network by."""
        ...

    @property
    def baselines(self) -> Mapping[str, float]:
        """What is reached without a network on the test split, in nats per unit, by name."""
        ...

    def train_batch(self, step: int, batch_size: int, seed: int) -> tuple[Tensor, Tensor]:
        """Return the inputs and targets of a step, counted from 0; the same for the same arguments.

        Inputs are token ids (B, T), int64, or images (B, C, H, W), float32; targets are int64.
        """
        ...

    def evaluation_batches(
        self, split: HeldOut, amount: int, batch_size: int
    ) -> list[tuple[Tensor, Tensor]]:
        """Return held-out inputs and targets; the same for the same arguments.

        Args:
            split: which part.
            amount: targets wanted in all, so tokens for decoders and examples for the others; at
                least one sequence or example is given, and at most what the split holds.
            batch_size: B; the last batch may be smaller.
        """
        ...

    def units_of(self, targets: Tensor) -> int:
        """Return how many units the targets stand for."""
        ...


def decoder_facts(max_tokens: int) -> dict[str, Any]:
    """Return the `Task.family_facts` of a decoder that reads up to so many tokens."""
    return {"max_tokens": max_tokens} if max_tokens > Family.max_tokens else {}
