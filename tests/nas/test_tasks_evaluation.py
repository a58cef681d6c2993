"""Held-out loss and accuracy, for decoders and for classes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from nas.evaluation import EvaluationFailed, held_out_accuracy, held_out_loss
from nas.tasks import IGNORED, TaskConfig, prepare_task


class Units:
    """Counts scored targets."""

    def units_of(self, targets: Tensor) -> int:
        return int((targets != IGNORED).sum())


class Table(nn.Module):
    """Logits by the input alone."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, inputs: Tensor) -> Tensor:
        return self.logits[inputs]


def test_decoder_targets_that_are_ignored_do_not_count() -> None:
    generator = torch.Generator().manual_seed(0)
    table = Table(torch.randn(7, 7, generator=generator, dtype=torch.float64))
    batches = []
    total, right, scored = 0.0, 0, 0
    for size in (3, 2):
        inputs, targets = torch.randint(7, (2, size, 5), generator=generator)
        targets[torch.rand(size, 5, generator=generator) < 0.4] = IGNORED
        batches.append((inputs, targets))
        for token, target in zip(inputs.flatten().tolist(), targets.flatten().tolist(),
                                 strict=True):  # fmt: skip
            if target == IGNORED:
                continue
            logits = table.logits[token].tolist()
            total += math.log(sum(map(math.exp, logits))) - logits[target]
            right += max(range(7), key=logits.__getitem__) == target
            scored += 1
    assert 0 < scored < 25
    assert held_out_loss(table, batches, Units()) == pytest.approx(total / scored, rel=1e-12)
    assert held_out_accuracy(table, batches) == right / scored


def test_classes() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 0.0]])
    inputs, targets = torch.tensor([0, 0, 1]), torch.tensor([1, 2, 0])
    batches = [(inputs[:2], targets[:2]), (inputs[2:], targets[2:])]
    assert held_out_accuracy(Table(logits), batches) == pytest.approx(2 / 3)
    nats = -logits.log_softmax(-1)[inputs, targets].mean().item()
    assert held_out_loss(Table(logits), batches, Units()) == pytest.approx(nats, rel=1e-6)


def test_a_network_that_knows_the_answer_is_right(tmp_path: Path) -> None:
    task = prepare_task(TaskConfig("copy", num_items=6, num_symbols=4), tmp_path)
    batches = task.evaluation_batches("test", 300, 16)
    guess = torch.full((task.vocab_size, task.vocab_size), -1e4)
    guess[:, :4] = 0.0
    loss = held_out_loss(Table(guess), batches, task)
    assert loss == pytest.approx(task.baselines["uniform"], rel=1e-6)

    class Copier(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            """Predict what stood as far behind BOS as the next token stands behind SEP."""
            back = inputs.roll(6, dims=1)
            return nn.functional.one_hot(back, task.vocab_size).double() * 50

    assert held_out_accuracy(Copier(), batches) == 1.0
    assert held_out_loss(Copier(), batches, task) == pytest.approx(0.0, abs=1e-12)


def test_what_cannot_be_evaluated() -> None:
    inputs, none = torch.zeros(1, 2, dtype=torch.int64), torch.full((1, 2), IGNORED)
    fine, broken = Table(torch.zeros(2, 2)), Table(torch.full((2, 2), math.nan))
    for evaluate in (lambda m, b: held_out_loss(m, b, Units()), held_out_accuracy):
        with pytest.raises(EvaluationFailed, match="no target is scored"):
            evaluate(fine, [(inputs, none)])
        with pytest.raises(EvaluationFailed, match="nan"):
            evaluate(broken, [(inputs, inputs)])

    class Huge(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            raise RuntimeError("not enough memory: you tried to allocate 1 TB")

    with pytest.raises(EvaluationFailed, match="out of memory"):
        held_out_accuracy(Huge(), [(inputs, inputs)])
