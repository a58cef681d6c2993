"""Every shipped preset: it loads, trains, is cut, packed and saved; together they hold it all."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from searchspace import operator
from searchspace.arch import Arch
from searchspace.ends import example_inputs
from searchspace.errors import UserError
from searchspace.family import EMBEDDING_POSITIONS, KINDS, POOLINGS
from searchspace.ffn import FFNS
from searchspace.mixers import MIXERS
from searchspace.norms import NORMS, OF_CHECKPOINTS
from searchspace.positions import KINDS as POSITION_KINDS
from searchspace.positions import position_kind
from searchspace.precisions import PRECISIONS
from searchspace.space import SearchSpace
from searchspace.space.files import PRESETS, read_space
from searchspace.specs import ABSENT, PLACEMENTS
from searchspace.subnet import Subnet
from searchspace.supernet import Supernet

VOCAB, TOKENS = 61, 37
FACTS: dict[str, dict[str, Any]] = {
    "decoder": {},
    "encoder": {"kind": "encoder", "num_classes": 10, "max_tokens": 64, "pad_token": 0},
    "vit": {"kind": "vit", "num_classes": 10, "image_size": 8, "channels": 1},
}
NAMES = sorted(path.stem for path in PRESETS.glob("*.toml"))


@functools.cache
def load(name: str) -> SearchSpace:
    kind = read_space(name).get("family", {}).get("kind", "decoder")
    return SearchSpace.load(name, 0 if kind == "vit" else VOCAB, FACTS[kind])


@functools.lru_cache(maxsize=1)
def supernet_of(name: str) -> Supernet:
    supernet = Supernet(load(name), torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in supernet.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return supernet


def random_archs(name: str, num: int, seed: int) -> list[Arch]:
    space = load(name)
    rows = space.sample_genotypes(np.random.default_rng(seed), num)
    return [space.decode(row) for row in rows]


def make_inputs(arch: Arch) -> Tensor:
    return example_inputs(arch.ends, 2, TOKENS, torch.Generator().manual_seed(2))


def loss_of(network: Subnet) -> Tensor:
    logits = network(make_inputs(network.arch))
    targets = torch.arange(logits.shape[:-1].numel()) % logits.shape[-1]
    return F.cross_entropy(logits.flatten(0, -2), targets)


@pytest.mark.parametrize("name", NAMES)
class TestEveryPreset:
    def test_it_loads(self, name: str) -> None:
        space = load(name)
        assert space.name == name
        assert space.size() > 1
        assert len(space.sub_blocks()) < 1800
        for arch in (space.largest(), space.smallest()):
            assert space.decode(space.encode(arch)) == arch
            assert Subnet(arch).weight_bytes() > 0
        assert SearchSpace.from_dict(space.to_dict(), space.vocab_size) == space

    def test_it_also_loads_without_a_task(self, name: str) -> None:
        assert SearchSpace.load(name, VOCAB).family.kind == load(name).family.kind

    def test_one_step_of_training(self, name: str) -> None:
        space, supernet = load(name), supernet_of(name)
        for arch in (space.largest(), space.smallest(), *random_archs(name, 1, seed=3)):
            supernet.start_step()
            view = supernet.view(arch, train=True)
            loss = loss_of(view)
            loss.backward()
            supernet.publish_gradients()
            assert torch.isfinite(loss), arch.to_json()
            names = {parameter_name for parameter_name, _ in view.named_parameters()}
            for parameter_name, parameter in supernet.named_parameters():
                assert (parameter.grad is not None) == (parameter_name in names)
                if parameter.grad is not None:
                    assert torch.isfinite(parameter.grad).all(), (parameter_name, arch.to_json())

    @torch.no_grad()
    def test_cut_packed_saved_and_loaded(self, name: str, tmp_path: Path) -> None:
        supernet = supernet_of(name)
        for arch in random_archs(name, 5, seed=4):
            inputs, extracted = make_inputs(arch), supernet.extract(arch).eval()
            difference = (supernet.view(arch)(inputs) - extracted(inputs)).abs().max()
            assert difference <= 1e-5, arch.to_json()
            folder = tmp_path / arch.id
            extracted.pack().save(folder)
            loaded = Subnet.load(folder)
            assert loaded.arch == arch
            torch.testing.assert_close(loaded(inputs), extracted(inputs), rtol=0, atol=0)

    @torch.no_grad()
    def test_every_single_choice_runs(self, name: str) -> None:
        space, supernet = load(name), supernet_of(name)
        archs = space.one_change_from_largest()
        genes = {gene: len(choices) for gene, choices in space.layer_choices().items()}
        assert len(archs) >= max(genes["mixer"], genes["ffn"], len(space.d_model)) - 1
        for arch in archs:
            assert space.decode(space.encode(arch)) == arch
            inputs = make_inputs(arch)[:1]
            difference = supernet.view(arch)(inputs) - supernet.extract(arch)(inputs)
            assert difference.abs().max() <= 1e-5, arch.to_json()


class TestTogether:
    """What is registered can be chosen somewhere."""

    @functools.cached_property
    def layers(self) -> list[Any]:
        return [
            layer
            for name in NAMES
            for half in (load(name).mixer_half, load(name).ffn_half)
            for layer in half.layers
            if not layer.skip
        ]

    def test_operators(self) -> None:
        assert {layer.mixer for layer in self.layers} == {*MIXERS, ABSENT}
        assert {layer.ffn for layer in self.layers} == {*FFNS, ABSENT}
        assert {layer.norm for layer in self.layers} == set(NORMS) - set(OF_CHECKPOINTS)
        assert {layer.norm_placement for layer in self.layers} == set(PLACEMENTS)
        assert {layer.kv_shared for layer in self.layers} == {False, True}

    def test_mixers_of_decoders(self) -> None:
        there = {
            layer.mixer
            for name in NAMES
            for layer in load(name).mixer_half.layers
            if load(name).family.causal
        }
        assert there == {n for n in MIXERS if "causal" in MIXERS[n].directions} | {ABSENT}

    def test_precisions(self) -> None:
        assert {layer.mixer_precision for layer in self.layers} == set(PRECISIONS)
        assert {layer.ffn_precision for layer in self.layers} == set(PRECISIONS)

    def test_positions(self) -> None:
        names = {layer.position for layer in self.layers}
        assert {position_kind(name) for name in names} == set(POSITION_KINDS)
        assert any("_b" in name for name in names)
        assert any("_f" in name for name in names)

    @pytest.mark.parametrize(
        ("mixer", "option"),
        [
            (m, o)
            for m in MIXERS
            for o in MIXERS[m].option_choices
            if o not in operator.OF_CHECKPOINTS
        ],
    )
    def test_options(self, mixer: str, option: str) -> None:
        offered = {layer.all_options[option] for layer in self.layers if layer.mixer == mixer}
        assert offered == set(MIXERS[mixer].option_choices[option])

    @pytest.mark.parametrize(
        ("ffn", "option"),
        [(f, o) for f in FFNS for o in FFNS[f].option_choices if o not in operator.OF_CHECKPOINTS],
    )
    def test_ffn_options(self, ffn: str, option: str) -> None:
        offered = {layer.all_ffn_options[option] for layer in self.layers if layer.ffn == ffn}
        assert offered == set(FFNS[ffn].option_choices[option])

    def test_families(self) -> None:
        families = [load(name).family for name in NAMES]
        assert {family.kind for family in families} == set(KINDS)
        assert {f.pooling for f in families if f.kind != "decoder"} == set(POOLINGS)
        assert {family.embedding_position for family in families} == set(EMBEDDING_POSITIONS)
        assert any(f.embedding_size and f.embedding_norm != "none" for f in families)
        assert any(family.final_norm == "none" for family in families)


def test_a_preset_of_another_kind_is_refused() -> None:
    with pytest.raises(UserError, match="the task needs a vit, but space 'encoder-small' is of"):
        SearchSpace.load("encoder-small", VOCAB, FACTS["vit"])
