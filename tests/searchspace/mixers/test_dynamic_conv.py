"""Span-based dynamic convolution against loops over tokens, heads and taps, in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from searchspace.layer_arch import LayerArch
from searchspace.mixers.dynamic_conv import DynamicConv
from searchspace.space import SearchSpace
from searchspace.specs import MixerSpec
from searchspace.supernet import Supernet

D_MODEL, HEADS, HEAD_DIM, BATCH = 10, 3, 5, 2
TAPS = pytest.mark.parametrize("taps", [3, 5, 7, 9, 15])
DIRECTIONS = pytest.mark.parametrize("causal", [True, False])


def build(taps: int = 5, causal: bool = True) -> DynamicConv:
    spec = MixerSpec(
        D_MODEL, "dynamic_conv", HEADS, HEADS, HEAD_DIM, options=(("taps", taps),), causal=causal
    )
    mixer = DynamicConv(spec)
    mixer.reset(torch.Generator().manual_seed(0), depth=1)
    return mixer.double()


def make_x(tokens: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, tokens, D_MODEL, generator=generator, dtype=torch.float64)


def rms_error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return float((actual - expected).square().mean().sqrt() / expected.square().mean().sqrt())


def offsets(taps: int, causal: bool) -> list[int]:
    """Where the taps look, in the order they are stored: from the own token outward."""
    both = sorted(range(-(taps // 2), taps // 2 + 1), key=lambda offset: (abs(offset), -offset))
    return [-i for i in range(taps)] if causal else both


def span_at(mixer: DynamicConv, x_TD: Tensor, t: int) -> Tensor:
    """Return K^s of a token (C): taps over the input's channels, then the pointwise map."""
    mixed_D = torch.zeros(D_MODEL, dtype=torch.float64)
    places = offsets(mixer.dynconv_span.shape[1], mixer.causal)
    for tap, offset in enumerate(places):
        if 0 <= t + offset < len(x_TD):
            mixed_D += mixer.dynconv_span[:, tap] * x_TD[t + offset]
    return mixer.dynconv_key.weight @ mixed_D


def reference(mixer: DynamicConv, x: Tensor) -> Tensor:
    out, places = torch.zeros_like(x), offsets(mixer.dynconv_kernel.shape[1], mixer.causal)
    for b in range(BATCH):
        v_TC = x[b] @ mixer.v_proj.weight.T
        for t in range(x.shape[1]):
            joint_C = (mixer.q_proj.weight @ x[b, t]) * span_at(mixer, x[b], t)
            heads = []
            for h in range(HEADS):
                weights = [float((mixer.dynconv_kernel[h, w] @ joint_C).exp()) for w in
                           range(len(places))]  # fmt: skip
                head_K = torch.zeros(HEAD_DIM, dtype=torch.float64)
                for weight, offset in zip(weights, places, strict=True):
                    if 0 <= t + offset < x.shape[1]:
                        value_K = v_TC[t + offset, h * HEAD_DIM : (h + 1) * HEAD_DIM]
                        head_K += weight / sum(weights) * value_K
                heads.append(head_K)
            out[b, t] = mixer.o_proj.weight @ torch.cat(heads)
    return out


@TAPS
@DIRECTIONS
@pytest.mark.parametrize("tokens", [1, 2, 11, 23])
@torch.no_grad()
def test_against_loops(tokens: int, causal: bool, taps: int) -> None:
    mixer, x = build(taps, causal), make_x(tokens)
    assert rms_error(mixer(x), reference(mixer, x)) < 1e-12


