"""The linear attention family against sums over tokens written from the papers' formulas.

Shapes: B batch, T tokens, D d_model, H query heads, G key/value heads, R = H / G, K head width,
S tokens that are seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from searchspace.mixers.base import ProjectedMixer
from searchspace.mixers.cosine_linear import CosineAttention
from searchspace.mixers.flow import FlowAttention
from searchspace.mixers.fourier_sf import FourierAttention
from searchspace.mixers.galerkin import GalerkinAttention
from searchspace.mixers.gla import GatedLinearAttention
from searchspace.mixers.hedgehog import HedgehogAttention
from searchspace.mixers.latte import LatteAttention
from searchspace.mixers.linear_elu import LinearAttention
from searchspace.mixers.norm_linear import NormLinearAttention
from searchspace.mixers.slab_linear import SlabAttention
from searchspace.specs import MixerSpec

D_MODEL, HEAD_DIM, TOKENS = 20, 6, 71
# What head h reads at token t from the tokens it sees: (mixer, h, t, q_HTK, k_SK, v_SK) -> (K,).
Reference = Callable[[Any, int, int, Tensor, Tensor, Tensor], Tensor]


def make_x(tokens: int = TOKENS, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(batch, tokens, D_MODEL, generator=generator, dtype=torch.float64)


def build(
    mixer_class: type[ProjectedMixer],
    causal: bool = True,
    heads: tuple[int, int] = (4, 2),
    position: str = "nope",
    **options: int,
) -> Any:
    chosen = tuple(sorted({**mixer_class.options, **options}.items()))
    spec = MixerSpec(D_MODEL, "x", *heads, HEAD_DIM, position, options=chosen, causal=causal)
    mixer, generator = mixer_class(spec).double(), torch.Generator().manual_seed(3)
    mixer.reset(generator, 1)
    with torch.no_grad():
        for parameter in mixer.parameters():  # gains of one and biases of zero would hide errors
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.2 * noise)
    return mixer


def rms_ratio(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).square().mean() / expected.square().mean()).sqrt().item()


def heads_of(mixer: Any, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    projected = (x_TD @ w.weight.T for w in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    q, k, v = (y.reshape(len(x_TD), -1, HEAD_DIM).transpose(0, 1) for y in projected)
    return q, k, v


def by_loops(mixer: Any, x_BTD: Tensor, reference: Reference) -> Tensor:
    out = torch.zeros_like(x_BTD)
    for b, x_TD in enumerate(x_BTD):
        q_HTK, k_GTK, v_GTK = heads_of(mixer, x_TD)
        repeats = len(q_HTK) // len(k_GTK)
        for t in range(len(x_TD)):
            seen = t + 1 if mixer.causal else len(x_TD)
            read = [
                reference(mixer, h, t, q_HTK, k_GTK[h // repeats, :seen], v_GTK[h // repeats])
                for h in range(len(q_HTK))
            ]
            out[b, t] = mixer.o_proj.weight @ torch.cat(read)
    return out


def rotated(x_SK: Tensor, first: int) -> Tensor:
    """RoFormer, equation 34, features i and i + K/2 paired; row s stands at `first + s`."""
    out, half = x_SK.clone(), x_SK.shape[1] // 2
    for s in range(len(x_SK)):
        for i in range(half):
            angle = (first + s) * 10000 ** (-2 * i / x_SK.shape[1])
            a, b = x_SK[s, i].item(), x_SK[s, i + half].item()
            out[s, i] = a * math.cos(angle) - b * math.sin(angle)
            out[s, i + half] = b * math.cos(angle) + a * math.sin(angle)
    return out


def scores(mixer: Any, q_K: Tensor, k_SK: Tensor, t: int) -> Tensor:
    """Products of features, rotated where the spec says so, (S,)."""
    if mixer.spec.position == "rope":
        return rotated(k_SK, 0) @ rotated(q_K[None], t)[0]
    return k_SK @ q_K


def quotient(mixer: Any, t: int, q_K: Tensor, k_SK: Tensor, v_TK: Tensor) -> Tensor:
    return scores(mixer, q_K, k_SK, t) @ v_TK[: len(k_SK)] / (k_SK @ q_K).sum()


def elu_one(x: Tensor) -> Tensor:
    return torch.where(x > 0, x + 1, x.exp())


def linear_elu(m: Any, h: int, t: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return quotient(m, t, elu_one(q[h, t]), elu_one(k), v)


def hedgehog(m: Any, h: int, t: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    def features(x: Tensor, map_KK: Tensor) -> Tensor:
        y = (x @ map_KK).exp()
        return torch.cat([y / y.sum(-1, True), (1 / y) / (1 / y).sum(-1, True)], dim=-1)

    group = h * m.spec.num_kv_heads // m.spec.num_heads
    return quotient(m, t, features(q[h, t], m.hedgehog_q[h]), features(k, m.hedgehog_k[group]), v)


def cosine(m: Any, h: int, t: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q_K, k_SK = q[h, t] / q[h, t].norm(), k / k.norm(dim=1, keepdim=True)
    stabiliser = len(k) ** (1 / (1 + math.exp(-m.cosine_exponent[h].item())))
    return scores(m, q_K, k_SK, t) @ v[: len(k)] / stabiliser


def norm_linear(m: Any, h: int, t: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = scores(m, elu_one(q[h, t]), elu_one(k), t) @ v[: len(k)]
    return m.norm_linear_gain[h] * out / (out.square().mean() + 1e-5).sqrt()


def latte(m: Any, h: int, t: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = torch.zeros(HEAD_DIM, dtype=torch.float64)
    for latent in range(HEAD_DIM):
        token_weights = k[:, latent].exp() / k[:, latent].exp().sum()
        latent_weight = q[h, t, latent].exp() / q[h, t].exp().sum()
        out += latent_weight * (token_weights @ v[: len(k)])
    return out


def slab(m: Any, h: int, t: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q_K, k_SK = q[h, t].clamp_min(0), k.clamp_min(0)
    out = k_SK @ q_K @ v[: len(k)] / (k_SK @ q_K).sum().clamp_min(1e-6)
    group = h * m.spec.num_kv_heads // m.spec.num_heads
    taps = m.slab_conv.reshape(-1, HEAD_DIM, m.slab_conv.shape[1])[group]
    # Stored from the own token outward: -1, -2, ... or, seeing both sides, +1, -1, +2, -2, ...
    for i in range(taps.shape[1]):
        other = t - i if m.causal else t + (i + 1) // 2 * (1 if i % 2 else -1)
        if 0 <= other < len(v):
            out = out + taps[:, i] * v[other]
    return out


def normed(x: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean(-1, True)
    return centred / (centred.square().mean(-1, True) + 1e-5).sqrt() * gain + bias


def galerkin(m: Any, h: int, t: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    g = h * m.spec.num_kv_heads // m.spec.num_heads
    k = normed(k, m.galerkin_k_gain[g], m.galerkin_k_bias[g])
    v = normed(v, m.galerkin_v_gain[g], m.galerkin_v_bias[g])
    return q[h, t] @ (k.T @ v[: len(k)]) / len(k)


def fourier_sf(m: Any, h: int, t: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    g = h * m.spec.num_kv_heads // m.spec.num_heads
    q_K = normed(q[h, t], m.fourier_q_gain[h], m.fourier_q_bias[h])
    return (normed(k, m.fourier_k_gain[g], m.fourier_k_bias[g]) @ q_K) @ v[: len(k)] / len(k)


REFERENCES: dict[type[ProjectedMixer], Reference] = {
    LinearAttention: linear_elu,
    HedgehogAttention: hedgehog,
    CosineAttention: cosine,
    NormLinearAttention: norm_linear,
    LatteAttention: latte,
    SlabAttention: slab,
    GalerkinAttention: galerkin,
    FourierAttention: fourier_sf,
}
WITH_ROPE = [one for one in REFERENCES if "rope" in one.positions]
EVERY = [*REFERENCES, FlowAttention, GatedLinearAttention]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", [(4, 2), (3, 1)])
@pytest.mark.parametrize("mixer_class", REFERENCES)
@torch.no_grad()
def test_against_sums(
    mixer_class: type[ProjectedMixer], heads: tuple[int, int], causal: bool
) -> None:
    mixer, x = build(mixer_class, causal, heads), make_x()
    assert rms_ratio(mixer(x), by_loops(mixer, x, REFERENCES[mixer_class])) < 1e-10


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("mixer_class", WITH_ROPE)
@torch.no_grad()
def test_rope_turns_the_numerator_only(mixer_class: type[ProjectedMixer], causal: bool) -> None:
    # The mixer's rotation table is made in fp32.
    mixer, x = build(mixer_class, causal, (2, 1), "rope"), make_x(19)
    assert rms_ratio(mixer(x), by_loops(mixer, x, REFERENCES[mixer_class])) < 1e-6
    assert rms_ratio(mixer(x), build(mixer_class, causal, (2, 1))(x)) > 1e-2


def test_only_methods_with_products_of_features_take_rope() -> None:
    expected = {LinearAttention, HedgehogAttention, CosineAttention, NormLinearAttention}
    assert set(WITH_ROPE) == expected


@pytest.mark.parametrize("taps", [3, 5, 7])
@pytest.mark.parametrize("causal", [True, False])
@torch.no_grad()
def test_slab_taps(taps: int, causal: bool) -> None:
    mixer, x = build(SlabAttention, causal, (2, 2), taps=taps), make_x(9)
    assert rms_ratio(mixer(x), by_loops(mixer, x, slab)) < 1e-10


def flow_by_loops(mixer: Any, x_TD: Tensor) -> Tensor:
    """Flow-Attention; every sum over the tokens that a token sees, divided by them."""
    q_HTK, k_GTK, v_GTK = heads_of(mixer, x_TD)
    tokens, repeats = len(x_TD), len(q_HTK) // len(k_GTK)
    seen = [range(t + 1 if mixer.causal else tokens) for t in range(tokens)]
    heads = []
    for g, v in enumerate(v_GTK):
        q, k = q_HTK[g * repeats : (g + 1) * repeats].sigmoid(), k_GTK[g].sigmoid()
        sinks = range(repeats)
        incoming = [
            [sum(q[r, t] @ k[s] for s in seen[t]) / len(seen[t]) for t in range(tokens)]
            for r in sinks
        ]
        outgoing = [
            sum(q[r, s] @ k[t] for r in sinks for s in seen[t]) / len(seen[t]) / repeats
            for t in range(tokens)
        ]
        conserved = [
            sum(q[r, s] @ k[t] / incoming[r][s] for r in sinks for s in seen[t])
            / (len(seen[t]) * repeats)
            for t in range(tokens)
        ]
        competition = [
            math.exp(conserved[t]) / sum(math.exp(conserved[s]) for s in seen[t]) * len(seen[t])
            for t in range(tokens)
        ]
        for r in sinks:
            head = torch.zeros(tokens, HEAD_DIM, dtype=torch.float64)
            for t in range(tokens):
                flow = torch.stack([q[r, t] @ k[s] / outgoing[s] for s in seen[t]]).mean()
                read = sum(q[r, t] @ k[s] * competition[s] * v[s] for s in seen[t])
                head[t] = flow.sigmoid() * read / (incoming[r][t] * len(seen[t]))
            heads.append(head)
    return torch.cat(heads, dim=1) @ mixer.o_proj.weight.T


@pytest.mark.parametrize("causal", [True, False])
@torch.no_grad()
def test_flow_against_sums(causal: bool) -> None:
    mixer, x = build(FlowAttention, causal), make_x(17)
    assert rms_ratio(mixer(x)[0], flow_by_loops(mixer, x[0])) < 1e-10


@torch.no_grad()
def test_bidirectional_gla_is_the_mean_of_two_recurrences() -> None:
    mixer, x = build(GatedLinearAttention, causal=False), make_x()
    x_TD, q, k, v = x[0], *heads_of(mixer, x[0])
    low = x_TD @ mixer.decay_down.weight.T @ mixer.decay_up.weight.T + mixer.decay_bias
    decay = (torch.sigmoid(low) ** (1 / 16)).reshape(TOKENS, -1, HEAD_DIM).transpose(0, 1)
    both = torch.zeros_like(q)
    for order in (range(TOKENS), reversed(range(TOKENS))):
        state = torch.zeros(2, HEAD_DIM, HEAD_DIM, dtype=torch.float64)
        for t in order:
            state = state * decay[:, t, :, None] + k[:, t, :, None] * v[:, t, None, :]
            for h in range(4):
                both[h, t] += q[h, t] @ state[h // 2] / 2 / math.sqrt(HEAD_DIM)
    heads = mixer.head_norm * both / (both.square().mean(-1, True) + 1e-5).sqrt()
    gate = x_TD @ mixer.out_gate.weight.T
    expected = heads.transpose(0, 1).flatten(1) * gate * gate.sigmoid() @ mixer.o_proj.weight.T
    assert rms_ratio(mixer(x)[0], expected) < 1e-10


@pytest.mark.parametrize("qkv_dconv", [0, 3])
@pytest.mark.parametrize("mixer_class", EVERY)
@torch.no_grad()
def test_state_carries_everything_over(mixer_class: type[ProjectedMixer], qkv_dconv: int) -> None:
    position = mixer_class.positions[-1]
    mixer = build(mixer_class, True, (4, 2), position, qkv_dconv=qkv_dconv)
    x = make_x(100, batch=2)
    state = mixer.init_state(2, 100)
    assert mixer.fixed_state and state.tensors().keys() == mixer.init_state(2, 5).tensors().keys()
    out = torch.cat([mixer(part, state) for part in x.split([1, 1, 66, 1, 31], dim=1)], dim=1)
    assert rms_ratio(out, mixer(x)) < 1e-10
    assert state.length == 100


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("mixer_class", EVERY)
def test_large_and_zero_inputs_stay_finite(mixer_class: type[ProjectedMixer], causal: bool) -> None:
    mixer = build(mixer_class, causal).float()
    for scale in (0.0, 30.0):
        x = (scale * make_x()).float().requires_grad_()
        out = mixer(x)
        out.square().mean().backward()
        assert out.isfinite().all() and x.grad is not None and x.grad.isfinite().all()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in mixer.parameters())


@pytest.mark.parametrize("mixer_class", EVERY)
@torch.no_grad()
def test_bf16_state_keeps_its_size(mixer_class: type[ProjectedMixer]) -> None:
    mixer, x = build(mixer_class).float(), make_x(100).float()
    state = mixer.init_state(1, 100)
    expected, sizes = mixer(x), {k: (v.shape, v.dtype) for k, v in state.tensors().items()}
    with torch.autocast("cpu", torch.bfloat16):
        out = torch.cat([mixer(part, state) for part in x.split([70, 1, 29], dim=1)], dim=1)
    assert rms_ratio(out.float(), expected) < 3e-2
    assert {k: (v.shape, v.dtype) for k, v in state.tensors().items()} == sizes
