from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nas_kernels.linear_scan import linear_scan, recurrent_linear_scan

LENGTHS = [1, 2, 3, 4, 7, 16, 17, 64, 131]


def make_inputs(tokens: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shape = (2, tokens, 5)
    decay = torch.rand(shape, generator=generator, dtype=torch.float64)
    # Some decays are exactly 0 or 1: forget everything, forget nothing.
    decay[0, ::3], decay[1, 1::4] = 0.0, 1.0
    added = torch.randn(shape, generator=generator, dtype=torch.float64)
    state = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    return decay.to(dtype), added.to(dtype), state.to(dtype)


def rms_ratio(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).square().mean() / expected.square().mean()).sqrt().item()


def test_the_recurrent_reference_is_the_sum() -> None:
    decay, added, state = make_inputs(7)
    for t in range(7):
        expected = state * decay[:, : t + 1].prod(dim=1)
        for s in range(t + 1):
            expected = expected + added[:, s] * decay[:, s + 1 : t + 1].prod(dim=1)
        actual = recurrent_linear_scan(decay, added, state)[0][:, t]
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("with_state", [False, True])
def test_chunks_equal_the_recurrence(tokens: int, with_state: bool) -> None:
    decay, added, state = make_inputs(tokens)
    before = state if with_state else None
    pairs = zip(
        linear_scan(decay, added, before), recurrent_linear_scan(decay, added, before), strict=True
    )
    for actual, expected in pairs:
        assert actual.shape == expected.shape
        assert rms_ratio(actual, expected) < 1e-12


@pytest.mark.parametrize("tokens", LENGTHS)
def test_gradients_equal_the_recurrence(tokens: int) -> None:
    given = [x.requires_grad_() for x in make_inputs(tokens)]
    results = []
    for function in (linear_scan, recurrent_linear_scan):
        states, last = function(*given)
        loss = states.sin().sum() + last.square().sum()
        results.append(torch.autograd.grad(loss, given))
    for actual, expected in zip(*results, strict=True):
        assert rms_ratio(actual, expected) < 1e-12


@pytest.mark.parametrize("tokens", [4, 7])
def test_gradcheck(tokens: int) -> None:
    # Away from decays of exactly 0 and 1, which finite differences leave.
    decay, added, state = make_inputs(tokens)
    given = [(0.1 + 0.8 * decay).requires_grad_(), added.requires_grad_(), state.requires_grad_()]
    assert torch.autograd.gradcheck(linear_scan, given)


def test_any_split_hands_on_the_state() -> None:
    decay, added, _ = make_inputs(131)
    whole, last = linear_scan(decay, added)
    state, parts = None, []
    for cut in zip(decay.split([1, 39, 1, 90], 1), added.split([1, 39, 1, 90], 1), strict=True):
        part, state = linear_scan(*cut, state)
        parts.append(part)
    assert state is not None
    assert rms_ratio(torch.cat(parts, dim=1), whole) < 1e-12
    assert rms_ratio(state, last) < 1e-12


def test_float32_is_as_exact_as_float32_can_be() -> None:
    exact = recurrent_linear_scan(*make_inputs(2000))[0]
    rounded = linear_scan(*make_inputs(2000, torch.float32))[0]
    assert rounded.dtype == torch.float32
    assert rms_ratio(rounded.double(), exact) < 1e-6


def test_bfloat16_is_computed_in_float32() -> None:
    decay, added, state = make_inputs(64, torch.bfloat16)
    out, _ = linear_scan(decay, added, state)
    exact, _ = recurrent_linear_scan(decay.double(), added.double(), state.double())
    assert out.dtype == torch.float32
    assert rms_ratio(out.double(), exact) < 1e-6


@pytest.mark.parametrize("tokens", [1, 2, 7, 16])
def test_inputs_are_left_alone(tokens: int) -> None:
    for tracked in (False, True):
        inputs = [x.requires_grad_(tracked) for x in make_inputs(tokens)]
        before = [x.detach().clone() for x in inputs]
        states, _ = linear_scan(*inputs)
        if tracked:
            states.sum().backward()
        assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))
