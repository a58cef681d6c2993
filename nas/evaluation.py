"""Real evaluation: held-out loss and accuracy of a network.

Shapes: B batch, T tokens, V vocabulary, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nas.tasks.base import IGNORED, Task


class EvaluationTask(Protocol):
    """What evaluation needs of a task."""

    def units_of(self, targets: Tensor) -> int:
        """Return how many bytes, tokens or examples the targets stand for."""
        ...


class EvaluationFailed(RuntimeError):
    """A network could not be evaluated; the message is the reason."""


def evaluation_amount(task: Task, num_tokens: int) -> int:
    """Return the amount to ask `Task.evaluation_batches` for, given a number of tokens.

    One example of a task that counts examples stands for sixteen tokens: it is judged by one
    target only, so more inputs are needed for a figure as precise.
    """
    return max(1, num_tokens // 16) if task.unit == "example" else num_tokens


def held_out_loss(
    model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]], task: EvaluationTask
) -> float:
    """Return the mean loss in nats per unit of the task: byte, token or example.

    Args:
        model: maps inputs to logits, (B, T, V) of a decoder or (B, C) of the others.
        batches: inputs, and targets (B, T) or (B,); `IGNORED` targets do not count.
        task: says how many units the targets stand for.

    Raises:
        EvaluationFailed: when the loss is not a number, nothing is scored, or memory runs out.
    """
    total, units = 0.0, 0
    with _evaluating():
        for inputs, targets in batches:
            logits = model(inputs).flatten(0, -2)
            total += F.cross_entropy(
                logits, targets.flatten(), reduction="sum", ignore_index=IGNORED
            ).item()
            units += task.units_of(targets)
    if not math.isfinite(total):
        raise EvaluationFailed(f"the loss is {total}")
    if not units:
        raise EvaluationFailed("no target is scored")
    return total / units


def held_out_accuracy(model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Return the share of targets that get the largest logit, from 0 to 1.

    Args:
        model: maps inputs to logits, (B, T, V) of a decoder or (B, C) of the others.
        batches: inputs, and targets (B, T) or (B,); `IGNORED` targets do not count.

    Raises:
        EvaluationFailed: when a logit is not a number, nothing is scored, or memory runs out.
    """
    num_right = num_scored = 0
    with _evaluating():
        for inputs, targets in batches:
            is_scored = targets != IGNORED
            logits = model(inputs)[is_scored]
            if logits.isnan().any():
                raise EvaluationFailed("a logit is nan")
            num_right += int((logits.argmax(dim=-1) == targets[is_scored]).sum())
            num_scored += int(is_scored.sum())
    if not num_scored:
        raise EvaluationFailed("no target is scored")
    return num_right / num_scored


@contextmanager
def _evaluating() -> Iterator[None]:
    """Compute without gradients, and tell a lack of memory from other errors."""
    try:
        with torch.inference_mode():
            yield
    except (MemoryError, RuntimeError) as error:
        if "memory" not in str(error).lower() and not isinstance(error, MemoryError):
            raise
        raise EvaluationFailed(f"out of memory: {error}") from error
