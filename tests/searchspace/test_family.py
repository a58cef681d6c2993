"""Decoders, encoders and ViTs as whole networks, and what may stand in which."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from searchspace.arch import Arch, LayerArch
from searchspace.ends import example_inputs
from searchspace.errors import UserError
from searchspace.family import DECODER, Family
from searchspace.mixers import MIXERS
from searchspace.space import SearchSpace
from searchspace.specs import EndsSpec
from searchspace.subnet import Subnet
from searchspace.supernet import Supernet

VOCAB = 13
SOFTMAX = LayerArch("softmax", 2, 2, position="rope", ffn="swiglu", intermediate_size=12)
FAMILIES = {
    "decoder": DECODER,
    "decoder, learned": Family(embedding_position="learned", max_tokens=16),
    "encoder": Family("encoder", num_classes=5, pad_token=0),
    "encoder, class token": Family("encoder", num_classes=5, pooling="class_token"),
    "encoder, learned": Family(
        "encoder", num_classes=5, embedding_position="learned", max_tokens=16
    ),
    "vit": Family("vit", num_classes=5, image_size=8, channels=3, patch_size=2),
    "vit, class token": Family(
        "vit",
        num_classes=5,
        image_size=9,
        channels=1,
        patch_size=3,
        pooling="class_token",
        embedding_position="learned",
        final_norm="layernorm",
    ),
}


def make_arch(family: Family, *layers: LayerArch) -> Arch:
    return Arch(8, 4, 0 if family.kind == "vit" else VOCAB, layers or (SOFTMAX, SOFTMAX), family)


def make_network(arch: Arch) -> Subnet:
    return Subnet(arch).reset(torch.Generator().manual_seed(0)).eval()


def make_inputs(arch: Arch, batch: int = 3, tokens: int = 11) -> Tensor:
    return example_inputs(arch.ends, batch, tokens, torch.Generator().manual_seed(1))


class TestForward:
    @pytest.mark.parametrize("name", FAMILIES)
    def test_shapes(self, name: str) -> None:
        family = FAMILIES[name]
        network = make_network(arch := make_arch(family))
        inputs = make_inputs(arch)
        expected = (3, 11, VOCAB) if family.kind == "decoder" else (3, 5)
        assert network(inputs).shape == expected
        assert network(inputs[:1]).shape == (1, *expected[1:])
        tokens = {"vit": (family.max_tokens)}.get(family.kind, 11) + family.num_extra_tokens
        assert network.features(inputs).shape == (3, tokens, 8)

    @pytest.mark.parametrize("name", FAMILIES)
    def test_gradients_reach_everything(self, name: str) -> None:
        network = make_network(arch := make_arch(FAMILIES[name]))
        network(make_inputs(arch)).square().sum().backward()
        for parameter_name, parameter in network.named_parameters():
            assert parameter.grad is not None, parameter_name
            assert (parameter.grad != 0).any(), parameter_name

    @torch.no_grad()
    @pytest.mark.parametrize("name", FAMILIES)
    def test_an_image_or_text_does_not_see_its_neighbour(self, name: str) -> None:
        network = make_network(arch := make_arch(FAMILIES[name]))
        inputs = make_inputs(arch)
        torch.testing.assert_close(network(inputs)[1:2], network(inputs[1:2]))

    @torch.no_grad()
    def test_only_decoders_are_causal(self) -> None:
        for kind in ("decoder", "encoder"):
            network = make_network(arch := make_arch(FAMILIES[kind]))
            tokens = make_inputs(arch)
            changed = tokens.clone()
            changed[:, -1] = (changed[:, -1] + 1) % VOCAB
            first, second = network.features(tokens), network.features(changed)
            assert torch.allclose(first[:, :-1], second[:, :-1]) == (kind == "decoder")

    @torch.no_grad()
    @pytest.mark.parametrize("name", FAMILIES)
    def test_views_equal_their_extracted_networks(self, name: str) -> None:
        space = make_space(FAMILIES[name])
        supernet = Supernet(space, torch.Generator().manual_seed(0))
        for arch in (space.largest(), space.smallest(), space.uniform(mixer="flow", depth=2)):
            inputs = make_inputs(arch)
            torch.testing.assert_close(supernet.view(arch)(inputs), supernet.extract(arch)(inputs))

    @torch.no_grad()
    @pytest.mark.parametrize("name", FAMILIES)
    def test_saved_and_loaded(self, name: str, tmp_path: Any) -> None:
        network = make_network(arch := make_arch(FAMILIES[name])).pack()
        network.save(tmp_path)
        loaded = Subnet.load(tmp_path)
        assert loaded.arch == arch
        assert torch.equal(loaded(make_inputs(arch)), network(make_inputs(arch)))


def make_space(family: Family) -> SearchSpace:
    return SearchSpace(
        name="families",
        vocab_size=0 if family.kind == "vit" else VOCAB,
        d_model=(8, 4),
        head_dim=4,
        num_layers=2,
        mixers={"softmax": {}, "aft_full": {"rank": (4,)}, "flow": {}, "none": {}}
        if family.embedding_position == "learned" or family.causal
        else {"softmax": {}, "retention": {}, "flow": {"qkv_dconv": (3,)}, "none": {}},
        heads=((2, 2), (2, 1)),
        intermediate_size=(12, 0),
        family=family,
    )


class TestDecoding:
    @torch.no_grad()
    @pytest.mark.parametrize("name", ["decoder", "decoder, learned"])
    def test_any_split_into_calls(self, name: str) -> None:
        network = make_network(arch := make_arch(FAMILIES[name]))
        tokens = make_inputs(arch, tokens=16)
        for split in ([1] * 16, [9, 1, 6], [15, 1]):
            state = network.init_state(3, 16)
            parts = [network(part, state) for part in tokens.split(split, dim=1)]
            torch.testing.assert_close(torch.cat(parts, dim=1), network(tokens))

    def test_beyond_the_learned_positions(self) -> None:
        network = make_network(arch := make_arch(FAMILIES["decoder, learned"]))
        with pytest.raises(UserError, match=r"17 tokens were given.*learned.*max_tokens=16; give"):
            network(make_inputs(arch, tokens=17))
        state = network.init_state(3, 32)
        network(make_inputs(arch, tokens=16), state)
        with pytest.raises(UserError, match="17 tokens were given"):
            network(make_inputs(arch, tokens=1), state)


class TestWhatMayStandWhere:
    def test_nope_in_a_bidirectional_network(self) -> None:
        nope = replace(SOFTMAX, position="nope")
        sentence = (
            r"layers\[1\]: mixer='softmax' with position='nope' in a bidirectional encoder: .*"
            r"nothing tells it the order of tokens; choose rope or alibi .*'learned'"
        )
        with pytest.raises(UserError, match=sentence):
            make_arch(FAMILIES["encoder"], SOFTMAX, nope)
        make_arch(FAMILIES["encoder, learned"], SOFTMAX, nope)
        make_arch(FAMILIES["vit, class token"], nope)
        make_arch(DECODER, nope)

    @pytest.mark.parametrize("mixer", [name for name in MIXERS if not MIXERS[name].ordered])
    def test_mixers_blind_to_order(self, mixer: str) -> None:
        if "bidirectional" not in MIXERS[mixer].directions:
            return
        layer = LayerArch(mixer, 2, 2, position="nope")
        if MIXERS[mixer].knows_order(layer.all_options):
            make_arch(FAMILIES["encoder"], layer)
            return
        with pytest.raises(UserError, match="nothing tells it the order"):
            make_arch(FAMILIES["encoder"], layer)

    def test_convolutions_tell_the_order(self) -> None:
        layer = LayerArch("linear_elu", 2, 2, mixer_options={"qkv_dconv": 3})
        make_arch(FAMILIES["encoder"], layer)

    def test_a_space_is_refused_as_a_whole(self) -> None:
        space, mixers = make_space(FAMILIES["encoder"]), {"softmax": {}, "latte": {}}
        with pytest.raises(UserError, match="space 'families': mixer='latte' with position='nope'"):
            replace(space, mixers=mixers)
        with pytest.raises(UserError, match="'families': mixer='fourier' has no causal form"):
            replace(make_space(DECODER), mixers={"softmax": {}, "fourier": {}})

    @pytest.mark.parametrize(
        "mixer", [name for name in MIXERS if "causal" not in MIXERS[name].directions]
    )
    def test_bidirectional_mixers_in_a_decoder(self, mixer: str) -> None:
        sentence = (
            rf"layers\[0\]: mixer='{mixer}' has no causal form, which a decoder needs; choose"
        )
        with pytest.raises(UserError, match=sentence):
            make_arch(DECODER, LayerArch(mixer, 2, 2))
        make_arch(FAMILIES["encoder, learned"], LayerArch(mixer, 2, 2))

    def test_causal_mixers_in_an_encoder(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(MIXERS["gla"], "directions", ("causal",))
        sentence = (
            r"mixer='gla' has no bidirectional form, which a vit needs; choose one of softmax"
        )
        with pytest.raises(UserError, match=sentence):
            make_arch(FAMILIES["vit"], LayerArch("gla", 2, 2))


class TestIdentity:
    @pytest.mark.parametrize("name", FAMILIES)
    def test_json_round_trip(self, name: str) -> None:
        family = FAMILIES[name]
        assert Family.from_dict(family.to_dict()) == family
        arch = make_arch(family)
        assert Arch.from_json(arch.to_json()) == arch
        assert Arch.from_json(arch.to_json()).id == arch.id
        assert hash(Arch.from_json(arch.to_json())) == hash(arch)

    def test_ids_and_keys_differ(self) -> None:
        archs = [make_arch(family) for family in FAMILIES.values()]
        assert len({arch.id for arch in archs}) == len(archs)
        assert len({arch.ends.key for arch in archs}) == len(archs)

    def test_a_plain_decoder_does_not_show(self) -> None:
        assert "family" not in make_arch(DECODER).to_dict()
        assert EndsSpec(8, VOCAB).key == "ends/d8/v13"

    @pytest.mark.parametrize(
        ("values", "sentence"),
        [
            ({"kind": "encodr"}, "unknown family kind 'encodr': did you mean 'encoder'"),
            ({"pooling": "max"}, "unknown family pooling 'max'"),
            ({"embedding_position": "sine"}, "unknown family embedding_position 'sine'"),
            ({"final_norm": "rms"}, "unknown family final_norm 'rms': did you mean 'rmsnorm'"),
            ({"kind": "encoder"}, "num_classes=0; encoder networks need at least 2"),
            ({"num_classes": "3"}, "num_classes='3' must be a whole number of at least 0"),
            ({"max_tokens": 0}, "max_tokens=0; give the longest sequence"),
            (
                {"kind": "vit", "num_classes": 2, "image_size": 8, "patch_size": 3},
                "patch_size=3 does not divide image_size=8; choose one of 1, 2, 4, 8",
            ),
            (
                {"kind": "vit", "num_classes": 2, "image_size": 8, "patch_size": 4},
                "channels=0; an image has 1",
            ),
            ({"clases": 3}, "unknown family field 'clases'"),
        ],
    )
    def test_mistakes(self, values: dict[str, Any], sentence: str) -> None:
        with pytest.raises(UserError, match=sentence):
            Family.from_dict(values)

    def test_a_vit_has_as_many_tokens_as_patches(self) -> None:
        assert FAMILIES["vit"].max_tokens == 16
        assert FAMILIES["vit"].sequence_tokens == 16
        assert FAMILIES["vit, class token"].max_tokens == 9
        assert FAMILIES["vit, class token"].sequence_tokens == 10
