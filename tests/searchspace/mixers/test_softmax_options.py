"""Softmax attention without some of its matrices, and with keys of another layer, in float64."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from searchspace.errors import UserError
from searchspace.mixers.base import SharedKV
from searchspace.mixers.softmax import SoftmaxAttention
from searchspace.space import SearchSpace
from searchspace.specs import MixerSpec
from searchspace.supernet import Supernet

D_MODEL, HEAD_DIM, BATCH, TOKENS = 12, 4, 2, 13
SLOPES = [2.0 ** (-8 * (h + 1) / 4) for h in range(4)]


def build(
    position: str = "nope", causal: bool = True, kv_shared: bool = False, **options: Any
) -> Any:
    spec = MixerSpec(
        D_MODEL,
        "softmax",
        num_heads=4,
        num_kv_heads=2,
        head_dim=HEAD_DIM,
        position=position,
        options=tuple(sorted(options.items())),
        causal=causal,
        kv_shared=kv_shared,
    )
    mixer = SoftmaxAttention(spec)
    for parameter in mixer.parameters():
        torch.nn.init.constant_(parameter, math.nan)
    generator = torch.Generator().manual_seed(7 if kv_shared else 0)
    mixer.reset(generator, depth=1)
    if mixer.weighted:
        # The start is too near to the identity to tell a matrix from its transpose.
        with torch.no_grad():
            mixer.qk_weighted.add_(torch.randn(mixer.qk_weighted.shape, generator=generator))
    return mixer.double()


def make_x(seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, TOKENS, D_MODEL, generator=generator, dtype=torch.float64)


def rms_error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return float((actual - expected).square().mean().sqrt() / expected.square().mean().sqrt())


def rotate_all(x_TK: Tensor) -> Tensor:
    half = x_TK.shape[-1] // 2
    angle = torch.arange(len(x_TK))[:, None] * 10_000.0 ** (-torch.arange(half) / half)
    cos, sin = angle.cos().double(), angle.sin().double()
    a, b = x_TK[:, :half], x_TK[:, half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def convolved(x_TC: Tensor, taps_CW: Tensor, causal: bool) -> Tensor:
    offsets = [0, -1, -2, -3] if causal else [0, 1, -1, 2]
    out = torch.zeros_like(x_TC)
    for t in range(len(x_TC)):
        for w in range(taps_CW.shape[1]):
            if 0 <= t + offsets[w] < len(x_TC):
                out[t] += taps_CW[:, w] * x_TC[t + offsets[w]]
    return out


def part_of(mixer: Any, x_TD: Tensor, part: str) -> Tensor:
    """Return the query, key or value of every token, (T, heads * K)."""
    out = x_TD @ getattr(mixer, f"{part}_proj").weight.T
    if not mixer.convolved:
        return out
    return convolved(out, getattr(mixer, f"{part}_conv"), mixer.causal)


def head_of(x_TC: Tensor, head: int) -> Tensor:
    return x_TC[:, head * HEAD_DIM : (head + 1) * HEAD_DIM]


def reference(mixer: Any, x: Tensor, provider: Any = None, source: Tensor | None = None) -> Tensor:
    """Attend head by head; keys and values are those `provider` makes of `source`."""
    qk, vo = mixer.option("qk"), mixer.option("vo")
    provider, source = provider or mixer, x if source is None else source
    out = torch.zeros_like(x)
    for b in range(BATCH):
        own, other = x[b], source[b]
        context = []
        for h in range(4):
            if qk == "collapsed":
                q, k = own @ mixer.qk_collapsed[h].weight.T, other
            elif qk == "symmetric":
                q = k = head_of(part_of(mixer, own, "k"), h // 2)
            else:
                q = head_of(part_of(mixer, own, "q"), h)
                k = head_of(part_of(provider, other, "k"), h // 2)
            if mixer.option("similarity") == "weighted":
                q = q @ mixer.qk_weighted[h]
            v = other if vo == "identity" else head_of(part_of(provider, other, "v"), h // 2)
            if mixer.spec.position == "rope":
                q, k = rotate_all(q), rotate_all(k)
            scores = q @ k.T / math.sqrt(q.shape[-1])
            t = torch.arange(TOKENS)
            if mixer.spec.position == "alibi":
                scores = scores - SLOPES[h] * (t[:, None] - t).abs()
            if mixer.causal:
                scores = scores.masked_fill(t > t[:, None], -math.inf)
            context.append(torch.softmax(scores, dim=-1) @ v)
        if vo == "identity":
            out[b] = torch.stack(context).mean(dim=0)
        else:
            out[b] = torch.cat(context, dim=-1) @ mixer.o_proj.weight.T
    return out


OPTIONS: list[dict[str, Any]] = [
    {"qk": "symmetric"},
    {"qk": "collapsed"},
    {"vo": "identity"},
    {"qk": "symmetric", "vo": "identity"},
    {"qk": "collapsed", "vo": "identity"},
    {"qkv_dconv": 3},
    {"qk": "symmetric", "qkv_dconv": 4},
    {"vo": "identity", "qkv_dconv": 2},
    {"similarity": "weighted"},
    {"similarity": "weighted", "qk": "symmetric"},
    {"similarity": "weighted", "vo": "identity", "qkv_dconv": 3},
]


@pytest.mark.parametrize("position", ["rope", "alibi", "nope"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@torch.no_grad()
def test_options_against_the_formula(options: dict[str, Any], causal: bool, position: str) -> None:
    mixer, x = build(position, causal, **options), make_x()
    expected = reference(mixer, x)
    assert rms_error(mixer(x), expected) < 1e-5
    if causal:
        for split in ([1] * TOKENS, [6, 1, 4, 2]):
            state = mixer.init_state(BATCH, TOKENS)
            out = torch.cat([mixer(part, state) for part in x.split(split, dim=1)], dim=1)
            assert rms_error(out, expected) < 1e-5


def test_parameters_that_are_not_used_are_not_there() -> None:
    assert {n.split(".")[0] for n in build(qk="symmetric").state_dict()} == {
        "k_proj", "v_proj", "o_proj",
    }  # fmt: skip
    collapsed = build(qk="collapsed", vo="identity")
    assert list(collapsed.state_dict()) == [f"qk_collapsed.{h}.weight" for h in range(4)]
    assert not collapsed.input_linears() and collapsed.output_linear() is None
    assert list(build(kv_shared=True, qkv_dconv=3).state_dict()) == [
        "q_proj.weight", "o_proj.weight",
    ]  # fmt: skip
    for options in OPTIONS:
        for kv_shared in (False, True):
            if SoftmaxAttention.can_share_kv({"qk": "separate", **options}) or not kv_shared:
                mixer = build(kv_shared=kv_shared, **options)
                assert set(mixer.param_axes(mixer.spec)) == set(mixer.state_dict())


def test_the_input_is_cached_once() -> None:
    both = build(qk="collapsed", vo="identity").init_state(1, 10)
    assert [t.shape for t in both.tensors().values()] == [(1, 1, 10, D_MODEL)]
    # Rotated keys are not the values.
    assert len(build("rope", qk="collapsed", vo="identity").init_state(1, 10).tensors()) == 2


SHARING: list[dict[str, Any]] = [
    {}, {"qk": "collapsed"}, {"vo": "identity"}, {"qkv_dconv": 3}, {"similarity": "weighted"},
]  # fmt: skip


@pytest.mark.parametrize("position", ["rope", "alibi", "nope"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("options", SHARING, ids=str)
@torch.no_grad()
def test_keys_of_another_layer(options: dict[str, Any], causal: bool, position: str) -> None:
    provider = build(position, causal, **options)
    layer = build(position, causal, kv_shared=True, **options)
    source, x = make_x(), make_x(seed=2)
    expected = reference(layer, x, provider, source)
    shared = SharedKV()
    assert rms_error(provider(source, None, shared), provider(source)) == 0.0
    assert rms_error(layer(x, None, shared), expected) < 1e-5
    if causal:
        state, outs = provider.init_state(BATCH, TOKENS), []
        for part, own in zip(source.split([5, 1, 1, 6], 1), x.split([5, 1, 1, 6], 1), strict=True):
            shared = SharedKV()
            provider(part, state, shared)
            outs.append(layer(own, None, shared))
        assert rms_error(torch.cat(outs, dim=1), expected) < 1e-5


@torch.no_grad()
def test_a_sharing_layer_alone_attends_to_zeros() -> None:
    layer, x = build("rope", kv_shared=True), make_x()
    assert torch.equal(layer(x), torch.zeros_like(x))
    assert torch.equal(layer(x, None, SharedKV()), torch.zeros_like(x))
    state = layer.init_state(BATCH, TOKENS + 1)
    assert state.tensors() == {}
    layer(x, state)
    layer(x[:, :1], state)
    assert state.length == TOKENS + 1
    with pytest.raises(UserError, match="state holds 14 tokens, 15 were given"):
        layer(x[:, :1], state)


def test_symmetric_scores_cannot_be_shared() -> None:
    assert not SoftmaxAttention.can_share_kv({"qk": "symmetric"})
    with pytest.raises(UserError, match="without queries of its own"):
        build(kv_shared=True, qk="symmetric")


@torch.no_grad()
def test_weighted_similarity_starts_as_the_dot_product() -> None:
    dot, x = build("rope"), make_x()
    weighted = SoftmaxAttention(replace(dot.spec, options=(("similarity", "weighted"),)))
    weighted.reset(torch.Generator().manual_seed(0), depth=1)
    weighted.double().load_state_dict(dot.state_dict(), strict=False)
    assert 0.0 < rms_error(weighted(x), dot(x)) < 0.05
    weighted.qk_weighted.copy_(torch.eye(HEAD_DIM))
    assert rms_error(weighted(x), dot(x)) < 1e-12


@torch.no_grad()
def test_weighted_similarity_depends_on_distances_alone_under_rope() -> None:
    mixer = build("rope", similarity="weighted")
    q, k, _ = mixer._project(make_x(), None)

    def scores(start: int) -> Tensor:
        keys = mixer.rotate(k, start).repeat_interleave(2, dim=1)
        return mixer.rotate(q, start) @ keys.transpose(-1, -2)

    # The tables of angles are float32.
    torch.testing.assert_close(scores(0), scores(40), rtol=0, atol=1e-4)


@torch.no_grad()
def test_a_smaller_network_has_the_leading_part_of_the_matrices() -> None:
    options = {"softmax": {"similarity": ("weighted", "dot")}}
    space = SearchSpace("weighted", 11, (16, 8), 4, 1, options, ((3, 3), (1, 1)), (8,))
    supernet = Supernet(space, torch.Generator().manual_seed(0))
    parameters = dict(supernet.named_parameters())
    name = "blocks.layer0_mixer.op.qk_weighted"
    assert parameters[name].shape == (3, 4, 4)
    layer = replace(space.largest().layers[0], num_heads=1, num_kv_heads=1)
    weighted = dict(supernet.extract(space.arch(8, (layer,))).named_parameters())
    assert torch.equal(weighted[name], parameters[name][:1])
    dot = space.arch(8, (replace(layer, mixer_options=()),))
    without = dict(supernet.extract(dot).named_parameters())
    assert set(weighted) - set(without) == {name}
    assert all(torch.equal(without[other], weighted[other]) for other in without)


def test_collapsed_scores_have_their_own_matrix_already() -> None:
    collapsed = {**SoftmaxAttention.options, "qk": "collapsed", "similarity": "weighted"}
    assert SoftmaxAttention.settle_options(collapsed)["similarity"] == "dot"
    with pytest.raises(UserError, match="similarity='weighted' with qk='collapsed'"):
        SoftmaxAttention.check_options("softmax", collapsed)
