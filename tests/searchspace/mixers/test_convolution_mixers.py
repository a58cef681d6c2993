"""Hyena, AFT and short convolutions against loops over tokens written from the formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from searchspace.errors import UserError
from searchspace.mixers.aft import AftFull
from searchspace.mixers.aft_window import AftConv, AftLocal
from searchspace.mixers.base import Mixer
from searchspace.mixers.dsconv import SeparableConv
from searchspace.mixers.glu_mixer import GluMixer
from searchspace.mixers.hyena import Hyena
from searchspace.mixers.pool import AveragePool, MaxPool
from searchspace.specs import MixerSpec

D_MODEL, HEADS, HEAD_DIM, MAX_TOKENS = 12, 3, 5, 90
DIRECTIONS = pytest.mark.parametrize("causal", [True, False])
LENGTHS = pytest.mark.parametrize("tokens", [1, 2, 33, 71])
VARIANTS: list[tuple[type[Mixer], dict[str, Any]]] = [
    (Hyena, {}),
    (Hyena, {"order": 3, "qkv_dconv": 0}),
    (Hyena, {"order": 3, "qkv_dconv": 4}),
    (AftFull, {"rank": 6}),
    (AftFull, {"rank": 6, "qkv_dconv": 3}),
    (AftLocal, {"rank": 6, "window": 9}),
    (AftLocal, {"rank": 6, "window": 80}),
    (AftLocal, {"rank": 6, "window": 1}),
    (AftLocal, {"rank": 6, "window": 4, "qkv_dconv": 2}),
    (AftConv, {"window": 8}),
    (AftConv, {"window": 128}),
    (AveragePool, {"window": 2}),
    (AveragePool, {"window": 5}),
    (MaxPool, {"window": 4}),
    (MaxPool, {"window": 7}),
    (SeparableConv, {"taps": 5}),
    (GluMixer, {}),
    (GluMixer, {"qkv_dconv": 4}),
]
IDS = [f"{cls.__name__}-{options}" for cls, options in VARIANTS]


def build(
    cls: type[Mixer], options: dict[str, Any], causal: bool = True, double: bool = True
) -> Any:
    full = tuple(sorted({**cls.options, **options}.items()))
    spec = MixerSpec(
        D_MODEL,
        cls.__name__,
        HEADS,
        HEADS,
        HEAD_DIM,
        options=full,
        causal=causal,
        max_tokens=MAX_TOKENS if cls.bounded else 0,
    )
    mixer = cls(spec)
    generator = torch.Generator().manual_seed(0)
    mixer.reset(generator, 1)
    with torch.no_grad():
        for name, value in mixer.named_parameters():
            if "aft" in name:
                # The start is too near to zero to show a mistake.
                value.add_(0.7 * torch.randn(value.shape, generator=generator))
    return mixer.double() if double else mixer


def inputs(tokens: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, tokens, D_MODEL, generator=generator, dtype=torch.float64).to(dtype)


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    scale = expected.double().square().mean().sqrt().clamp_min(1e-9)
    return ((actual - expected).double().square().mean().sqrt() / scale).item()


def short_conv(x_BTC: Tensor, weight_CW: Tensor, causal: bool) -> Tensor:
    """Weights by distance, see `searchspace.convolution`."""
    taps, tokens = weight_CW.shape[1], x_BTC.shape[1]
    out = torch.zeros_like(x_BTC)
    for t in range(tokens):
        for tap, offset in enumerate(offsets(taps, causal)):
            if 0 <= t + offset < tokens:
                out[:, t] += weight_CW[:, tap] * x_BTC[:, t + offset]
    return out


def offsets(window: int, causal: bool) -> list[int]:
    """Offsets of a window by distance, as its weights are stored."""
    if causal:
        return [-i for i in range(window)]
    return [(i + 1) // 2 * (1 if i % 2 else -1) for i in range(window)]


def project_qkv(mixer: Any, x_BTD: Tensor) -> list[Tensor]:
    out = [x_BTD @ getattr(mixer, f"{name}_proj").weight.t() for name in "qkv"]
    if mixer.num_taps:
        weights = (mixer.q_conv, mixer.k_conv, mixer.v_conv)
        out = [short_conv(x, w, mixer.causal) for x, w in zip(out, weights, strict=True)]
    return out


def hyena_filter(mixer: Hyena, n: int, distance: int) -> Tensor:
    time = distance / MAX_TOKENS
    waves = [2 * math.pi * k * time for k in range(1, 9)]
    hidden = torch.tensor([time, *map(math.cos, waves), *map(math.sin, waves)], dtype=torch.float64)
    for weight, phase in zip(
        [mixer.hyena_in, mixer.hyena_mid[0], mixer.hyena_mid[1]], mixer.hyena_phase, strict=True
    ):
        hidden = torch.sin(14 * (weight @ hidden) + phase)
    decay = torch.exp(-mixer.hyena_log_decay.exp() * abs(time))
    return (mixer.hyena_filter[n] @ hidden) * decay


@DIRECTIONS
@pytest.mark.parametrize("options", [{}, {"order": 3}, {"order": 3, "qkv_dconv": 0}])
@torch.no_grad()
def test_hyena_is_its_recurrence(options: dict[str, Any], causal: bool) -> None:
    mixer, tokens = build(Hyena, options, causal), 21
    x_BTD = inputs(tokens)
    q, k, z = project_qkv(mixer, x_BTD)
    gates = [k, q]
    if mixer.order == 3:
        extra = x_BTD @ mixer.hyena_proj.weight.t()
        gates = [k, short_conv(extra, mixer.hyena_conv, causal) if mixer.num_taps else extra, q]
    for n, gate in enumerate(gates):
        long = torch.zeros_like(z)
        for t in range(tokens):
            for s in range(t + 1 if causal else tokens):
                long[:, t] += hyena_filter(mixer, n, t - s) * z[:, s]
        z = gate * (long + mixer.hyena_direct[n] * z)
    assert relative_rms(mixer(x_BTD), z @ mixer.o_proj.weight.t()) < 1e-10


def aft_reference(
    q_BTC: Tensor, k_BTC: Tensor, v_BTC: Tensor, bias_TSC: Tensor, causal: bool
) -> Tensor:
    out = torch.zeros_like(v_BTC)
    tokens = v_BTC.shape[1]
    for t in range(tokens):
        end = t + 1 if causal else tokens
        weight = torch.softmax(k_BTC[:, :end] + bias_TSC[t, :end], dim=1)
        out[:, t] = torch.sigmoid(q_BTC[:, t]) * (weight * v_BTC[:, :end]).sum(dim=1)
    return out


@DIRECTIONS
@LENGTHS
@pytest.mark.parametrize(
    "cls, options",
    [
        (AftFull, {"rank": 6}),
        (AftLocal, {"rank": 6, "window": 9}),
        (AftLocal, {"rank": 6, "window": 10, "qkv_dconv": 3}),
        (AftLocal, {"rank": 6, "window": 80}),
    ],
)
@torch.no_grad()
def test_aft_full_and_local(
    cls: type[Mixer], options: dict[str, Any], tokens: int, causal: bool
) -> None:
    mixer, x_BTD = build(cls, options, causal), inputs(tokens)
    bias_TS = mixer.aft_query_position[:tokens] @ mixer.aft_key_position[:tokens].t()
    if cls is AftLocal:
        inside = torch.zeros(tokens, tokens, dtype=torch.bool)
        for t in range(tokens):
            for offset in offsets(options["window"], causal):
                if 0 <= t + offset < tokens:
                    inside[t, t + offset] = True
        bias_TS = bias_TS * inside
    expected = aft_reference(*project_qkv(mixer, x_BTD), bias_TS[..., None], causal)
    assert relative_rms(mixer(x_BTD), expected @ mixer.o_proj.weight.t()) < 1e-10


@DIRECTIONS
@LENGTHS
@pytest.mark.parametrize("window", [4, 128])
@torch.no_grad()
def test_aft_conv(window: int, tokens: int, causal: bool) -> None:
    mixer, x_BTD = build(AftConv, {"window": window}, causal), inputs(tokens)
    raw = mixer.aft_bias
    normal = (raw - raw.mean(1, keepdim=True)) / (raw.var(1, False, keepdim=True) + 1e-5).sqrt()
    bias_HW = normal * mixer.aft_bias_gain[:, None] + mixer.aft_bias_shift[:, None]
    bias_TSH = torch.zeros(tokens, tokens, HEADS, dtype=torch.float64)
    for t in range(tokens):
        for i, offset in enumerate(offsets(window, causal)):
            if 0 <= t + offset < tokens:
                bias_TSH[t, t + offset] = bias_HW[:, i]
    q = x_BTD @ mixer.q_proj.weight.t()
    k = (x_BTD @ mixer.aft_key.weight.t()).repeat_interleave(HEAD_DIM, dim=-1)
    v = x_BTD @ mixer.v_proj.weight.t()
    bias_TSC = bias_TSH.repeat_interleave(HEAD_DIM, dim=-1)
    expected = aft_reference(q, k, v, bias_TSC, causal) @ mixer.o_proj.weight.t()
    assert relative_rms(mixer(x_BTD), expected) < 1e-10


@DIRECTIONS
@LENGTHS
@pytest.mark.parametrize("window", [2, 3, 4, 7])
@torch.no_grad()
def test_pooling(window: int, tokens: int, causal: bool) -> None:
    x_BTD = inputs(tokens)
    average, largest = torch.zeros_like(x_BTD), torch.zeros_like(x_BTD)
    for t in range(tokens):
        around = [t + o for o in offsets(window, causal) if 0 <= t + o < tokens]
        average[:, t] = x_BTD[:, around].mean(dim=1) - x_BTD[:, t]
        largest[:, t] = x_BTD[:, around].amax(dim=1)
    pool, maxpool = (build(cls, {"window": window}, causal) for cls in (AveragePool, MaxPool))
    assert torch.allclose(pool(x_BTD), average, atol=1e-12)
    assert torch.equal(maxpool(x_BTD), largest)


@DIRECTIONS
@torch.no_grad()
def test_separable_conv(causal: bool) -> None:
    mixer, x_BTD = build(SeparableConv, {"taps": 5}, causal), inputs(23)
    gated = x_BTD @ mixer.v_proj.weight.t()
    gated = gated * torch.sigmoid(x_BTD @ mixer.dsconv_gate.weight.t())
    expected = short_conv(gated, mixer.dsconv_taps, causal) @ mixer.o_proj.weight.t()
    assert relative_rms(mixer(x_BTD), expected) < 1e-10


@DIRECTIONS
@pytest.mark.parametrize("taps", [0, 4])
@torch.no_grad()
def test_glu_mixer(taps: int, causal: bool) -> None:
    mixer, x_BTD = build(GluMixer, {"qkv_dconv": taps}, causal), inputs(23)
    gate, v = x_BTD @ mixer.glu_gate.weight.t(), x_BTD @ mixer.v_proj.weight.t()
    if taps:
        gate, v = short_conv(gate, mixer.glu_conv, causal), short_conv(v, mixer.v_conv, causal)
    assert relative_rms(mixer(x_BTD), (F.gelu(gate) * v) @ mixer.o_proj.weight.t()) < 1e-10


@pytest.mark.parametrize("cls, options", VARIANTS, ids=IDS)
@torch.no_grad()
def test_any_split_into_calls(cls: type[Mixer], options: dict[str, Any]) -> None:
    mixer = build(cls, options, double=False)
    x_BTD = inputs(71, torch.float32)
    expected = mixer(x_BTD)
    for split in ([1] * 71, [70, 1], [5, 1, 1, 9, 2, 33, 20], [64, 7]):
        state = mixer.init_state(2, MAX_TOKENS)
        sizes = {name: value.nbytes for name, value in state.tensors().items()}
        out = torch.cat([mixer(part, state) for part in x_BTD.split(split, dim=1)], dim=1)
        assert relative_rms(out, expected) < 2e-6
        assert state.length == 71
        assert sizes == {name: value.nbytes for name, value in state.tensors().items()}


@pytest.mark.parametrize("cls, options", VARIANTS, ids=IDS)
@torch.no_grad()
def test_huge_later_tokens_change_nothing(cls: type[Mixer], options: dict[str, Any]) -> None:
    # No norm stands in front here: the values really are that large.
    mixer, x_BTD = build(cls, options, double=False), inputs(71, torch.float32)
    for start in (1, 40, 70):
        changed = x_BTD.clone()
        changed[:, start:] = 100 * inputs(71, torch.float32, seed=2)[:, start:]
        out, expected = mixer(changed)[:, :start], mixer(x_BTD)[:, :start]
        assert torch.isfinite(mixer(changed)).all()
        assert relative_rms(out, expected) < 2e-6


@pytest.mark.parametrize("cls", [Hyena, AftFull, AftLocal])
@torch.no_grad()
def test_more_tokens_than_positions_are_refused(cls: type[Mixer]) -> None:
    mixer = build(cls, {}, double=False)
    with pytest.raises(UserError, match="at most 90 tokens and was given 91"):
        mixer(inputs(91, torch.float32))
    state = mixer.init_state(2, 200)
    mixer(inputs(90, torch.float32), state)
    with pytest.raises(UserError, match="given 91"):
        mixer(inputs(1, torch.float32), state)


@torch.no_grad()
def test_hyena_works_out_filters_once_per_state(monkeypatch: pytest.MonkeyPatch) -> None:
    mixer, calls = build(Hyena, {}, double=False), []
    original = mixer.filters
    monkeypatch.setattr(mixer, "filters", lambda *a: calls.append(a) or original(*a))
    state = mixer.init_state(2, 40)
    for part in inputs(12, torch.float32).split([5, 1, 1, 5], dim=1):
        mixer(part, state)
    assert calls == [(0, 40)]
    assert set(state.tensors()) == {"history_BNSC", "conv_BTC"}


@DIRECTIONS
@torch.no_grad()
def test_leading_taps_are_a_smaller_window(causal: bool) -> None:
    large, small = (build(SeparableConv, {"taps": taps}, causal) for taps in (7, 3))
    tensors = {**large.state_dict(), "dsconv_taps": large.dsconv_taps[:, :3]}
    small.load_state_dict(tensors)
    large.dsconv_taps[:, 3:] = 0
    assert relative_rms(large(inputs(20)), small(inputs(20))) < 1e-12


@torch.no_grad()
def test_glu_mixer_without_mixing_sees_one_token() -> None:
    mixer, x_BTD = build(GluMixer, {}), inputs(9)
    alone = torch.cat([mixer(token) for token in x_BTD.split(1, dim=1)], dim=1)
    assert relative_rms(mixer(x_BTD), alone) < 1e-12
