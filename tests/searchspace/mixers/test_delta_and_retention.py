"""Retention and DeltaNet against loops over tokens, written from the papers' formulas."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from searchspace.mixers import MIXERS
from searchspace.mixers.base import Mixer
from searchspace.positions import apply_rope
from searchspace.specs import MixerSpec

D_MODEL, HEAD_DIM, TOKENS = 12, 6, 37
Loop = Callable[..., Tensor]


def make_mixer(
    name: str,
    heads: tuple[int, int] = (4, 4),
    causal: bool = True,
    position: str = "nope",
    **options: int,
) -> Mixer:
    cls = MIXERS[name]
    given = tuple(sorted({**cls.options, **options}.items()))
    spec = MixerSpec(
        D_MODEL, name, *heads, HEAD_DIM, position=position, options=given, causal=causal
    )
    mixer = cls(spec).double()
    generator = torch.Generator().manual_seed(1)
    mixer.reset(generator, 2)
    with torch.no_grad():
        for parameter in mixer.parameters():
            if parameter.ndim == 1:
                noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                parameter += 0.3 * noise
    return mixer


def make_input(tokens: int = TOKENS) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, tokens, D_MODEL, generator=generator, dtype=torch.float64)


def require_equal(actual: Tensor, expected: Tensor) -> None:
    error = ((actual - expected).square().mean() / expected.square().mean()).sqrt().item()
    assert error < 1e-10


def per_direction(loop: Loop, causal: bool, *sequences: Tensor) -> Tensor:
    """Run a loop over axis 1; bidirectional: the mean with the run over reversed sequences."""
    if causal:
        return loop(*sequences)
    return (loop(*sequences) + loop(*(x.flip(1) for x in sequences)).flip(1)) / 2


def heads_of(x_BTC: Tensor, repeats: int = 1) -> Tensor:
    """(B, T, heads * K) to (B, T, heads * repeats, K)."""
    return x_BTC.unflatten(-1, (-1, HEAD_DIM)).repeat_interleave(repeats, dim=2)


def rotated(x_BTHK: Tensor, position: str) -> Tensor:
    if position == "nope":
        return x_BTHK
    return apply_rope(x_BTHK.transpose(1, 2), 0, position).transpose(1, 2)


def normed(mixer: Mixer, out_BTHK: Tensor) -> Tensor:
    mean = out_BTHK.square().mean(dim=-1, keepdim=True)
    return (out_BTHK * (mean + 1e-5).rsqrt() * mixer.head_norm).flatten(2)


def retention(mixer: Mixer, x: Tensor) -> Tensor:
    spec = mixer.spec
    repeats = spec.num_heads // spec.num_kv_heads
    q = rotated(heads_of(mixer.q_proj(x)), spec.position) / math.sqrt(HEAD_DIM)
    k = rotated(heads_of(mixer.k_proj(x), repeats), spec.position)
    v = heads_of(mixer.v_proj(x), repeats)
    decays = [1 - 2.0 ** (-5 - g) for g in range(spec.num_kv_heads)]
    gamma_H = torch.tensor(decays, dtype=x.dtype).repeat_interleave(repeats)

    def loop(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        state, out = 0.0, []
        for t in range(q.shape[1]):
            state = gamma_H[:, None, None] * state + k[:, t, :, :, None] * v[:, t, :, None]
            out.append((q[:, t, :, :, None] * state).sum(dim=2))
        return torch.stack(out, dim=1)

    out = normed(mixer, per_direction(loop, spec.causal, q, k, v))
    return mixer.o_proj(out * F.silu(mixer.out_gate(x)))


def deltanet(mixer: Mixer, x: Tensor) -> Tensor:
    spec = mixer.spec
    repeats = spec.num_heads // spec.num_kv_heads

    def convolved(x_BTC: Tensor, taps: str) -> Tensor:
        if not mixer.num_taps:
            return F.silu(x_BTC)
        weight_CW, num_taps = getattr(mixer, taps), mixer.num_taps
        offsets = [0, -1, -2, -3] if spec.causal else [0, 1, -1, 2]
        out = torch.zeros_like(x_BTC)
        for t in range(x_BTC.shape[1]):
            for tap in range(num_taps):
                if 0 <= t + offsets[tap] < x_BTC.shape[1]:
                    out[:, t] += weight_CW[:, tap] * x_BTC[:, t + offsets[tap]]
        return F.silu(out)

    def unit(x: Tensor) -> Tensor:
        return x / (x.square().sum(dim=-1, keepdim=True) + 1e-6).sqrt()

    q = unit(heads_of(convolved(mixer.q_proj(x), "q_conv")))
    k = unit(heads_of(convolved(mixer.k_proj(x), "k_conv"), repeats))
    v = heads_of(convolved(mixer.v_proj(x), "v_conv"), repeats)
    beta = mixer.deltanet_beta(x).sigmoid().repeat_interleave(repeats, dim=2)

    def loop(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
        memory, out = torch.zeros(*v[:, 0].shape, HEAD_DIM, dtype=v.dtype), []
        for t in range(q.shape[1]):
            k_t, b_t = k[:, t, :, :, None], beta[:, t, :, None, None]
            forget = torch.eye(HEAD_DIM, dtype=v.dtype) - b_t * k_t @ k_t.transpose(-1, -2)
            memory = memory @ forget + b_t * v[:, t, :, :, None] @ k_t.transpose(-1, -2)
            out.append((memory @ q[:, t, :, :, None])[..., 0])
        return torch.stack(out, dim=1)

    return mixer.o_proj(normed(mixer, per_direction(loop, spec.causal, q, k, v, beta)))


FORMULAS = {"retention": retention, "deltanet": deltanet}


@torch.no_grad()
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("tokens", [1, 2, TOKENS])
@pytest.mark.parametrize("name", FORMULAS)
def test_mixer_is_the_published_loop(name: str, tokens: int, causal: bool) -> None:
    mixer, x_BTD = make_mixer(name, causal=causal), make_input(tokens)
    require_equal(mixer(x_BTD), FORMULAS[name](mixer, x_BTD))


@torch.no_grad()
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", [(4, 2), (3, 1)])
@pytest.mark.parametrize("name", FORMULAS)
def test_groups_of_heads(name: str, heads: tuple[int, int], causal: bool) -> None:
    mixer = make_mixer(name, heads, causal)
    require_equal(mixer(make_input(70)), FORMULAS[name](mixer, make_input(70)))


@torch.no_grad()
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("position", ["rope", "rope_b500_f50"])
def test_retention_with_rotated_keys(position: str, causal: bool) -> None:
    mixer = make_mixer("retention", (4, 2), causal, position)
    require_equal(mixer(make_input()), retention(mixer, make_input()))


@torch.no_grad()
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("taps", [0, 3])
def test_deltanet_with_other_convolutions(taps: int, causal: bool) -> None:
    mixer = make_mixer("deltanet", causal=causal, qkv_dconv=taps)
    require_equal(mixer(make_input()), deltanet(mixer, make_input()))


@torch.no_grad()
@pytest.mark.parametrize("name", FORMULAS)
def test_any_split_hands_on_the_state(name: str) -> None:
    mixer, x_BTD = make_mixer(name), make_input()
    expected = mixer(x_BTD)
    for split in ([1] * TOKENS, [TOKENS - 1, 1], [5, 1, 20, 11]):
        state = mixer.init_state(2, TOKENS)
        parts = [mixer(part, state) for part in x_BTD.split(split, dim=1)]
        require_equal(torch.cat(parts, dim=1), expected)
        assert state.length == TOKENS


@pytest.mark.parametrize("name", FORMULAS)
def test_state_keeps_its_bytes_under_autocast(name: str) -> None:
    mixer = make_mixer(name).float()
    state = mixer.init_state(2, TOKENS)
    made = {key: (x.shape, x.dtype) for key, x in state.tensors().items()}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        mixer(make_input().bfloat16(), state)
        mixer(make_input(1).bfloat16(), state)
    after = {key: (x.shape, x.dtype) for key, x in state.tensors().items() if key != "conv_BTC"}
    assert after == {key: value for key, value in made.items() if key != "conv_BTC"}
