"""RWKV channel mixing against the published formula."""

from __future__ import annotations

import torch
from torch import Tensor

from searchspace.ffn.rwkv_channelmix import RWKVChannelMix
from searchspace.specs import FFNSpec

D_MODEL, TOKENS = 12, 37


def make_input(tokens: int = TOKENS) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, tokens, D_MODEL, generator=generator, dtype=torch.float64)


def require_equal(actual: Tensor, expected: Tensor) -> None:
    error = ((actual - expected).square().mean() / expected.square().mean()).sqrt().item()
    assert error < 1e-10


def test_channel_mix_is_the_published_formula() -> None:
    ffn = RWKVChannelMix(FFNSpec(D_MODEL, "rwkv_channelmix", 17)).double()
    ffn.reset(torch.Generator().manual_seed(0), 2)
    x, expected = make_input(), torch.zeros_like(make_input())
    for t in range(TOKENS):
        before = x[:, t - 1] if t else torch.zeros_like(x[:, 0])
        x_k = ffn.channelmix_mix_k * x[:, t] + (1 - ffn.channelmix_mix_k) * before
        x_r = ffn.channelmix_mix_r * x[:, t] + (1 - ffn.channelmix_mix_r) * before
        hidden = (x_k @ ffn.up_proj.weight.T).clamp_min(0) ** 2
        gate = (x_r @ ffn.channelmix_receptance.weight.T).sigmoid()
        expected[:, t] = gate * (hidden @ ffn.down_proj.weight.T)
    require_equal(ffn(x), expected)
    state = ffn.init_state(2, TOKENS)
    parts = [ffn(part, state) for part in x.split([3, 1, 33], dim=1)]
    require_equal(torch.cat(parts, dim=1), expected)
    assert state.length == TOKENS
