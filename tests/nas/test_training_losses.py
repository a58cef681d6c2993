"""Losses: scored positions, classes, soft targets and hidden states, against plain loops."""

from __future__ import annotations

import math

import pytest
import torch

import nas.training.losses
from nas.training.losses import (
    Prediction,
    SoftTargets,
    data_loss,
    hard_loss,
    hidden_loss,
    loss_in_chunks,
    predict,
    soft_loss,
    soft_targets,
)
from searchspace.errors import UserError
from searchspace.space import SearchSpace
from searchspace.subnet import Subnet


class Fixed(torch.nn.Module):
    """Gives the same logits whatever it is asked."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.out = logits

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.out


def loop_loss(logits: torch.Tensor, targets: torch.Tensor) -> float:
    """Mean over scored targets of -log softmax, one at a time."""
    found = []
    for row, target in zip(logits.flatten(0, -2).tolist(), targets.flatten().tolist(), strict=True):
        if target != -100:
            found.append(math.log(sum(math.exp(v) for v in row)) - row[target])
    return sum(found) / len(found)


@pytest.mark.parametrize("shape", [(3, 5), (7,)], ids=["tokens", "classes"])
@pytest.mark.parametrize("num_ignored", [0, 2])
def test_only_scored_targets_count(shape: tuple[int, ...], num_ignored: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(*shape, 11, generator=generator, dtype=torch.float64)
    targets = torch.randint(11, shape, generator=generator)
    targets.view(-1)[1 : 1 + num_ignored] = -100
    prediction = predict(Fixed(logits), torch.zeros(shape), targets, with_hidden=False)  # type: ignore[arg-type]
    expected = loop_loss(logits, targets)
    assert hard_loss(prediction, targets).item() == pytest.approx(expected, rel=1e-5)
    assert data_loss(logits, targets).item() == pytest.approx(expected, rel=1e-5)
    teacher = Fixed(torch.randn(*shape, 11, generator=generator))
    said = soft_targets(predict(teacher, torch.zeros(shape), targets, with_hidden=False))  # type: ignore[arg-type]
    assert said.probs_NV.shape == (targets.numel() - num_ignored, 11)
    rows = [i for i, target in enumerate(targets.flatten().tolist()) if target != -100]
    soft = 0.0
    for p, q in zip(said.probs_NV, logits.flatten(0, -2)[rows].log_softmax(-1), strict=True):
        soft -= sum(float(a) * float(b) for a, b in zip(p, q, strict=True)) / len(rows)
    assert soft_loss(prediction, said).item() == pytest.approx(soft, rel=1e-5)


def test_large_vocabularies_are_taken_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    space, vocab = SearchSpace.load("decoder-tiny", 32), 32
    network = Subnet(space.smallest()).reset(torch.Generator().manual_seed(0))
    inputs = torch.randint(vocab, (2, 7), generator=torch.Generator().manual_seed(1))
    targets = inputs.roll(-1, dims=1)
    targets[:, -1] = -100
    assert loss_in_chunks(network, inputs, targets) is None
    monkeypatch.setattr(nas.training.losses, "CHUNK_BYTES", 4 * 14 * vocab - 1)
    found = loss_in_chunks(network, inputs, targets)
    right = hard_loss(predict(network, inputs, targets, with_hidden=False), targets)
    assert found is not None
    torch.testing.assert_close(found, right)
    params = list(network.parameters())
    grads = torch.autograd.grad(right, params)
    torch.testing.assert_close(torch.autograd.grad(found, params), grads, rtol=1e-3, atol=1e-6)
    monkeypatch.setattr(nas.training.losses, "CHUNK_BYTES", 0)
    with pytest.raises(UserError, match="do not fit"):
        loss_in_chunks(network, inputs, targets[:, :6])
    with pytest.raises(UserError, match="no scored target"):
        loss_in_chunks(network, inputs, torch.full_like(targets, -100))


def test_a_batch_without_scored_targets_or_with_wrong_shapes_is_refused() -> None:
    model, inputs = Fixed(torch.zeros(2, 3, 4)), torch.zeros(2, 3)
    with pytest.raises(UserError, match="no scored target"):
        predict(model, inputs, torch.full((2, 3), -100), with_hidden=False)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"\(2, 3, 4\) for targets of shape \(2,\)"):
        predict(model, inputs, torch.zeros(2, dtype=torch.long), with_hidden=False)  # type: ignore[arg-type]


def test_hidden_states_are_what_the_head_reads_at_scored_positions() -> None:
    space = SearchSpace.load("decoder-tiny", 32)
    model = Subnet(space.largest()).reset(torch.Generator().manual_seed(0))
    tokens = torch.arange(10).view(2, 5)
    targets = tokens.clone()
    targets[0, :3] = -100
    prediction = predict(model, tokens, targets, with_hidden=True)
    assert prediction.hidden_ND is not None and prediction.hidden_ND.shape == (7, 64)
    log_probs = (prediction.hidden_ND @ model.ends.head.weight.T).log_softmax(-1)
    torch.testing.assert_close(log_probs, prediction.log_probs_NV)
    assert not model.ends.head._forward_pre_hooks


def test_hidden_loss_compares_leading_features_at_unit_scale() -> None:
    generator = torch.Generator().manual_seed(0)
    teacher = SoftTargets(torch.empty(0), torch.randn(5, 8, generator=generator))
    assert teacher.hidden_ND is not None

    def loss(hidden: torch.Tensor) -> float:
        return hidden_loss(Prediction(torch.empty(0), hidden), teacher).item()

    leading = teacher.hidden_ND[:, :3]
    assert loss(leading.clone()) == 0.0
    assert loss(7 * leading) == pytest.approx(0.0, abs=1e-9)
    assert loss(-leading) == pytest.approx(4.0, rel=1e-4)  # two unit vectors, twice apart
