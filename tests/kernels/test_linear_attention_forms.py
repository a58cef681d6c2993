"""Linear attention with a decay per head, over all tokens, and through latents.

Shapes: B batch, H query heads, G key/value heads, T tokens, K key width, V value width.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nas_kernels.linear_attention import (
    full_linear_attention,
    latent_attention,
    linear_attention,
    recurrent_linear_attention,
)


def rms_ratio(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).square().mean() / expected.square().mean()).sqrt().item()


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("tokens", [0, 1, 5, 64, 131])
@pytest.mark.parametrize("scale", [0.05, 30.0])
def test_decay_per_head_may_be_anything(tokens: int, scale: float) -> None:
    q, k, v = draw(2, 4, tokens, 5), draw(2, 2, tokens, 5, seed=1), draw(2, 2, tokens, 7, seed=2)
    decay, state = -scale * draw(2, 2, tokens, 1, seed=3).abs(), draw(2, 2, 5, 7, seed=4)
    out, after = linear_attention(q, k, v, decay, state)
    if tokens == 0:
        assert out.shape == (2, 4, 0, 7) and torch.equal(after, state)
        return
    expected, last = recurrent_linear_attention(q, k, v, decay, state)
    assert rms_ratio(out, expected) < 1e-12 and rms_ratio(after, last) < 1e-12


def test_bidirectional_form() -> None:
    q, k, v = draw(2, 6, 13, 5), draw(2, 3, 11, 5, seed=1), draw(2, 3, 11, 7, seed=2)
    expected = torch.zeros(2, 6, 13, 7, dtype=torch.float64)
    for h in range(6):
        for s in range(11):
            expected[:, h] += (q[:, h] @ k[:, h // 2, s, :, None]) * v[:, h // 2, s, None]
    assert rms_ratio(full_linear_attention(q, k, v), expected) < 1e-12


@pytest.mark.parametrize("jump", [0.0, 60.0, 140.0, -140.0, 400.0])
def test_latents_with_steep_logits(jump: float) -> None:
    tokens, start = 150, 100
    weight, v = draw(1, 4, tokens, 5).softmax(-1), draw(1, 2, tokens, 7, seed=1)
    logits = 3 * draw(1, 2, tokens, 5, seed=2)
    logits[:, :, start:, ::2] += jump
    expected = torch.zeros(1, 4, tokens, 7, dtype=torch.float64)
    for t in range(tokens):
        p = logits[:, :, : t + 1].softmax(dim=2).repeat_interleave(2, dim=1)
        means = p.transpose(-1, -2) @ v[:, :, : t + 1].repeat_interleave(2, dim=1)
        expected[:, :, t] = (weight[:, :, t, None] @ means)[:, :, 0]
    out, _ = latent_attention(weight.float(), logits.float(), v.float())
    # Beyond 150 within one chunk only what comes after the jump may be off.
    exact = start if jump > 150 else tokens
    assert out.isfinite().all()
    assert rms_ratio(out[:, :, :exact].double(), expected[:, :, :exact]) < 1e-5
