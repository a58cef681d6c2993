from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nas_kernels.int8_linear import (
    fake_quantize_activations,
    fake_quantize_weight,
    int8_linear,
    int8_linear_ref,
    quantize_activations,
    quantize_weight,
)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rms_ratio(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).square().mean() / expected.square().mean()).sqrt().item()


@pytest.mark.parametrize("shape", [(3, 5), (1, 1), (192, 768)])
def test_weight_values_row_by_row(shape: tuple[int, int]) -> None:
    weight = draw(*shape)
    values, scale = quantize_weight(weight)
    assert values.dtype == torch.int8
    assert scale.shape == shape[:1]
    for row in range(shape[0]):
        step = max(abs(x) for x in weight[row].tolist()) / 127
        assert scale[row].item() == pytest.approx(step)
        # Each value is the nearest step, and the largest one is at the end of the range.
        assert (values[row] * scale[row] - weight[row]).abs().max() <= step * 0.5001
        assert values[row].abs().max() == 127


@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 6), (1, 1, 1)])
def test_activations_have_a_scale_per_token(shape: tuple[int, ...]) -> None:
    x = draw(*shape)
    x[..., 0, :] *= 1000
    quantized = quantize_activations(x)
    assert quantized.shape == x.shape
    restored = (quantized.values_MK * quantized.scale_M1).view(shape)
    assert ((restored - x).abs() <= x.abs().amax(dim=-1, keepdim=True) / 254 * 1.001).all()


@pytest.mark.parametrize(
    "sizes", [(1, 1, 1), (3, 1, 4), (1, 192, 64), (7, 33, 5), (5, 768, 192), (64, 16, 8)]
)
def test_the_integer_product_is_exact(sizes: tuple[int, int, int]) -> None:
    rows, k, n = sizes
    quantized, (values, scale) = quantize_activations(draw(rows, k)), quantize_weight(draw(n, k))
    exact = quantized.values_MK.long() @ values.long().T
    expected = exact * quantized.scale_M1.double() * scale.double()
    out = int8_linear(quantized, values, scale)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-7)


def test_the_extremes_do_not_overflow() -> None:
    k = 4096
    quantized = quantize_activations(torch.ones(2, k))
    values, scale = quantize_weight(-torch.ones(3, k))
    torch.testing.assert_close(int8_linear(quantized, values, scale), torch.full((2, 3), -float(k)))


def test_leading_dimensions_and_strided_weights() -> None:
    x, (values, scale) = draw(2, 3, 8), quantize_weight(draw(16, 24))
    strided = values[:10, :8]
    assert not strided.is_contiguous()
    out = int8_linear(quantize_activations(x), strided, scale[:10])
    assert out.shape == (2, 3, 10)
    flat = int8_linear(quantize_activations(x.flatten(0, 1)), strided.contiguous(), scale[:10])
    assert torch.equal(out.flatten(0, 1), flat)


def test_zero_rows_give_zeros() -> None:
    x, weight = draw(3, 4), draw(5, 4)
    x[1], weight[2] = 0, 0
    out = int8_linear(quantize_activations(x), *quantize_weight(weight))
    assert torch.isfinite(out).all()
    assert (out[1] == 0).all()
    assert (out[:, 2] == 0).all()
    assert torch.isfinite(fake_quantize_activations(torch.zeros(2, 3))).all()
    assert (fake_quantize_weight(torch.zeros(2, 3)) == 0).all()


@pytest.mark.parametrize("sizes", [(1, 16, 4), (40, 192, 96)])
def test_simulated_equals_real_int8(sizes: tuple[int, int, int]) -> None:
    rows, k, n = sizes
    x, weight = draw(rows, k), draw(n, k, seed=1)
    simulated = fake_quantize_activations(x) @ fake_quantize_weight(weight).T
    real = int8_linear(quantize_activations(x), *quantize_weight(weight))
    assert rms_ratio(real, simulated) < 1e-5
    # And it is worth having: about a percent from full precision.
    assert rms_ratio(real, x @ weight.T) < 0.02


def test_fake_quantisation_is_idempotent() -> None:
    for once in (fake_quantize_weight(draw(6, 10)), fake_quantize_activations(draw(6, 10))):
        torch.testing.assert_close(fake_quantize_weight(once), once)


def test_gradients_pass_straight_through() -> None:
    for function in (fake_quantize_weight, fake_quantize_activations):
        x = draw(4, 5).requires_grad_()
        (function(x) * draw(4, 5, seed=2)).sum().backward()
        assert torch.equal(x.grad, draw(4, 5, seed=2))


def test_inputs_are_left_alone() -> None:
    x = draw(4, 5)
    for function in (
        fake_quantize_weight,
        fake_quantize_activations,
        quantize_weight,
        quantize_activations,
    ):
        function(x)
    assert torch.equal(x, draw(4, 5))


def test_a_token_does_not_depend_on_others() -> None:
    weight, x = quantize_weight(draw(9, 12)), draw(6, 12)
    alone = int8_linear(quantize_activations(x[:1]), *weight)
    x[1:] *= 1e4
    assert torch.equal(int8_linear(quantize_activations(x), *weight)[:1], alone)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_result_has_the_dtype_of_the_input(dtype: torch.dtype) -> None:
    x, weight = draw(3, 64).to(dtype), quantize_weight(draw(16, 64, seed=1).to(dtype))
    quantized = quantize_activations(x)
    assert weight[1].dtype == torch.float32
    out, reference = int8_linear(quantized, *weight), int8_linear_ref(quantized, *weight)
    assert out.dtype == reference.dtype == dtype
    bound = 5e-3 if dtype == torch.bfloat16 else 1e-12
    assert rms_ratio(out.double(), reference.double()) < bound
