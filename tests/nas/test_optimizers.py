"""Muon in groups against PyTorch's, and optimizer states that fit both."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nas import grouped_muon
from nas.grouped_muon import GroupedMuon, orthogonal
from nas.optimizers import SupernetOptimizer
from searchspace.supernet import Supernet
from tests.counting_task import make_space

SHAPES = [(8, 8), (8, 8), (16, 8), (8, 16), (16, 8), (1, 8), (8, 1), (24, 40), (8, 8)]


def matrices(seed: int) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def set_gradients(step: int, *sides: list[nn.Parameter]) -> None:
    """Give both sides the same; one matrix gets none in odd steps, one is used only in part."""
    generator = torch.Generator().manual_seed(step)
    for place, params in enumerate(zip(*sides, strict=True)):
        grad = torch.randn(params[0].shape, generator=generator) * 10.0**-step
        grad[3:] *= place != 2
        for param in params:
            param.grad = None if place == 1 and step % 2 else grad.clone()


def apart(first: list[nn.Parameter], second: list[nn.Parameter], start: list[nn.Parameter]) -> None:
    """Both have gone the same way, but for the rounding of bf16 products."""
    for one, other, begin in zip(first, second, start, strict=True):
        way, difference = (other - begin).norm(), (one - other).norm()
        assert difference <= 0.01 * way, tuple(one.shape)


@pytest.mark.parametrize("most", [100, 1 << 26])
def test_matrices_move_as_by_pytorch(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped_muon, "MAX_NUMBERS", most)
    start, ours, theirs = matrices(0), matrices(0), matrices(0)
    muon = GroupedMuon(ours, lr=0.02, momentum=0.95)
    reference = torch.optim.Muon(theirs, lr=0.02, momentum=0.95, weight_decay=0.0)
    for step in range(4):
        set_gradients(step, ours, theirs)
        for group in (*muon.param_groups, *reference.param_groups):
            group["lr"] = 0.02 / (1 + step)
        muon.step()
        reference.step()
        apart(ours, theirs, start)
    for one, other in zip(ours, theirs, strict=True):
        mine, right = muon.state[one], reference.state[other]
        assert mine.keys() == right.keys() == {"momentum_buffer"}
        torch.testing.assert_close(mine["momentum_buffer"], right["momentum_buffer"])


def test_what_has_no_gradient_is_left_alone() -> None:
    params = matrices(0)
    before = params[1].detach().clone()
    muon = GroupedMuon(params)
    set_gradients(1, params)
    muon.step()
    assert torch.equal(params[1], before) and params[1] not in muon.state
    for param in params:
        param.grad = None
    muon.step()  # nothing to do


def test_singular_values_come_near_one_in_every_shape() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in [(12, 12), (12, 30), (30, 12)]:
        given = [torch.randn(shape, generator=generator) * scale for scale in (1e-6, 1.0, 1e4)]
        for matrix, result in zip(given, orthogonal(given), strict=True):
            assert result.shape == matrix.shape and result.dtype == matrix.dtype
            values = torch.linalg.svdvals(result)
            assert values.min() > 0.3 and values.max() < 1.4
    assert orthogonal([torch.zeros(3, 4)])[0].abs().max() == 0


def test_only_matrices_are_taken() -> None:
    with pytest.raises(ValueError, match=r"one has shape \(3,\)"):
        GroupedMuon([nn.Parameter(torch.zeros(3))])


def test_a_closure_computes_the_gradients_first() -> None:
    param = nn.Parameter(torch.eye(4))
    muon = GroupedMuon([param], lr=0.1)

    def closure() -> float:
        loss = param.sum()
        loss.backward()
        return loss.item()

    assert muon.step(closure) == 4.0 and not torch.equal(param, torch.eye(4))


def test_states_of_pytorchs_muon_are_taken_over() -> None:
    nets = [Supernet(make_space(), torch.Generator().manual_seed(0)) for _ in range(3)]

    def gradients(seed: int) -> None:
        for net in nets:
            generator = torch.Generator().manual_seed(seed)
            for _, param in net.named_parameters():
                param.grad = torch.randn(param.shape, generator=generator)

    ours, resumed, theirs = (SupernetOptimizer(net, 0.02, 0.003) for net in nets)
    old = theirs._optimizers["muon"].param_groups[0]["params"]
    theirs._optimizers["muon"] = torch.optim.Muon(old, lr=0.02, momentum=0.95, weight_decay=0.0)
    gradients(0)
    ours.step(1.0)
    theirs.step(1.0)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    resumed.load_state_dict(theirs.state_dict())
    nets[1].load_state_dict(nets[2].state_dict())
    gradients(1)
    resumed.step(0.5)
    theirs.step(0.5)
    apart(*([p for _, p in net.named_parameters()] for net in (nets[1], nets[2], nets[0])))
