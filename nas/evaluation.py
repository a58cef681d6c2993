"""Real evaluation: held-out loss of a network.

Shapes: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class EvaluationTask(Protocol):
    """What evaluation needs of a task."""

    def units_of(self, targets: Tensor) -> int:
        """Return how many bytes (or tokens) the targets stand for."""
        ...


class EvaluationFailed(RuntimeError):
    """A network could not be evaluated; the message is the reason."""


def held_out_loss(
    model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]], task: EvaluationTask
) -> float:
    """Return the mean loss in nats per byte (per token where a task has no bytes).

    Args:
        model: maps token ids (B, T) to logits (B, T, V).
        batches: inputs and targets, each (B, T).
        task: says how many bytes the targets stand for.

    Raises:
        EvaluationFailed: when the loss is not a number, or memory runs out.
    """
    total, units = 0.0, 0
    try:
        with torch.inference_mode():
            for inputs, targets in batches:
                logits = model(inputs).flatten(0, 1)
                total += F.cross_entropy(logits, targets.flatten(), reduction="sum").item()
                units += task.units_of(targets)
    except (MemoryError, RuntimeError) as error:
        if "memory" not in str(error).lower() and not isinstance(error, MemoryError):
            raise
        raise EvaluationFailed(f"out of memory: {error}") from error
    if not math.isfinite(total):
        raise EvaluationFailed(f"the loss is {total}")
    return total / units
