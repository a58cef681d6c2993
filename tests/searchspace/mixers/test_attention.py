"""Mixers with attention scores against a loop over tokens and heads, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from searchspace.errors import UserError
from searchspace.mixers import MIXERS
from searchspace.mixers.base import MixerState
from searchspace.specs import MixerSpec

D_MODEL, HEAD_DIM, BATCH = 12, 4, 2
Visible = Callable[[int, int, int], int]
"""How often head h's query at t counts the key at s."""


def build(
    name: str,
    heads: tuple[int, int] = (4, 2),
    position: str = "nope",
    causal: bool = True,
    **values: Any,
) -> Any:
    fields = {key: values.pop(key) for key in ("kv_shared", "max_tokens") if key in values}
    options = tuple(sorted(values.items()))
    spec = MixerSpec(D_MODEL, name, *heads, HEAD_DIM, position, options=options, causal=causal)
    mixer: Any = MIXERS[name](MixerSpec(**{**vars(spec), **fields}))
    mixer.reset(torch.Generator().manual_seed(0), depth=1)
    return mixer.double()


def make_x(tokens: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, tokens, D_MODEL, generator=generator, dtype=torch.float64)


def rms_error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    difference = (actual - expected).square().mean().sqrt()
    return float(difference / expected.square().mean().sqrt())


def rotated(x: Tensor, position: int) -> Tensor:
    half = x.shape[-1] // 2
    out = x.clone()
    for i in range(half):
        # The shipped table is float32, as it is in training.
        angle = torch.tensor(position * 10_000.0 ** (-i / half)).item()
        out[i] = x[i] * math.cos(angle) - x[half + i] * math.sin(angle)
        out[half + i] = x[half + i] * math.cos(angle) + x[i] * math.sin(angle)
    return out


def scores_of(mixer: Any, q: Tensor, keys: Tensor, head: int, t: int, seen: list[int]) -> Tensor:
    """Return the scores of one query and its keys, with the linear bias if there is one."""
    scores = keys[seen] @ q / math.sqrt(q.shape[0])
    if mixer.spec.position == "alibi":
        slope = 2.0 ** (-8 * (head + 1) / mixer.spec.num_heads)
        scores = scores - slope * torch.tensor([abs(t - s) for s in seen])
    return scores


def softmax_of(scores: Tensor, counts: Tensor, head: int) -> Tensor:
    weights = counts * scores.exp()
    return weights / weights.sum()


def by_loops(
    mixer: Any, x: Tensor, visible: Visible, weigh: Callable[..., Tensor] = softmax_of
) -> Tensor:
    spec, (batch, tokens, _) = mixer.spec, x.shape
    per_group = spec.num_heads // spec.num_kv_heads
    heads = torch.zeros(batch, tokens, spec.num_heads, HEAD_DIM, dtype=torch.float64)
    for b in range(batch):
        q, k, v = (
            (x[b] @ linear.weight.T).unflatten(-1, (-1, HEAD_DIM))
            for linear in (mixer.q_proj, mixer.k_proj, mixer.v_proj)
        )
        if spec.position == "rope":
            for t in range(tokens):
                q[t] = torch.stack([rotated(head, t) for head in q[t]])
                k[t] = torch.stack([rotated(head, t) for head in k[t]])
        for h in range(spec.num_heads):
            for t in range(tokens):
                last = t + 1 if spec.causal else tokens
                seen = [s for s in range(last) if visible(h, t, s)]
                counts = torch.tensor([float(visible(h, t, s)) for s in seen]).double()
                g = h // per_group
                scores = scores_of(mixer, q[t, h], k[:, g], h, t, seen)
                heads[b, t, h] = weigh(scores, counts, h) @ v[seen, g]
    return heads.flatten(2) @ mixer.o_proj.weight.T


def by_calls(mixer: Any, x: Tensor, split: Sequence[int]) -> Tensor:
    state = mixer.init_state(x.shape[0], x.shape[1])
    out = torch.cat([mixer(part, state) for part in x.split(list(split), dim=1)], dim=1)
    assert state.length == x.shape[1]
    return out


def num_bytes(state: MixerState) -> int:
    return sum(t.numel() * t.element_size() for t in state.tensors().values())


def sliding(window: int, dilation: int, num_global: int, causal: bool) -> Visible:
    def visible(h: int, t: int, s: int) -> int:
        near = s in [t + sign * i * dilation for i in range(window) for sign in (-1, 1)]
        return int(near or s < num_global or (not causal and t < num_global))

    return visible


