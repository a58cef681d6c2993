"""`head_dim = 0`: heads that split the residual stream among them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from searchspace.arch import Arch, LayerArch, width_of_head
from searchspace.cost import arch_cost, flops, num_params
from searchspace.errors import UserError
from searchspace.family import Family
from searchspace.importance import order_by_importance
from searchspace.mixers import MIXERS
from searchspace.space import SearchSpace
from searchspace.specs import MixerSpec
from searchspace.subnet import Subnet
from searchspace.supernet import Supernet

VOCAB, D_MODEL = 13, 16
ENCODER = Family("encoder", num_classes=3, embedding_position="learned", max_tokens=32)
TOKENS_BT = torch.arange(2 * 9).reshape(2, 9) % VOCAB


def layer_of(mixer: str = "softmax", num_heads: int = 4, **values: Any) -> LayerArch:
    return LayerArch(mixer, num_heads, num_heads, ffn="gelu", intermediate_size=24, **values)


def space_of(mixer: str, **changes: Any) -> SearchSpace:
    values: dict[str, Any] = {
        "name": "split",
        "vocab_size": VOCAB,
        "d_model": (D_MODEL, 8),
        "head_dim": 0,
        "num_layers": 3,
        "mixers": {mixer: {}} if mixer == "softmax" else {mixer: {}, "softmax": {}},
        "heads": ((4, 4), (4, 2), (2, 2), (2, 1), (1, 1)),
        "intermediate_size": (24, 9),
        "ffn": ("gelu",),
        "position": ("rope", "nope"),
        "family": Family(max_tokens=32) if "causal" in MIXERS[mixer].directions else ENCODER,
    }
    return SearchSpace(**{**values, **changes})


def test_every_layer_has_its_own_width_of_heads() -> None:
    arch = Arch(D_MODEL, 0, VOCAB, (layer_of(num_heads=4), layer_of(num_heads=2), layer_of("pool")))
    specs = [spec for _, spec in arch.named_sub_blocks() if isinstance(spec, MixerSpec)]
    assert [(spec.num_heads, spec.head_dim) for spec in specs] == [(4, 4), (2, 8), (0, 0)]
    assert Arch.from_json(arch.to_json()) == arch


@torch.no_grad()
def test_the_same_network_as_with_the_width_given() -> None:
    layers = (layer_of(position="rope"), layer_of("gla"))
    split, given = (Arch(D_MODEL, head_dim, VOCAB, layers) for head_dim in (0, 4))
    assert split.sub_blocks() == given.sub_blocks()
    networks = [Subnet(a).reset(torch.Generator().manual_seed(0)) for a in (split, given)]
    assert torch.equal(networks[0](TOKENS_BT), networks[1](TOKENS_BT))


def test_attention_costs_the_same_for_any_number_of_heads() -> None:
    archs = [Arch(D_MODEL, 0, VOCAB, (layer_of(num_heads=n),)) for n in (1, 2, 4, 8)]
    assert len({arch_cost(arch, num_params) for arch in archs}) == 1
    assert len({arch_cost(arch, lambda spec: flops(spec, 7)) for arch in archs}) == 1
    assert len({arch.id for arch in archs}) == 4


@pytest.mark.parametrize(
    ("d_model", "num_heads", "sentence"),
    [
        (16, 3, r"layers\[0\]: num_heads=3 does not split d_model=16 .* choose 1 or 2 or 4 or 8"),
        (16, 16, r"num_heads=16 does not split d_model=16 into heads of equal, even width"),
        (12, 4, r"num_heads=4 does not split d_model=12 .* choose 1 or 2 or 3 or 6 heads"),
        (15, 3, r"d_model=15 is odd, so head_dim=0 cannot split it; give head_dim"),
    ],
)
def test_heads_that_do_not_fit(d_model: int, num_heads: int, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        Arch(d_model, 0, VOCAB, (layer_of(num_heads=num_heads),))


def test_mixers_without_heads_need_none_that_fit() -> None:
    assert width_of_head(layer_of("pool"), 15, 0) == 0
    Arch(15, 0, VOCAB, (layer_of("pool"),))


def test_a_space_is_refused_where_one_width_does_not_fit() -> None:
    with pytest.raises(UserError, match="'split': num_heads=4 does not split d_model=12"):
        space_of("softmax", d_model=(16, 12))
    with pytest.raises(UserError, match="head_dim=-2 must be a whole number of at least 0"):
        space_of("softmax", head_dim=-2)


@torch.no_grad()
@pytest.mark.parametrize("mixer", MIXERS)
def test_shared_weights(mixer: str) -> None:
    space = space_of(mixer)
    supernet = Supernet(space, torch.Generator().manual_seed(0))
    two, one = (replace(layer_of(mixer, n), position="nope") for n in (2, 1))
    wide = space.largest().layers[0]
    archs = [space.largest(), space.smallest()]
    archs += [space.arch(16, (two, one, wide)), space.arch(8, (two, LayerArch(), one))]
    for arch in archs:
        assert space.decode(space.encode(arch)) == arch
        extracted = supernet.extract(arch).eval()
        difference = (supernet.view(arch)(TOKENS_BT) - extracted(TOKENS_BT)).abs().max().item()
        assert difference <= 1e-5, arch.to_json()
        for name, value in extracted.named_parameters():
            leading = supernet.params[name][tuple(slice(0, n) for n in value.shape)]
            assert torch.equal(value, leading), name
    width = supernet.params["blocks.layer0_mixer.op.q_proj.weight"].shape
    assert width[1] == D_MODEL


@torch.no_grad()
def test_projections_are_as_wide_as_the_stream_whatever_the_heads() -> None:
    space = space_of("softmax")
    supernet = Supernet(space, torch.Generator().manual_seed(0))
    for num_heads in (4, 2, 1):
        arch = space.uniform(d_model=8, heads=f"{num_heads}x{num_heads}")
        shape = supernet.view(arch).blocks["layer0_mixer"].op.q_proj.weight.shape
        assert shape == (8, 8)
    assert supernet.params["blocks.layer0_mixer.op.q_proj.weight"].shape == (16, 16)


class TestSharedKeys:
    def test_other_numbers_of_heads_have_other_keys(self) -> None:
        provider = LayerArch("softmax", 4, 2)
        reader = LayerArch("softmax", 2, 2, kv_shared=True)
        split, given = (Arch(16, head_dim, VOCAB, (provider, reader)) for head_dim in (0, 4))
        assert not split.layers[1].kv_shared  # its keys are 8 wide, the provider's 4
        assert given.layers[1].kv_shared
        same = Arch(16, 0, VOCAB, (provider, replace(provider, kv_shared=True)))
        assert same.layers[1].kv_shared
        network = Subnet(same).reset(torch.Generator().manual_seed(0))
        assert torch.isfinite(network(TOKENS_BT)).all()


def test_importance_ordering_keeps_the_largest_network() -> None:
    supernet = Supernet(space_of("softmax"), torch.Generator().manual_seed(0))
    largest = supernet.space.largest()
    before = supernet.view(largest)(TOKENS_BT)
    q_before = supernet.params["blocks.layer0_mixer.op.q_proj.weight"].clone()
    order_by_importance(supernet, [(TOKENS_BT, TOKENS_BT)], lambda logits, _: logits.square().sum())
    torch.testing.assert_close(supernet.view(largest)(TOKENS_BT), before)
    assert not torch.equal(q_before, supernet.params["blocks.layer0_mixer.op.q_proj.weight"])
