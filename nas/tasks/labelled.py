"""The prepared classification task: examples with one class each.

Legend: N examples of a split, B batch, T tokens, C channels, H height, W width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nas.tasks.base import HeldOut
from nas.tasks.input_forms import InputForm
from nas.tasks.splits import SplitName

Array = NDArray[Any]


@dataclass(frozen=True)
class Examples:
    """The examples of one split.

    Args:
        inputs: token ids (N, T) of any unsigned type, or images (N, C, H, W), float32.
        labels: class ids (N,), int64.
    """

    inputs: Array
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class LabelledFacts:
    """What is known of a classification task besides its examples.

    Args:
        family_facts: see `nas.tasks.base.Task`.
        vocab_size: token ids are below it; 0 for images.
        seq_len: tokens of one input; 1 for images.
        labels: name of each class.
    """

    family_facts: dict[str, Any]
    vocab_size: int
    seq_len: int
    labels: tuple[str, ...]


class LabelledTask:
    """Classification of token sequences or images.

    A batch follows from (seed, step) alone, as in `LanguageModelTask`. Sequences are padded to
    `seq_len`, so what a network says of an example does not depend on the batch it is in.

    Args:
        facts: what is known of the task.
        examples: of each split, perhaps memory-mapped.
        input_form: how a text or a picture becomes such an input; None where that is not known.
    """

    unit: Literal["example"] = "example"
    metric_name: Literal["accuracy"] = "accuracy"

    def __init__(
        self,
        facts: LabelledFacts,
        examples: Mapping[SplitName, Examples],
        input_form: InputForm | None = None,
    ) -> None:
        self.facts = facts
        self.input_form = input_form
        self.family_facts = facts.family_facts
        self.vocab_size = facts.vocab_size
        self.seq_len = facts.seq_len
        self.labels = facts.labels
        self.examples = examples

    @property
    def baselines(self) -> dict[str, float]:
        """Nats per test example of guessing every class alike, or as often as in training."""
        counts = np.bincount(self.examples["train"].labels, minlength=len(self.labels))
        # One more of each, so that a class which training lacks is not impossible.
        shares = (counts + 1) / (counts.sum() + len(self.labels))
        nats = -np.log(shares)[self.examples["test"].labels]
        return {"uniform": math.log(len(self.labels)), "class frequency": float(nats.mean())}

    @property
    def majority_accuracy(self) -> float:
        """Share of the test examples that are in the commonest class of the training split."""
        commonest = np.bincount(self.examples["train"].labels).argmax()
        return float((self.examples["test"].labels == commonest).mean())

    def train_batch(self, step: int, batch_size: int, seed: int) -> tuple[Tensor, Tensor]:
        """Return the training batch of one step; an epoch shows every example once.

        Args:
            step: counted from 0.
            batch_size: B; keep it the same from step to step, or examples repeat early.
            seed: of this training.

        Returns:
            inputs, int64 (B, T) or float32 (B, C, H, W), and targets_B, int64.
        """
        examples = self.examples["train"]
        first, size = step * batch_size, len(examples.labels)
        rows = [
            int(_order(seed, index // size, size)[index % size])
            for index in range(first, first + batch_size)
        ]
        return _tensors(examples, np.array(rows))

    def evaluation_batches(
        self, split: HeldOut, amount: int, batch_size: int
    ) -> list[tuple[Tensor, Tensor]]:
        """Return different examples that are spread evenly over a held-out split.

        Args:
            split: which part.
            amount: how many examples; at least one and at most what the split holds.
            batch_size: B; the last batch may be smaller.
        """
        examples = self.examples[split]
        size = len(examples.labels)
        number = max(1, min(amount, size))
        rows = np.arange(number) * size // number
        return [
            _tensors(examples, rows[first : first + batch_size])
            for first in range(0, number, batch_size)
        ]

    def units_of(self, targets: Tensor) -> int:
        """Return how many examples the targets (B,) stand for."""
        return targets.numel()


def _tensors(examples: Examples, rows: NDArray[Any]) -> tuple[Tensor, Tensor]:
    inputs = examples.inputs[rows]
    dtype = np.float32 if inputs.dtype.kind == "f" else np.int64
    return torch.from_numpy(inputs.astype(dtype)), torch.from_numpy(examples.labels[rows])


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, size: int) -> NDArray[np.int64]:
    """Return the order of an epoch's examples; follows from the arguments only."""
    return np.random.default_rng([seed, epoch]).permutation(size)
