from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nas_kernels.wkv import WKVState, bidirectional_wkv, recurrent_wkv, wkv

LENGTHS = [1, 2, 3, 8, 16, 17, 70]


def make_inputs(
    tokens: int, dtype: torch.dtype = torch.float64, spread: float = 3.0
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    shape = (2, tokens, 5)
    inputs = [spread * draw(*shape), draw(*shape), draw(5).exp(), draw(5)]
    return [x.to(dtype) for x in inputs]


def make_state() -> WKVState:
    generator = torch.Generator().manual_seed(5)
    num, den, peak = torch.randn(3, 2, 5, generator=generator, dtype=torch.float64)
    return num, den.exp(), peak


def rms_ratio(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).square().mean() / expected.square().mean()).sqrt().item()


def weighted_mean(k: Tensor, v: Tensor, decay: Tensor, bonus: Tensor, both: bool) -> Tensor:
    """Every weight of the published formula, one by one."""
    out = torch.zeros_like(v)
    for t in range(k.shape[1]):
        num, den = torch.zeros_like(v[:, 0]), torch.zeros_like(v[:, 0])
        for i in range(k.shape[1] if both else t + 1):
            log_weight = bonus if i == t else -(abs(t - i) - 1) * decay
            weight = (log_weight + k[:, i]).exp()
            num, den = num + weight * v[:, i], den + weight
        out[:, t] = num / den
    return out


def test_the_recurrent_reference_is_the_weighted_mean() -> None:
    inputs = make_inputs(9)
    torch.testing.assert_close(recurrent_wkv(*inputs)[0], weighted_mean(*inputs, both=False))


@pytest.mark.parametrize("tokens", [1, 2, 9])
def test_bidirectional_is_the_weighted_mean(tokens: int) -> None:
    inputs = make_inputs(tokens)
    torch.testing.assert_close(bidirectional_wkv(*inputs), weighted_mean(*inputs, both=True))


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("with_state", [False, True])
def test_the_scan_equals_the_recurrence(tokens: int, with_state: bool) -> None:
    state = make_state() if with_state else None
    actual, after = wkv(*make_inputs(tokens), state)
    expected, expected_after = recurrent_wkv(*make_inputs(tokens), state)
    assert rms_ratio(actual, expected) < 1e-12
    for x, y in zip(after, expected_after, strict=True):
        assert rms_ratio(x, y) < 1e-12


@pytest.mark.parametrize("tokens", LENGTHS)
def test_gradients_equal_the_recurrence(tokens: int) -> None:
    given = [x.requires_grad_() for x in make_inputs(tokens)]
    results = []
    for function in (wkv, recurrent_wkv):
        out, (num, den, _) = function(*given)
        loss = out.sin().sum() + (num / den).square().sum()
        results.append(torch.autograd.grad(loss, given, materialize_grads=True))
    for actual, expected in zip(*results, strict=True):
        if tokens == 1 and expected.abs().max() < 1e-15:  # one token: no weight matters
            assert actual.abs().max() < 1e-15
        else:
            assert rms_ratio(actual, expected) < 1e-11


def test_any_split_hands_on_the_state() -> None:
    k, v, decay, bonus = make_inputs(70)
    whole, _ = wkv(k, v, decay, bonus)
    state, parts = None, []
    for k_part, v_part in zip(k.split([1, 39, 1, 29], 1), v.split([1, 39, 1, 29], 1), strict=True):
        part, state = wkv(k_part, v_part, decay, bonus, state)
        parts.append(part)
    assert rms_ratio(torch.cat(parts, dim=1), whole) < 1e-12


def test_float32_is_as_exact_as_float32_can_be() -> None:
    exact = recurrent_wkv(*make_inputs(500))[0]
    rounded = wkv(*make_inputs(500, torch.float32))[0]
    assert rms_ratio(rounded.double(), exact) < 1e-5


@pytest.mark.parametrize("decay", [1e-4, 1e3])
def test_huge_logarithms_stay_finite(decay: float) -> None:
    k, v, w, bonus = make_inputs(64, torch.float32, spread=300.0)
    given = [x.requires_grad_() for x in (k, v, torch.full_like(w, decay), bonus)]
    out, _ = wkv(*given)
    exact, _ = recurrent_wkv(*(x.detach().double() for x in given))
    assert rms_ratio(out.double(), exact) < 1e-4
    for grad in torch.autograd.grad(out.sum() + bidirectional_wkv(*given).sum(), given):
        assert torch.isfinite(grad).all()


def test_inputs_are_left_alone() -> None:
    for tokens in (1, 16):
        inputs, state = make_inputs(tokens), make_state()
        before = [x.clone() for x in (*inputs, *state)]
        wkv(*inputs, state)
        assert all(torch.equal(x, y) for x, y in zip((*inputs, *state), before, strict=True))
