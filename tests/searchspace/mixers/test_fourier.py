from __future__ import annotations

import math

import pytest
import torch
from scipy.fft import dctn
from torch import Tensor

from searchspace.mixers.fourier import CosineMixer, FourierMixer
from searchspace.specs import MixerSpec

SIZES = [(1, 1), (1, 6), (2, 5), (7, 12), (12, 7), (9, 1)]


def spec(width: int) -> MixerSpec:
    return MixerSpec(width, "fourier", 0, 0, 0, causal=False)


def inputs(tokens: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randn(2, tokens, width, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("tokens, width", SIZES)
def test_fourier_is_the_real_part_of_the_double_sum(tokens: int, width: int) -> None:
    x_BTD = inputs(tokens, width)
    expected = torch.zeros_like(x_BTD)
    for f in range(tokens):
        for g in range(width):
            for t in range(tokens):
                for d in range(width):
                    angle = 2 * math.pi * (f * t / tokens + g * d / width)
                    expected[:, f, g] += x_BTD[:, t, d] * math.cos(angle)
    out = FourierMixer(spec(width))(x_BTD)
    assert torch.allclose(out, expected / math.sqrt(tokens * width), atol=1e-10)


@pytest.mark.parametrize("tokens, width", SIZES)
def test_cosine_is_the_orthonormal_transform(tokens: int, width: int) -> None:
    x_BTD = inputs(tokens, width)
    out = CosineMixer(spec(width))(x_BTD)
    expected = torch.from_numpy(dctn(x_BTD.numpy(), type=2, axes=(1, 2), norm="ortho"))
    assert torch.allclose(out, expected, atol=1e-12)
    assert math.isclose(out.norm().item(), x_BTD.norm().item(), rel_tol=1e-12)


@pytest.mark.parametrize("cls", [FourierMixer, CosineMixer])
def test_gradient_and_low_precision(cls: type[FourierMixer] | type[CosineMixer]) -> None:
    mixer, x_BTD = cls(spec(12)), inputs(7, 12).requires_grad_()
    assert torch.autograd.gradcheck(mixer, (x_BTD,))
    exact = mixer(x_BTD)
    with torch.autocast("cpu", torch.bfloat16):
        rough = mixer(x_BTD.bfloat16())
    assert ((rough.double() - exact).norm() / exact.norm()).item() < 2e-2