@TAPS
@pytest.mark.parametrize("split", [(1,) * 23, (6, 1, 14, 2), (20, 3), (1, 22)], ids=str)
@torch.no_grad()
def test_any_split_into_calls(split: tuple[int, ...], taps: int) -> None:
    mixer, x = build(taps), make_x(23)
    state = mixer.init_state(BATCH, 23)
    out = torch.cat([mixer(part, state) for part in x.split(list(split), dim=1)], dim=1)
    assert rms_error(out, reference(mixer, x)) < 1e-12
    # The state is what is needed and nothing more: the last inputs, and their values.
    last = x[:, 23 - (taps - 1) :]
    torch.testing.assert_close(state.conv_BTC, last)
    torch.testing.assert_close(state.values_BTC, last @ mixer.v_proj.weight.T)
    assert state.length == 23


@DIRECTIONS
@torch.no_grad()
def test_taps_sum_to_one_and_reach_as_far_as_there_are(causal: bool) -> None:
    mixer, x = build(5, causal), make_x(15)
    same = x[:, 7:8].expand(-1, 15, -1)
    assert rms_error(mixer(same)[:, 4:-4], mixer.o_proj(mixer.v_proj(same))[:, 4:-4]) < 1e-12
    other = x.clone()
    other[:, 7] += 1.0
    changed_T = (mixer(other) - mixer(x)).abs().amax(dim=(0, 2)) > 1e-9
    reached = range(7, 12) if causal else range(5, 10)
    assert changed_T.nonzero().flatten().tolist() == list(reached)


@DIRECTIONS
@torch.no_grad()
def test_a_span_that_says_nothing_gives_the_mean_of_the_window(causal: bool) -> None:
    mixer, x = build(5, causal), make_x(15)
    mixer.dynconv_key.weight.zero_()
    v_BTC = F.pad(mixer.v_proj(x), (0, 0, *((4, 0) if causal else (2, 2))))
    mean_BTC = torch.stack([v_BTC[:, t : t + 5].mean(dim=1) for t in range(15)], dim=1)
    assert rms_error(mixer(x), mixer.o_proj(mean_BTC)) < 1e-12


@torch.no_grad()
def test_fewer_taps_and_heads_are_leading_slices() -> None:
    space = SearchSpace(
        "taps", 11, (16, 8), 4, 1, {"dynamic_conv": {"taps": (9, 3)}}, ((3, 3), (1, 1)), (8,)
    )
    supernet = Supernet(space, torch.Generator().manual_seed(0))
    layer = space.largest().layers[0]
    arch = space.arch(8, (replace(layer, num_heads=1, mixer_options=(("taps", 3),)),))
    own = supernet.extract(arch).blocks["layer0_mixer"].get_submodule("op")
    largest = supernet.extract(space.largest()).blocks["layer0_mixer"].get_submodule("op")
    assert isinstance(own, DynamicConv) and isinstance(largest, DynamicConv)
    assert largest.dynconv_kernel.shape == (3, 9, 12)
    assert torch.equal(own.dynconv_kernel, largest.dynconv_kernel[:1, :3, :4])
    assert torch.equal(own.dynconv_span, largest.dynconv_span[:8, :3])


def test_heads_are_equal_and_it_knows_the_order() -> None:
    layer = LayerArch("dynamic_conv", 4, 2, position="rope")
    assert (layer.num_kv_heads, layer.position) == (4, "nope")
    assert DynamicConv.knows_order(layer.all_options)
    # The span key reads the input too, so that no norm may be merged into the projections.
    assert build().input_linears() == []


def test_gradients_are_those_of_the_loops() -> None:
    generator = torch.Generator().manual_seed(3)
    for causal in (True, False):
        mixer, x = build(3, causal), make_x(6).requires_grad_()
        weight = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        ours = torch.autograd.grad((mixer(x) * weight).sum(), [x, mixer.dynconv_span])
        step = 1e-6 * torch.randn(x.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            ahead, behind = (reference(mixer, x + sign * step) for sign in (1, -1))
            slope = ((ahead - behind) / 2 * weight).sum()
        torch.testing.assert_close((ours[0] * step).sum(), slope, rtol=1e-5, atol=0)
        assert (ours[1].abs().amax(dim=0) > 0).all()
