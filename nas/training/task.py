"""What training needs of a task.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class TrainingTask(Protocol):
    """What training needs of a task: tokens per sequence, and batches."""

    @property
    def seq_len(self) -> int:
        """Tokens of one training input."""
        ...

    def train_batch(self, step: int, batch_size: int, seed: int) -> tuple[Tensor, Tensor]:
        """Return inputs and targets of a step, (B, T) or (B,); the same for the same arguments.

        A target of -100 is not scored.
        """
        ...
