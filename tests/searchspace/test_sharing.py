"""Keys and values shared between layers (cross-layer attention)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from searchspace.arch import Arch, LayerArch
from searchspace.errors import UserError
from searchspace.space import SearchSpace
from searchspace.subnet import Subnet, state_bytes
from searchspace.supernet import Supernet

TOKENS, VOCAB = 23, 17
SPACE = SearchSpace(
    name="shared",
    vocab_size=VOCAB,
    d_model=(16, 8),
    head_dim=4,
    num_layers=4,
    min_depth=1,
    mixers={"softmax": {"qk": ("separate", "symmetric", "collapsed")}, "gla": {}, "none": {}},
    heads=((4, 2), (2, 2), (2, 1)),
    intermediate_size=(12, 0),
    position=("rope", "alibi"),
    kv_shared=(False, True),
)
OWN = LayerArch("softmax", 4, 2, position="rope", ffn="swiglu", intermediate_size=12)
SHARES = replace(OWN, kv_shared=True)


def make_tokens(batch: int = 2) -> Tensor:
    return torch.randint(VOCAB, (batch, TOKENS), generator=torch.Generator().manual_seed(0))


def shared_of(*layers: LayerArch) -> list[bool]:
    return [layer.kv_shared for layer in Arch(16, 4, VOCAB, layers).layers]


@pytest.fixture(scope="module")
def supernet() -> Supernet:
    return Supernet(SPACE, torch.Generator().manual_seed(0))


class TestWhoShares:
    def test_nobody_before_the_first_provider(self) -> None:
        assert shared_of(SHARES, SHARES, OWN, SHARES) == [False, True, False, True]
        gla = LayerArch("gla", 4, 2)
        assert shared_of(gla, LayerArch(), SHARES, SHARES) == [False, False, False, True]

    @pytest.mark.parametrize(
        "change",
        [
            {"num_kv_heads": 1},
            {"position": "alibi"},
            {"mixer_options": {"vo": "identity"}},
            {"mixer_options": {"qkv_dconv": 3}},
        ],
    )
    def test_keys_must_be_of_the_same_kind(self, change: dict[str, Any]) -> None:
        assert shared_of(OWN, replace(SHARES, **change)) == [False, False]
        # The nearest provider counts, and what was refused provides from then on.
        assert shared_of(OWN, replace(OWN, **change), SHARES, SHARES) == [False, False, False, True]

    @pytest.mark.parametrize(
        "change",
        [
            {"num_heads": 2},
            {"mixer_precision": "int8"},
            {"norm": "layernorm"},
            {"intermediate_size": 0},
        ],
    )
    def test_queries_are_the_layer_s_own(self, change: dict[str, Any]) -> None:
        assert shared_of(OWN, replace(SHARES, **change)) == [False, True]

    def test_layers_between_do_not_matter(self) -> None:
        other = LayerArch("gla", 4, 2, kv_shared=True)
        nothing = LayerArch(ffn="gelu", intermediate_size=3, kv_shared=True)
        assert shared_of(OWN, other, LayerArch(), nothing, SHARES) == [False] * 4 + [True]

    @pytest.mark.parametrize("mixer", ["gla", "sliding_window", "none"])
    def test_mixers_that_cannot(self, mixer: str) -> None:
        layer = replace(OWN, mixer=mixer)
        assert replace(layer, kv_shared=True) == layer

    def test_symmetric_queries_are_keys(self) -> None:
        layer = replace(OWN, mixer_options={"qk": "symmetric"})
        assert replace(layer, kv_shared=True) == layer

    def test_dropped_sharing_does_not_show_in_the_id(self) -> None:
        first = Arch(16, 4, VOCAB, (SHARES, OWN))
        assert first == Arch(16, 4, VOCAB, (OWN, OWN))
        assert first.id == Arch(16, 4, VOCAB, (OWN, OWN)).id
        assert first.id != Arch(16, 4, VOCAB, (OWN, SHARES)).id

    def test_json(self) -> None:
        arch = Arch(16, 4, VOCAB, (OWN, SHARES, OWN, SHARES))
        assert Arch.from_json(arch.to_json()) == arch
        assert [layer.get("kv_shared") for layer in arch.to_dict()["layers"]] == [
            None, True, None, True,
        ]  # fmt: skip

    def test_a_word_is_no_choice(self) -> None:
        with pytest.raises(UserError, match="kv_shared='yes' must be true or false"):
            replace(OWN, kv_shared="yes")

    def test_a_space_needs_providers(self) -> None:
        with pytest.raises(UserError, match=r"kv_shared=\[true\] leaves no layer that makes"):
            replace(SPACE, kv_shared=(True,))


class TestClaFactor:
    @pytest.mark.parametrize(
        ("factor", "expected"),
        [
            (1, [False] * 4),
            (2, [False, True, False, True]),
            (3, [False, True, True, False]),
            (4, [False, True, True, True]),
        ],
    )
    def test_so_many_layers_use_one(self, factor: int, expected: list[bool]) -> None:
        arch = SPACE.uniform(cla_factor=factor)
        assert [layer.kv_shared for layer in arch.layers] == expected

    def test_skipped_slots_are_not_counted(self) -> None:
        arch = SPACE.uniform(depth=2, cla_factor=2)
        assert [layer.skip for layer in arch.layers] == [False, True, False, True]
        assert [layer.kv_shared for layer in arch.layers] == [False, False, True, False]

    def test_a_space_without_sharing_refuses(self) -> None:
        with pytest.raises(UserError, match="kv_shared=True is not in space 'shared'"):
            replace(SPACE, kv_shared=(False,)).uniform(cla_factor=2)

    def test_a_cache_of_half_the_size(self) -> None:
        sizes = [
            state_bytes(Subnet(SPACE.uniform(cla_factor=factor)).init_state(2, 64))
            for factor in (1, 2, 4)
        ]
        assert sizes[0] == 4 * 2 * 2 * 2 * 64 * 4 * 4  # layers, k and v, batch, heads, T, K, bytes
        assert sizes == [sizes[0], sizes[0] // 2, sizes[0] // 4]


def test_a_sharing_layer_has_no_key_and_value_maps(supernet: Supernet) -> None:
    network = supernet.extract(SPACE.uniform(cla_factor=2))
    for slot, there in ((0, set("qkvo")), (1, set("qo"))):
        names = {name[0] for name, _ in network.blocks[f"layer{slot}_mixer"].op.named_children()}
        assert names == there


@torch.no_grad()
def test_a_sharing_layer_attends_to_the_keys_of_the_provider(supernet: Supernet) -> None:
    # The same weights, with the provider's own k_proj and v_proj run on the provider's input.
    network = supernet.extract(SPACE.uniform(cla_factor=2, heads="4x2", position="rope")).double()
    blocks = network.blocks
    x = network.ends.embed(make_tokens())
    provider, sharer = blocks["layer0_mixer"], blocks["layer1_mixer"]
    normed = provider.norm(x)
    k, v = (provider.op.split_heads(p(normed)) for p in (provider.op.k_proj, provider.op.v_proj))
    k = provider.op.rotate(k, 0).repeat_interleave(2, dim=1)
    v = v.repeat_interleave(2, dim=1)
    x = blocks["layer0_ffn"](provider(x))
    q = sharer.op.rotate(sharer.op.split_heads(sharer.op.q_proj(sharer.norm(x))), 0)
    scores = (q @ k.transpose(-1, -2) / 2.0).masked_fill(
        torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1), -torch.inf
    )
    x = x + sharer.op.o_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    x = blocks["layer1_ffn"](x)
    two = replace(network.arch, layers=(*network.arch.layers[:2], LayerArch(), LayerArch()))
    short = Subnet(two).double()
    short.load_state_dict({name: network.state_dict()[name] for name in short.state_dict()})
    torch.testing.assert_close(short.features(make_tokens()), x)


@torch.no_grad()
def test_any_split_into_calls(supernet: Supernet) -> None:
    tokens = make_tokens()
    archs = [SPACE.uniform(cla_factor=factor) for factor in (2, 3, 4)]
    archs += [SPACE.uniform(cla_factor=2, position="alibi", **{"softmax.qk": "collapsed"})]
    archs += [
        Arch(16, 4, VOCAB, (OWN, LayerArch("gla", 4, 2), SHARES, replace(SHARES, num_heads=2)))
    ]
    for arch in archs:
        network = supernet.extract(arch)
        whole = network(tokens)
        for split in ([1] * TOKENS, [20, 1, 2], [7, 9, 7]):
            state = network.init_state(len(tokens), TOKENS)
            parts = [network(part, state) for part in tokens.split(split, dim=1)]
            torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_views_equal_their_extracted_networks(supernet: Supernet) -> None:
    rows = SPACE.sample_genotypes(np.random.default_rng(0), 1000)
    archs = [arch for arch in map(SPACE.decode, rows) if any(la.kv_shared for la in arch.layers)]
    assert len(archs) > 20
    for arch in archs[:40]:
        extracted = supernet.extract(arch)
        difference = (supernet.view(arch)(make_tokens()) - extracted(make_tokens())).abs().max()
        assert difference <= 1e-5, arch.to_json()


def test_gradients_of_keys_come_from_every_layer_that_uses_them(supernet: Supernet) -> None:
    name = "blocks.layer0_mixer.op.k_proj.weight"
    grads = []
    for factor in (2, 1):
        supernet.start_step()
        supernet.view(SPACE.uniform(cla_factor=factor), train=True)(make_tokens()).sum().backward()
        supernet.publish_gradients()
        grad = supernet.params[name].grad
        assert grad is not None
        grads.append(grad.clone())
        other = supernet.params["blocks.layer1_mixer.op.k_proj.weight"].grad
        assert (other is None) == (factor == 2)
    assert not torch.allclose(*grads)


@torch.no_grad()
def test_an_encoder_shares_too() -> None:
    family = {"kind": "encoder", "num_classes": 3}
    space = SearchSpace.from_dict({**SPACE.to_dict(), "family": family}, VOCAB, family)
    supernet = Supernet(space, torch.Generator().manual_seed(0))
    arch = space.uniform(cla_factor=2)
    logits = supernet.view(arch)(make_tokens())
    torch.testing.assert_close(supernet.extract(arch)(make_tokens()), logits)
    assert not torch.allclose(supernet.view(space.uniform())(make_tokens()), logits)
