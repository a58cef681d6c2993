from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nas_kernels.int8_weight_linear import (
    dequantize_rows,
    fake_quantize_rows,
    int8_weight_linear,
    int8_weight_linear_ref,
    quantize_rows,
)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rms_ratio(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).square().mean() / expected.square().mean()).sqrt().item()


@pytest.mark.parametrize("shape", [(1, 1), (17, 33), (48, 64)])
def test_values_row_by_row(shape: tuple[int, int]) -> None:
    weight = draw(*shape)
    values, scale = quantize_rows(weight)
    assert (values.dtype, scale.dtype) == (torch.int8, torch.bfloat16)
    assert scale.shape == shape[:1]
    for row in range(shape[0]):
        step = scale[row].item()
        assert step == pytest.approx(weight[row].abs().max().item() / 127, rel=2**-8)
        # Half a step, and at the end of the range what rounding the step took from it.
        error = (values[row].double() * step - weight[row].double()).abs().max()
        assert error <= step * (0.5 + 127 * 2**-8)
    assert values.abs().max() <= 127


# Small and large, at few and many tokens: the kernel, converted weights, and odd sizes.
@pytest.mark.parametrize(
    "sizes", [(1, 1, 1), (1, 33, 17), (3, 40, 5), (1, 64, 48), (8, 320, 320), (40, 320, 320)]
)
def test_every_way_agrees_with_the_reference(sizes: tuple[int, int, int]) -> None:
    rows, k, n = sizes
    x, (values, scale) = draw(2, rows, k)[:1], quantize_rows(draw(n, k, seed=1))
    expected = x.double() @ (values.double() * scale.double()[:, None]).T
    out = int8_weight_linear(x, values, scale)
    assert (out.dtype, out.shape) == (torch.float32, (1, rows, n))
    assert rms_ratio(out.double(), expected) < 5e-3
    assert rms_ratio(int8_weight_linear(x.double(), values, scale), expected) < 1e-12
    assert rms_ratio(int8_weight_linear_ref(x.double(), values, scale), expected) < 1e-12
    half = int8_weight_linear(x.bfloat16(), values, scale)
    assert half.dtype == torch.bfloat16
    assert rms_ratio(half.double(), expected) < 2e-2


def test_fake_quantisation_is_what_is_stored_and_passes_gradients() -> None:
    weight = draw(5, 11).requires_grad_()
    rounded = fake_quantize_rows(weight)
    stored = dequantize_rows(*quantize_rows(weight), torch.float32)
    torch.testing.assert_close(rounded, stored, rtol=1e-6, atol=1e-7)
    (rounded * draw(5, 11, seed=2)).sum().backward()
    assert torch.equal(weight.grad, draw(5, 11, seed=2))


def test_a_zero_row_gives_zeros() -> None:
    weight = draw(4, 16)
    weight[2] = 0
    out = int8_weight_linear(draw(2, 16), *quantize_rows(weight))
    assert torch.isfinite(out).all()
    assert (out[:, 2] == 0).all()
