from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from searchspace.mixers import MIXERS
from searchspace.mixers.base import Mixer, SharedKV
from searchspace.specs import MixerSpec

BATCH, TOKENS, D_MODEL, HEADS = 3, 11, 16, 4
SPEC = MixerSpec(
    d_model=D_MODEL, mixer="softmax", num_heads=HEADS, num_kv_heads=2, head_dim=8, position="rope",
    precision="fp32", norm="rmsnorm", causal=True,
)  # fmt: skip
SOFTMAXES = ("softmax", "sliding_window", "strided", "fixed", "dilated", "diag_block", "linformer")


def options_of(name: str) -> list[dict[str, Any]]:
    """Options that lead through every way to compute a mixer's weights."""
    found: list[dict[str, Any]] = {
        "softmax": [
            {"qk": qk, "vo": vo}
            for qk, vo in itertools.product(
                ("separate", "symmetric", "collapsed"), ("separate", "identity")
            )
        ]
        + [{"similarity": "weighted"}],
        "sliding_window": [{"window": 3}, {"window": 3, "dilation": 2, "global_tokens": 1}],
        "diag_block": [{"block": 4}],
        "dilated": [{"segment": 4, "num_rates": 2}],
        "strided": [{"stride": 5}],
        "fixed": [{"stride": 5}],
        "linformer": [{"rank": 5}],
    }[name]
    return [{}, {"qkv_dconv": 3}, *found]


def build(name: str, options: dict[str, Any], position: str, causal: bool, **more: Any) -> Mixer:
    spec = replace(
        SPEC,
        mixer=name,
        options=tuple(options.items()),
        position=position,
        causal=causal,
        max_tokens=TOKENS + 2 if MIXERS[name].bounded else 0,
        **more,
    )
    mixer = MIXERS[name](spec).double()
    mixer.reset(torch.Generator().manual_seed(0), 1)
    return mixer


def draw_input() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(BATCH, TOKENS, D_MODEL, generator=generator, dtype=torch.float64)


def values_of(mixer: Any, x_BTD: Tensor) -> Tensor:
    if mixer.spec.mixer == "softmax":
        v: Tensor = mixer._project(x_BTD, None)[2]
        return v
    v = mixer.project_qkv(x_BTD)[2]
    return mixer.linformer_v[:, :TOKENS] @ v if mixer.spec.mixer == "linformer" else v


@pytest.mark.parametrize("position", ["nope", "rope", "alibi"])
@pytest.mark.parametrize("direction", ["causal", "bidirectional"])
@pytest.mark.parametrize("name", SOFTMAXES)
@torch.no_grad()
def test_weighted_values_are_what_the_mixer_returns(
    name: str, direction: str, position: str
) -> None:
    kind = MIXERS[name]
    if direction not in kind.directions or position not in kind.positions:
        pytest.skip(f"{name} has no {direction} form with {position}")
    x_BTD = draw_input()
    for options in options_of(name):
        mixer: Any = build(name, options, position, direction == "causal")
        probs_BHTS = mixer.attention_probs(x_BTD)
        ones = torch.ones(BATCH, HEADS, TOKENS, dtype=torch.float64)
        torch.testing.assert_close(probs_BHTS.sum(dim=-1), ones)
        assert (probs_BHTS >= 0).all()
        if getattr(mixer, "identity", False):
            out_BTD = probs_BHTS.mean(dim=1) @ x_BTD
        else:
            v = values_of(mixer, x_BTD)
            v_BHSK = v.repeat_interleave(HEADS // v.shape[1], dim=1)
            out_BTD = mixer.o_proj(mixer.merge_heads(probs_BHTS @ v_BHSK))
        torch.testing.assert_close(out_BTD, mixer(x_BTD), rtol=1e-9, atol=1e-12)


@torch.no_grad()
def test_shared_keys_are_those_of_the_provider() -> None:
    x_BTD, shared = draw_input(), SharedKV()
    provider, reader = (
        build("softmax", {}, "rope", True, kv_shared=kv_shared) for kv_shared in (False, True)
    )
    provider(x_BTD, None, shared)
    assert shared.v_BGSK is not None
    probs_BHTS = reader.attention_probs(2 * x_BTD, shared)
    out = probs_BHTS @ shared.v_BGSK.repeat_interleave(2, dim=1)
    expected = reader(2 * x_BTD, None, shared)
    torch.testing.assert_close(reader.o_proj(reader.merge_heads(out)), expected)


@pytest.mark.parametrize("name", MIXERS)
@torch.no_grad()
def test_there_exactly_where_a_softmax_over_keys_weighs_values(name: str) -> None:
    causal = "causal" in MIXERS[name].directions
    kv_heads = {"num_kv_heads": HEADS}
    mixer = build(name, {}, MIXERS[name].positions[0], causal, **kv_heads)
    assert (mixer.attention_probs(draw_input()) is not None) == (name in SOFTMAXES)
