from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from nas_kernels.causal_conv import causal_conv, causal_conv_reference
from nas_kernels.dispatch import triton_available
from tests.kernels.comparison import (
    DEVICE,
    assert_close,
    compare_with_float64,
    draw,
    far_apart,
    in_wider_rows,
    misaligned,
)

IMPLEMENTATIONS = [
    "reference",
    pytest.param(
        "triton",
        marks=pytest.mark.skipif(not triton_available(), reason="triton is not installed"),
    ),
]

each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def make_inputs(tokens: int, taps: int, channels: int = 5) -> list[Tensor]:
    drawn = (
        draw(2, tokens, channels, seed=0),
        draw(channels, taps, seed=1),
        draw(2, taps - 1, channels, seed=2),
        draw(channels, seed=3),
    )
    return [x.to(DEVICE) for x in drawn]


def definition(
    x: Tensor, weight: Tensor, state: Tensor | None, bias: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    """One number after the other, in float64."""
    taps = weight.shape[1]
    if state is None:
        state = x.new_zeros(x.shape[0], taps - 1, x.shape[2])
    past = torch.cat([state.double(), x.double()], dim=1)
    rows = []
    for t in range(x.shape[1]):
        window = past[:, t : t + taps].flip(1).transpose(1, 2)
        rows.append((window * weight.double()).sum(dim=-1))
    out = torch.stack(rows, dim=1)
    if bias is not None:
        out = out + bias.double()
    return (out * out.sigmoid() if silu else out), past[:, past.shape[1] - taps + 1 :]


def compare(
    inputs: list[Tensor | None], silu: bool, implementation: str, bound: float = 2e-6
) -> None:
    """Compare the result, the state and every gradient."""
    run = partial(causal_conv, silu=silu, implementation=implementation)
    compare_with_float64(run, partial(definition, silu=silu), inputs, bound)


@each_implementation
@pytest.mark.parametrize(("tokens", "taps"), [(37, 4), (1, 4), (2, 8), (5, 2), (3, 1)])
@pytest.mark.parametrize("silu", [False, True])
def test_results_and_gradients(implementation: str, tokens: int, taps: int, silu: bool) -> None:
    compare(make_inputs(tokens, taps), silu, implementation)


@each_implementation
def test_without_state_and_bias(implementation: str) -> None:
    x, weight, _, _ = make_inputs(34, 3, channels=70)
    compare([x, weight, None, None], True, implementation)


@each_implementation
def test_strides_are_followed(implementation: str) -> None:
    x, weight, state, bias = make_inputs(9, 4)
    x = in_wider_rows(x).transpose(0, 1).contiguous().transpose(0, 1)
    inputs = [x, in_wider_rows(weight), state.mT.contiguous().mT, misaligned(bias)]
    compare(inputs, True, implementation)


@each_implementation
def test_bf16_keeps_a_wider_state(implementation: str) -> None:
    x, weight, state, bias = make_inputs(9, 4)
    inputs = [x.bfloat16(), weight.bfloat16(), state.bfloat16().float(), bias.bfloat16()]
    out, after = causal_conv(*inputs, implementation=implementation)
    assert (out.dtype, after.dtype) == (torch.bfloat16, torch.float32)
    compare(inputs, True, implementation, bound=1.5e-2)


@each_implementation
def test_the_definition_in_pytorch(implementation: str) -> None:
    x, weight, state, bias = make_inputs(11, 4)
    for before in (None, state):
        for tokens in (1, 2, 11):
            given = x[:, :tokens], weight, before, bias, True
            actual = causal_conv(*given, implementation=implementation)
            for result, right in zip(actual, causal_conv_reference(*given), strict=True):
                assert_close(result, right)


@each_implementation
def test_no_tokens(implementation: str) -> None:
    x, weight, state, _ = make_inputs(3, 4)
    out, after = causal_conv(x[:, :0], weight, state, implementation=implementation)
    assert out.shape == (2, 0, 5)
    assert torch.equal(after, state)


@each_implementation
def test_the_state_alone_has_a_gradient(implementation: str) -> None:
    x, weight, state, _ = make_inputs(2, 4)
    state.requires_grad_()
    _, after = causal_conv(x, weight, state, implementation=implementation)
    grad = torch.autograd.grad(after.sum(), state)[0]
    assert grad[0, :, 0].tolist() == [0.0, 0.0, 1.0]


@pytest.mark.skipif(not triton_available(), reason="triton is not installed")
@pytest.mark.skipif(DEVICE.type == "cuda", reason="needs memory that is never touched")
def test_addresses_are_64_bit() -> None:
    x, weight, state, bias = make_inputs(3, 4)
    far = far_apart(x[:1], apart=2**30 + 8, dtype=torch.bfloat16)
    actual = causal_conv(far, weight, state[:1], bias, implementation="triton")
    for result, right in zip(actual, definition(far, weight, state[:1], bias, False), strict=True):
        assert_close(result, right)


def test_shapes_that_do_not_fit_are_refused() -> None:
    x, weight, state, bias = make_inputs(3, 4)
    with pytest.raises(ValueError, match=r"state_BPC has the shape \(2, 2, 5\)"):
        causal_conv(x, weight, state[:, 1:], implementation="reference")
    with pytest.raises(ValueError, match="weight_CW"):
        causal_conv(x, weight[1:], implementation="reference")
    with pytest.raises(ValueError, match="bias_C"):
        causal_conv(x, weight, state, bias[1:], implementation="reference")
    if triton_available():
        with pytest.raises(RuntimeError, match="9 taps"):
            causal_conv(x, draw(5, 9).to(DEVICE), implementation="triton")
    assert causal_conv(x, draw(5, 9).to(DEVICE))[0].shape == x.shape
