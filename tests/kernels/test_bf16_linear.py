from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nas_kernels.bf16_linear import bf16_linear, bf16_linear_ref, fake_round_bf16


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rms_ratio(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).square().mean() / expected.square().mean()).sqrt().item()


@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 33, 17), (1, 320, 320), (40, 320, 320)])
def test_every_size_agrees_with_float64(sizes: tuple[int, int, int]) -> None:
    rows, k, n = sizes
    x, weight = draw(2, rows, k), draw(n, k, seed=1).bfloat16()
    expected = x.double() @ weight.double().T
    out = bf16_linear(x, weight)
    assert (out.dtype, out.shape) == (torch.float32, (2, rows, n))
    assert rms_ratio(out.double(), expected) < 5e-3
    assert rms_ratio(bf16_linear(x.double(), weight), expected) < 1e-12
    assert rms_ratio(bf16_linear_ref(x, weight).double(), expected) < 1e-6
    assert bf16_linear(x.bfloat16(), weight).dtype == torch.bfloat16


def test_fake_rounding_is_exact_and_passes_gradients() -> None:
    weight = draw(5, 7).requires_grad_()
    rounded = fake_round_bf16(weight)
    assert torch.equal(rounded.bfloat16(), weight.bfloat16())
    assert (rounded - weight).abs().max() > 0
    torch.testing.assert_close(rounded, weight.bfloat16().float(), rtol=1e-7, atol=0)
    (rounded * draw(5, 7, seed=2)).sum().backward()
    assert torch.equal(weight.grad, draw(5, 7, seed=2))