def block(size: int) -> Visible:
    return lambda h, t, s: int(t // size == s // size)


def strided(stride: int) -> Visible:
    return lambda h, t, s: int(abs(t - s) <= stride or (t - s) % stride == 0)


def fixed(stride: int, summary: int) -> Visible:
    columns = range(stride - summary, stride)
    return lambda h, t, s: int(t // stride == s // stride or s % stride in columns)


def dilated(segment: int, num_rates: int) -> Visible:
    def visible(h: int, t: int, s: int) -> int:
        rates = [2**i for i in range(num_rates)]
        return sum(
            t // (segment * r) == s // (segment * r) and t % r == h % r and s % r == h % r
            for r in rates
        )

    return visible


CASES: dict[str, tuple[str, dict[str, Any], Callable[[bool], Visible]]] = {
    "full": ("softmax", {}, lambda causal: lambda h, t, s: 1),
    "window": ("sliding_window", {"window": 4}, lambda causal: sliding(4, 1, 0, causal)),
    "wide_window": ("sliding_window", {"window": 16}, lambda causal: sliding(16, 1, 0, causal)),
    "window_of_one": ("sliding_window", {"window": 1}, lambda causal: sliding(1, 1, 0, causal)),
    "global": (
        "sliding_window",
        {"window": 3, "global_tokens": 6},
        lambda causal: sliding(3, 1, 6, causal),
    ),
    "dilated_window": (
        "sliding_window",
        {"window": 3, "global_tokens": 2, "dilation": 3},
        lambda causal: sliding(3, 3, 2, causal),
    ),
    "only_dilated_window": (
        "sliding_window",
        {"window": 4, "dilation": 2},
        lambda causal: sliding(4, 2, 0, causal),
    ),
    "strided": ("strided", {"stride": 5}, lambda causal: strided(5)),
    "fixed": ("fixed", {"stride": 5, "summary": 2}, lambda causal: fixed(5, 2)),
    "diag_block": ("diag_block", {"block": 7}, lambda causal: block(7)),
    "dilated": ("dilated", {"segment": 3, "num_rates": 3}, lambda causal: dilated(3, 3)),
    "one_rate": ("dilated", {"segment": 5, "num_rates": 1}, lambda causal: block(5)),
}


@pytest.mark.parametrize("position", ["rope", "alibi", "nope"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_patterns_against_loops(case: str, causal: bool, position: str) -> None:
    name, options, visible = CASES[case]
    heads = (4, 2) if position == "rope" else (3, 1)
    mixer = build(name, heads, position, causal, **options)
    for tokens in (1, 19):
        x = make_x(tokens)
        expected = by_loops(mixer, x, visible(causal))
        assert rms_error(mixer(x), expected) < 1e-5


@pytest.mark.parametrize("position", ["rope", "alibi", "nope"])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_any_split_into_calls_is_the_same(case: str, position: str) -> None:
    name, options, _ = CASES[case]
    mixer, x = build(name, (4, 2), position, qkv_dconv=3, **options), make_x(31)
    expected = mixer(x)
    for split in ((1,) * 31, (30, 1), (2, 1, 1, 9, 1, 14, 3), (1, 30), (14, 7, 10)):
        assert rms_error(by_calls(mixer, x, split), expected) < 1e-7  # biases are float32


@pytest.mark.parametrize("position", ["rope", "alibi", "nope"])
@pytest.mark.parametrize("causal", [True, False])
@torch.no_grad()
def test_relu_attention_against_loops(causal: bool, position: str) -> None:
    def weigh(scores: Tensor, counts: Tensor, head: int) -> Tensor:
        return scores.clamp_min(0.0) / len(scores)

    mixer, x = build("relu_attention", (4, 2), position, causal), make_x(17)
    assert rms_error(mixer(x), by_loops(mixer, x, lambda h, t, s: 1, weigh)) < 1e-5
    if causal:
        assert rms_error(by_calls(mixer, x, (5, 1, 11)), mixer(x)) < 1e-12


@pytest.mark.parametrize("position", ["rope", "alibi", "nope"])
@pytest.mark.parametrize("causal", [True, False])
@torch.no_grad()
def test_norm_attention_against_loops(causal: bool, position: str) -> None:
    mixer, x = build("norm_attention", (4, 2), position, causal), make_x(17)
    mixer.norm_attention_gain += torch.tensor([-0.5, 0.0, 0.5, 1.0])
    mixer.norm_attention_bias += torch.tensor([0.3, 0.1, -0.2, 0.0])

    def weigh(scores: Tensor, counts: Tensor, head: int) -> Tensor:
        normalised = (scores - scores.mean()) / (scores.var(unbiased=False) + 1e-5).sqrt()
        gain, bias = mixer.norm_attention_gain[head], mixer.norm_attention_bias[head]
        return (gain * normalised + bias) / math.sqrt(len(scores))

    assert rms_error(mixer(x), by_loops(mixer, x, lambda h, t, s: 1, weigh)) < 1e-5
    if causal:
        assert rms_error(by_calls(mixer, x, (5, 1, 11)), mixer(x)) < 1e-12


def test_norm_attention_of_one_token_has_finite_gradients() -> None:
    mixer, x = build("norm_attention"), make_x(1).requires_grad_()
    (mixer(x) - mixer(make_x(3))[:, :1]).square().sum().backward()
    assert x.grad is not None and bool(torch.isfinite(x.grad).all())
    assert all(bool(torch.isfinite(p.grad).all()) for p in mixer.parameters())


@torch.no_grad()
def test_linformer_against_its_formula() -> None:
    mixer = build("linformer", (4, 2), causal=False, rank=5, max_tokens=16)
    for tokens in (1, 11, 16):
        x = make_x(tokens)
        heads = torch.zeros(BATCH, tokens, 4, HEAD_DIM, dtype=torch.float64)
        for b in range(BATCH):
            q, k, v = (x[b] @ w.weight.T for w in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
            for h in range(4):
                group = slice(h // 2 * HEAD_DIM, (h // 2 + 1) * HEAD_DIM)
                short_k = mixer.linformer_k[:, :tokens] @ k[:, group]
                short_v = mixer.linformer_v[:, :tokens] @ v[:, group]
                scores = q[:, h * HEAD_DIM : (h + 1) * HEAD_DIM] @ short_k.T / math.sqrt(HEAD_DIM)
                heads[b, :, h] = torch.softmax(scores, dim=-1) @ short_v
        assert rms_error(mixer(x), heads.flatten(2) @ mixer.o_proj.weight.T) < 1e-12


def test_linformer_refuses_more_tokens_than_it_was_made_for() -> None:
    mixer = build("linformer", causal=False, rank=5, max_tokens=16)
    with pytest.raises(UserError, match="max_tokens=16, 17 were given"):
        mixer(make_x(17))


def test_states_hold_what_is_needed_only() -> None:
    per_token = 2 * BATCH * 2 * HEAD_DIM * 4
    for name, options, tokens in (
        ("softmax", {}, 1000),
        ("relu_attention", {}, 1000),
        ("strided", {"stride": 8}, 1000),
        ("sliding_window", {"window": 8}, 7),
        ("sliding_window", {"window": 8, "dilation": 3, "global_tokens": 5}, 21 + 5),
        ("diag_block", {"block": 8}, 8),
        ("dilated", {"segment": 8, "num_rates": 3}, 32),
    ):
        assert num_bytes(build(name, **options).init_state(BATCH, 1000)) == tokens * per_token


@pytest.mark.parametrize("name", ["softmax", "diag_block", "dilated", "norm_attention"])
def test_a_state_that_is_full_says_so(name: str) -> None:
    mixer = build(name)
    state = mixer.init_state(BATCH, 4)
    with pytest.raises(UserError, match="state holds 4 tokens, 5 were given"):
        mixer(make_x(5), state)


def test_options_that_make_no_sense_are_refused() -> None:
    def check(name: str, **options: Any) -> None:
        MIXERS[name].check_options(name, {**MIXERS[name].options, **options})

    check("sliding_window", global_tokens=0)
    for name, options, message in (
        ("sliding_window", {"global_tokens": -1}, "global_tokens=-1 must be .* at least 0"),
        ("sliding_window", {"dilation": 0}, "dilation=0 must be .* at least 1"),
        ("fixed", {"stride": 4, "summary": 5}, "summary=5 is more than a block of stride=4"),
        ("softmax", {"qk": "collapsed", "qkv_dconv": 3}, "qkv_dconv=3 with qk='collapsed'"),
        ("softmax", {"qk": "symmetrical"}, "did you mean 'symmetric'"),
    ):
        with pytest.raises(UserError, match=message):
            check(name, **options)


@pytest.mark.parametrize("name", ["sliding_window", "dilated"])
def test_padding_of_blocks_gets_no_gradient(name: str) -> None:
    options: dict[str, Any] = (
        {"window": 4} if name == "sliding_window" else {"segment": 4, "num_rates": 2}
    )
    mixer, x = build(name, causal=False, **options), make_x(13).requires_grad_()
    mixer(x).square().sum().backward()
    assert x.grad is not None and bool(torch.isfinite(x.grad).all())
    assert all(bool(torch.isfinite(p.grad).all()) for p in mixer.parameters())


@torch.no_grad()
def test_a_decode_step_can_be_timed_on_an_unfilled_state() -> None:
    for name, options, _ in CASES.values():
        mixer, x = build(name, **options), make_x(1)
        state = mixer.init_state(BATCH, 41)
        outs = []
        for _ in range(2):
            state.length = 40
            outs.append(mixer(x, state))
        assert state.length == 41 and bool(torch.isfinite(torch.stack(outs)).all())
