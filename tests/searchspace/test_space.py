from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from searchspace.arch import Arch, LayerArch
from searchspace.cost import CostTable, arch_cost, flops, num_params, reachable_specs, weight_bytes
from searchspace.errors import UserError
from searchspace.family import Family
from searchspace.space import SearchSpace
from searchspace.specs import EndsSpec, FFNSpec, MixerSpec
from searchspace.subnet import Subnet

SMALL = SearchSpace.load("decoder-small", 1024)
TINY = SearchSpace.load("decoder-tiny", 50)
# Every way in which choices can be without effect, in a space that can be listed.
LISTED = SearchSpace(
    name="listed",
    vocab_size=7,
    d_model=(16, 8),
    head_dim=4,
    num_layers=2,
    min_depth=1,
    mixers={"softmax": {}, "sliding_window": {"window": (4, 2)}, "gla": {}, "none": {}},
    heads=((2, 2), (2, 1)),
    intermediate_size=(8, 0),
    position=("rope", "nope"),
    ffn=("relu2", "swiglu"),
)


def with_changes(**changes: Any) -> SearchSpace:
    return replace(LISTED, **changes)


SPACES = {
    "listed": LISTED,
    "no skipping": with_changes(min_depth=2),
    "one layer": with_changes(num_layers=1),
    "no mixer-less layers": with_changes(mixers={"softmax": {}, "linear_elu": {}}),
    "only linear": with_changes(mixers={"linear_elu": {}}),
    "always an FFN": with_changes(intermediate_size=(8, 4)),
    "never an FFN": with_changes(intermediate_size=(0,)),
    "only nope": with_changes(position=("nope",)),
    "rope without choice": with_changes(position=("rope",)),
    "nope first": with_changes(position=("nope", "rope")),
    "default window": with_changes(mixers={"sliding_window": {}, "none": {}}),
    "two norms": with_changes(
        norm=("layernorm", "rmsnorm"), mixers={"softmax": {}, "none": {}}, num_layers=1
    ),
    "two precisions": with_changes(
        mixer_precision=("fp32", "int8"), ffn_precision=("int8", "fp32"), num_layers=1
    ),
    "one arch": with_changes(
        d_model=(8,), num_layers=1, mixers={"gla": {}}, heads=((2, 1),), intermediate_size=(0,)
    ),
}


ONE_KIND: dict[str, Any] = {
    "d_model": (8,),
    "intermediate_size": (8,),
    "ffn": ("relu2",),
    "position": ("rope",),
    "heads": ((2, 2), (2, 1)),
    "mixers": {"softmax": {}},
}
ENCODER = Family("encoder", num_classes=3, embedding_position="learned", max_tokens=9)
LISTABLE = {
    "shared": with_changes(**ONE_KIND, num_layers=3, kv_shared=(False, True)),
    "shared first": with_changes(**ONE_KIND, num_layers=3, kv_shared=(True, False)),
    "shared, never skipped": with_changes(
        **ONE_KIND, num_layers=4, min_depth=4, kv_shared=(False, True)
    ),
    "shared, many kinds": with_changes(
        **{**ONE_KIND, "heads": ((2, 2),), "intermediate_size": (8, 0)},
        num_layers=2,
        kv_shared=(False, True),
    ),
    "shared among others": with_changes(
        **{**ONE_KIND, "mixers": {"softmax": {}, "gla": {}, "none": {}}, "heads": ((2, 1),)},
        num_layers=3,
        kv_shared=(False, True),
    ),
    "shared, all options": with_changes(
        **{
            **ONE_KIND,
            "mixers": {
                "softmax": {
                    "qk": ("separate", "collapsed", "symmetric"),
                    "vo": ("separate", "identity"),
                }
            },
        },
        num_layers=2,
        kv_shared=(False, True),
    ),
    "options without effect": with_changes(
        mixers={
            "softmax": {
                "qkv_dconv": (3, 0),
                "qk": ("collapsed", "separate"),
                "vo": ("separate", "identity"),
            },
            "gla": {"qkv_dconv": (0, 2)},
        },
        num_layers=1,
    ),
    "an option that is dropped": with_changes(
        mixers={"softmax": {"qkv_dconv": (3,), "qk": ("collapsed", "separate")}}, num_layers=1
    ),
    "equal heads": with_changes(
        mixers={"mamba": {"d_state": (4, 8)}, "softmax": {}, "mingru": {}},
        heads=((4, 1), (4, 4), (2, 2), (4, 2)),
        num_layers=1,
    ),
    "no heads": with_changes(
        mixers={"pool": {"window": (5, 3)}, "gla": {}, "none": {}},
        mixer_precision=("int8", "fp32"),
        ffn_precision=("fp32",),
        d_model=(8,),
        num_layers=1,
    ),
    "positions": with_changes(
        mixers={"softmax": {}, "linear_elu": {}, "gla": {}, "retention": {}},
        position=("alibi", "rope_b500", "rope_f50", "rope", "nope"),
        d_model=(8,),
        num_layers=1,
    ),
    "placements": with_changes(
        mixers={"softmax": {}, "none": {}},
        norm=("rmsnorm", "layernorm"),
        norm_placement=("post", "pre", "peri"),
        position=("rope",),
        num_layers=1,
    ),
    "placements of two layers": with_changes(
        **{**ONE_KIND, "mixers": {"softmax": {}, "none": {}}, "intermediate_size": (8, 0)},
        norm_placement=("pre", "peri"),
    ),
    "encoder": with_changes(
        mixers={"fourier": {}, "linformer": {"rank": (4, 2)}, "softmax": {}, "none": {}},
        family=ENCODER,
        num_layers=1,
    ),
    "vit": with_changes(
        mixers={"softmax": {}, "pool": {}},
        family=Family("vit", num_classes=3, image_size=4, channels=1, patch_size=2),
        position=("rope", "alibi"),
        num_layers=1,
    ),
    "heads that split the width": with_changes(
        **{**ONE_KIND, "mixers": {"softmax": {}, "pool": {}}, "d_model": (16, 8)},
        head_dim=0,
        num_layers=1,
    ),
    "shared, heads that split the width": with_changes(
        **{**ONE_KIND, "heads": ((2, 2), (4, 2), (4, 4))},
        head_dim=0,
        num_layers=3,
        kv_shared=(False, True),
    ),
    "FFN options": with_changes(
        mixers={"softmax": {}, "none": {}},
        position=("rope",),
        ffn=("gelu_stack", "relu2"),
        ffn_options={"gelu_stack": {"num_inner": (2, 0), "inner_size": (6, 4)}},
        num_layers=1,
    ),
    "FFN options without effect": with_changes(
        **{**ONE_KIND, "ffn": ("relu2", "gelu_stack")},
        ffn_options={"gelu_stack": {"inner_size": (6, 4)}},
        ffn_precision=("fp32", "int8"),
        num_layers=2,
    ),
    "nothing first": with_changes(
        mixers={"none": {}, "softmax": {}}, intermediate_size=(8, 0), num_layers=1
    ),
}
SPACES |= LISTABLE


def all_genotypes(space: SearchSpace) -> np.ndarray:
    ranges = [range(len(choices)) for choices in space.genes.values()]
    return np.array(list(itertools.product(*ranges)), dtype=np.int64).reshape(-1, len(ranges))


def genotypes_of(space: SearchSpace) -> st.SearchStrategy[list[int]]:
    return st.tuples(*(st.integers(0, len(c) - 1) for c in space.genes.values())).map(list)


class TestGenotypes:
    @pytest.mark.parametrize("name", SPACES)
    def test_size_counts_every_arch_once(self, name: str) -> None:
        space = SPACES[name]
        rows = np.unique(space.canonical(all_genotypes(space)), axis=0)
        assert space.size() == len(rows)
        # One canonical row per function: no two rows of one id.
        some = np.random.default_rng(0).permutation(rows)[:300]
        assert len({space.decode(row).id for row in some}) == len(some)

    @pytest.mark.parametrize("name", LISTABLE)
    def test_size_is_the_number_of_ids_of_all_genotypes(self, name: str) -> None:
        space, rows = SPACES[name], all_genotypes(SPACES[name])
        assert len(rows) <= 4096
        assert space.size() == len({space.decode(row).id for row in rows}) > 1

    @pytest.mark.parametrize("name", SPACES)
    def test_encode_gives_the_canonical_row_back(self, name: str) -> None:
        space = SPACES[name]
        rows = np.unique(space.canonical(all_genotypes(space)), axis=0)
        picked = rows[np.random.default_rng(0).integers(len(rows), size=60)]
        np.testing.assert_array_equal([space.encode(space.decode(row)) for row in picked], picked)

    @settings(max_examples=150, deadline=None)
    @given(row=genotypes_of(SMALL))
    def test_round_trip_of_any_genotype(self, row: list[int]) -> None:
        arch = SMALL.decode(row)
        canonical = SMALL.canonical(np.array([row]))[0]
        np.testing.assert_array_equal(SMALL.encode(arch), canonical)
        assert SMALL.decode(canonical) == arch
        assert SMALL.min_depth <= arch.depth <= SMALL.num_layers
        assert Arch.from_json(arch.to_json()).id == arch.id

    @pytest.mark.parametrize("name", LISTABLE)
    @settings(max_examples=30, deadline=None)
    @given(data=st.data())
    def test_every_kind_of_space_goes_there_and_back(self, name: str, data: st.DataObject) -> None:
        space = SPACES[name]
        row = data.draw(genotypes_of(space))
        arch, canonical = space.decode(row), space.canonical(np.array([row]))
        np.testing.assert_array_equal(space.canonical(canonical), canonical)
        np.testing.assert_array_equal(space.encode(arch), canonical[0])
        assert space.decode(canonical[0]) == arch
        assert Arch.from_json(arch.to_json()) == arch

    @settings(max_examples=100, deadline=None)
    @given(rows=st.lists(genotypes_of(SMALL), min_size=1, max_size=8))
    def test_canonical_is_idempotent_and_leaves_its_input(self, rows: list[list[int]]) -> None:
        given_rows = np.array(rows)
        once = SMALL.canonical(given_rows)
        np.testing.assert_array_equal(SMALL.canonical(once), once)
        np.testing.assert_array_equal(given_rows, np.array(rows))

    @settings(max_examples=150, deadline=None)
    @given(row=genotypes_of(LISTED), other=genotypes_of(LISTED))
    def test_same_arch_if_and_only_if_same_row(self, row: list[int], other: list[int]) -> None:
        first, second = LISTED.canonical(np.array([row, other]))
        same = LISTED.decode(row).id == LISTED.decode(other).id
        assert same == bool((first == second).all())

    def test_canonical_switches_on_enough_layers(self) -> None:
        space = with_changes(num_layers=3, min_depth=2)
        for row in space.sample_genotypes(np.random.default_rng(0), 50):
            assert space.decode(row).depth >= 2
        nothing = {f"layers.{slot}.skip": True for slot in range(3)}
        assert space.decode(space.to_genotypes([nothing])[0]).depth == 2

    def test_params_round_trip(self) -> None:
        rows = SMALL.sample_genotypes(np.random.default_rng(0), 30)
        np.testing.assert_array_equal(SMALL.to_genotypes(SMALL.to_params(rows)), rows)

    @pytest.mark.parametrize("bad", [[0], [99] * len(LISTED.genes), [-1] * len(LISTED.genes)])
    def test_wrong_genotypes(self, bad: list[int]) -> None:
        with pytest.raises(UserError, match="a genotype of space 'listed' has 15 indices"):
            LISTED.decode(bad)

    def test_preset_is_as_large_as_promised(self) -> None:
        assert SMALL.size() > 10**20
        assert SMALL.with_vocabulary(5).vocab_size == 5
        assert SMALL.with_vocabulary(5).size() == SMALL.size()


class TestEncodeRefuses:
    LAYER = LISTED.largest().layers[0]

    @pytest.mark.parametrize(
        ("change", "sentence"),
        [
            ({"d_model": 12}, "d_model=12 is not in space 'listed'; choose one of 16, 8"),
            ({"head_dim": 8}, "head_dim=8, all of space 'listed' have 4"),
            ({"vocab_size": 8}, "vocab_size=8, all of space 'listed' have 7"),
            ({"layers": (LAYER,)}, "layer slots=1, all of space 'listed' have 2"),
            ({"layers": (LayerArch(), LayerArch())}, "depth 0, below min_depth=1"),
        ],
    )
    def test_arch(self, change: dict[str, Any], sentence: str) -> None:
        with pytest.raises(UserError, match=sentence):
            LISTED.encode(replace(LISTED.largest(), **change))

    @pytest.mark.parametrize(
        ("change", "sentence"),
        [
            ({"mixer": "linear_elu"}, "layers.1.mixer='linear_elu' is not in space"),
            ({"num_heads": 4}, "layers.1.heads='4x2' is not in space 'listed'; choose one of 2x2"),
            ({"intermediate_size": 9}, "layers.1.intermediate_size=9 is not in"),
            ({"ffn": "gelu"}, "layers.1.ffn='gelu' is not in"),
            ({"norm": "layernorm"}, "layers.1.norm='layernorm' is not in"),
            ({"mixer_precision": "int8"}, "layers.1.mixer_precision='int8' is not in"),
            (
                {"mixer": "sliding_window", "mixer_options": {"window": 3}},
                "layers.1.sliding_window.window=3 is not in space 'listed'; choose one of 4, 2",
            ),
        ],
    )
    def test_layer(self, change: dict[str, Any], sentence: str) -> None:
        arch = replace(LISTED.largest(), layers=(self.LAYER, replace(self.LAYER, **change)))
        with pytest.raises(UserError, match=sentence):
            LISTED.encode(arch)

    def test_what_no_gene_stands_for(self) -> None:
        space = SPACES["rope without choice"]
        nope = replace(space.largest().layers[0], position="nope")
        with pytest.raises(
            UserError, match=r"layers.1.position='nope' is not in space .* one of rope"
        ):
            space.encode(replace(space.largest(), layers=(space.largest().layers[0], nope)))


class TestDrawing:
    def test_same_seed_same_archs(self) -> None:
        first, again = (SMALL.sample_genotypes(np.random.default_rng(3), 20) for _ in range(2))
        np.testing.assert_array_equal(first, again)
        assert SMALL.sample(np.random.default_rng(3)) == SMALL.decode(
            SMALL.sample_genotypes(np.random.default_rng(3), 1)[0]
        )

    def test_samples_are_canonical_and_spread_over_depths(self) -> None:
        rows = SMALL.sample_genotypes(np.random.default_rng(0), 600)
        np.testing.assert_array_equal(SMALL.canonical(rows), rows)
        depths = [SMALL.decode(row).depth for row in rows]
        counts = np.bincount(depths, minlength=7)[1:]
        # Drawing every slot on its own would leave the extremes to one arch in sixty-four.
        assert counts.min() > 600 * 0.06
        assert {SMALL.decode(row).d_model for row in rows} == set(SMALL.d_model)

    def test_random_of_size_is_near(self) -> None:
        rng = np.random.default_rng(0)
        for target in (300_000, 1_000_000):
            arch = SMALL.random_of_size(rng, target)
            assert abs(arch_cost(arch, num_params) / target - 1) < 0.05

    @settings(max_examples=40, deadline=None)
    @given(seed=st.integers(0, 1000), rate=st.sampled_from([0.0, 0.1, 1.0]))
    def test_mutants_and_children_are_archs_of_the_space(self, seed: int, rate: float) -> None:
        rng = np.random.default_rng(seed)
        first, second = SMALL.sample(rng), SMALL.sample(rng)
        SMALL.encode(SMALL.mutate(first, rng, rate))
        child = SMALL.crossover(first, second, rng)
        assert child.d_model in (first.d_model, second.d_model)
        if child.depth > 1:
            for slot, layer in enumerate(child.layers):
                assert layer in (first.layers[slot], second.layers[slot])

    def test_mutation_changes_few_genes(self) -> None:
        rng, arch = np.random.default_rng(0), SMALL.largest()
        changed = [
            (SMALL.encode(SMALL.mutate(arch, rng, 0.0)) != SMALL.encode(arch)).sum()
            for _ in range(50)
        ]
        assert max(changed) > 0
        # One gene redrawn; skipping a layer clears all of its genes.
        assert np.median(changed) <= 1


class TestNamedArchs:
    def test_extremes(self) -> None:
        largest, smallest = SMALL.largest(), SMALL.smallest()
        assert (largest.d_model, largest.depth) == (192, 6)
        assert (smallest.d_model, smallest.depth) == (64, 1)
        # Both are archs of the space, with the default operators.
        for arch in (largest, smallest):
            assert SMALL.decode(SMALL.encode(arch)) == arch
            assert {layer.mixer for layer in arch.layers if not layer.skip} == {"softmax"}
        sizes = CostTable(SMALL, num_params).of(
            SMALL.sample_genotypes(np.random.default_rng(0), 300)
        )
        assert arch_cost(smallest, num_params) < np.quantile(sizes, 0.1)
        assert arch_cost(largest, num_params) > np.quantile(sizes, 0.9)

    def test_uniform_spreads_its_layers(self) -> None:
        arch = SMALL.uniform(depth=3, d_model=64, mixer="gla", heads="3x1")
        assert [layer.skip for layer in arch.layers] == [False, True] * 3
        assert {layer.mixer for layer in arch.layers if not layer.skip} == {"gla"}
        for depth in range(1, 7):
            assert SMALL.uniform(depth=depth).depth == depth

    @pytest.mark.parametrize(
        ("choices", "sentence"),
        [
            ({"depth": 7}, "depth=7 is not in space 'decoder-small'; choose 1 to 6"),
            ({"depth": 0}, "depth=0 is not in"),
            ({"mixr": "gla"}, "unknown gene 'mixr': did you mean 'mixer'"),
            ({"heads": "5x5"}, "heads='5x5' is not in"),
            ({"d_model": 100}, "d_model=100 is not in"),
        ],
    )
    def test_uniform_refuses(self, choices: dict[str, Any], sentence: str) -> None:
        with pytest.raises(UserError, match=sentence):
            SMALL.uniform(**choices)


class TestDeclaring:
    @pytest.mark.parametrize(
        ("changes", "sentence"),
        [
            ({"d_model": ()}, "d_model has no choices"),
            ({"d_model": (8, 8)}, "d_model lists a choice twice"),
            ({"min_depth": 3}, "min_depth=3 must lie between 1 and num_layers=2"),
            ({"min_depth": 0}, "min_depth=0 must lie between"),
            ({"mixers": {"softmx": {}}}, "did you mean 'softmax'"),
            (
                {"mixers": {"softmax": {"window": (3,)}}},
                "unknown option of mixer 'softmax' 'window'",
            ),
            ({"mixers": {"sliding_window": {"window": (4, 0)}}}, "window=0 must be a whole"),
            ({"heads": ((4, 3),)}, "num_kv_heads=3 does not divide num_heads=4"),
            ({"position": ("rop",)}, "did you mean 'rope'"),
            ({"norm": ("rms",)}, "did you mean 'rmsnorm'"),
            ({"ffn": ("relu22",)}, "did you mean 'relu2'"),
            ({"intermediate_size": (8, -1)}, "intermediate_size=-1"),
            ({"head_dim": 3}, "head_dim=3 must be even"),
            ({"vocab_size": 0}, "vocab_size=0"),
            ({"kv_shared": (True,)}, r"kv_shared=\[true\] leaves no layer"),
            (
                {"mixers": {"none": {}, "softmax": {}}, "intermediate_size": (0, 8)},
                "first mixer is 'none' and the first intermediate_size 0",
            ),
            (
                {"mixers": {"fixed": {"stride": (8, 2), "summary": (1, 4)}}},
                "fixed.summary=4 is more than a block of stride=2",
            ),
        ],
    )
    def test_mistakes(self, changes: dict[str, Any], sentence: str) -> None:
        with pytest.raises(UserError, match=sentence):
            with_changes(**changes)

    @pytest.mark.parametrize("space", [SMALL, TINY, LISTED], ids=lambda space: space.name)
    def test_dict_round_trip(self, space: SearchSpace) -> None:
        again = SearchSpace.from_dict(space.to_dict(), space.vocab_size)
        assert again == space
        assert again.genes == space.genes

    @pytest.mark.parametrize(
        ("change", "sentence"),
        [
            ({"layerz": {}}, "unknown key of a search space 'layerz': did you mean 'layers'"),
            ({"head_dim": None}, "the search space lacks 'head_dim'"),
            ({"layers": {"mixr": {}}}, r"unknown key of \[layers\] 'mixr': did you mean 'mixer'"),
            ({"layers": {"mixer": {}}}, r"the search space lacks \[layers\] 'heads'"),
            ({"d_model": 16}, "d_model=16 must be a list of choices"),
            ({"layers.heads": [3]}, r"heads=\[3\] must be a list of pairs"),
            ({"layers.heads": [[2, "x"]]}, "must be a list of pairs"),
            ({"layers.mixer": ["softmax"]}, "mixer must be a table with one table per mixer"),
            ({"layers.mixer": {"sliding_window": {"window": 4}}}, "window=4 must be a list"),
            ({"layers.norm": "rmsnorm"}, "norm='rmsnorm' must be a list of choices"),
            ({"layers": []}, r"\[layers\] must be a table"),
            ({"num_layers": "6"}, "num_layers='6' must be a whole number"),
        ],
    )
    def test_mistakes_in_files(self, change: dict[str, Any], sentence: str) -> None:
        values = LISTED.to_dict()
        for key, value in change.items():
            if key.startswith("layers."):
                values["layers"][key.removeprefix("layers.")] = value
            elif value is None:
                del values[key]
            else:
                values[key] = value
        with pytest.raises(UserError, match=sentence):
            SearchSpace.from_dict(values, 7)

    def test_files(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="unknown preset 'decoder-smal': did you mean"):
            SearchSpace.load("decoder-smal", 7)
        with pytest.raises(UserError, match="no search space file"):
            SearchSpace.load(str(tmp_path / "absent.toml"), 7)
        broken = tmp_path / "broken.toml"
        broken.write_text("d_model = [")
        with pytest.raises(UserError, match=r"broken.toml is not valid TOML"):
            SearchSpace.load(str(broken), 7)
        own = tmp_path / "own.toml"
        own.write_text(
            "d_model = [8]\nhead_dim = 4\nnum_layers = 1\n[layers]\nheads = [[2, 1]]\n"
            "intermediate_size = [8]\n[layers.mixer.gla]\n"
        )
        assert SearchSpace.load(str(own), 7).size() == 1
        assert SearchSpace.load(str(own), 7).name == "own"


class TestCosts:
    @pytest.mark.parametrize("cost", [num_params, weight_bytes])
    @pytest.mark.parametrize("space", [SMALL, LISTED], ids=lambda space: space.name)
    def test_table_is_the_built_network(self, cost: Any, space: SearchSpace) -> None:
        rows = space.sample_genotypes(np.random.default_rng(1), 25)
        table = CostTable(space, cost).of(rows)
        for row, value in zip(rows, table, strict=True):
            subnet = Subnet(space.decode(row))
            expected = (
                sum(p.numel() for p in subnet.parameters())
                if cost is num_params
                else subnet.weight_bytes()
            )
            assert value == expected

    def test_weight_bytes_are_those_of_the_packed_tensors(self) -> None:
        for seed in range(5):
            subnet = Subnet(SMALL.sample(np.random.default_rng(seed)))
            announced = subnet.reset(torch.Generator().manual_seed(0)).weight_bytes()
            tensors = subnet.pack().state_dict().values()
            assert announced == sum(t.numel() * t.element_size() for t in tensors)
            assert subnet.weight_bytes() == announced

    def test_intercept_and_dispatch(self) -> None:
        rows = LISTED.sample_genotypes(np.random.default_rng(1), 20)
        priced = CostTable(LISTED, num_params, intercept=5.0).of(rows)
        for row, value in zip(rows, priced, strict=True):
            arch = LISTED.decode(row)
            expected = 5.0 + arch_cost(arch, num_params)
            assert value == expected

    def test_reachable_specs_are_exactly_those_of_all_archs(self) -> None:
        space = SPACES["one layer"]
        found = {s for row in all_genotypes(space) for s in space.decode(row).sub_blocks()}
        assert set(reachable_specs(space)) == found
        assert len(reachable_specs(space)) == len(found)

    def test_flops_by_hand(self) -> None:
        tokens, d, f, h, g, k = 10, 16, 8, 2, 1, 4
        assert flops(FFNSpec(d, "relu2", f), tokens) == 2 * tokens * 2 * d * f
        assert flops(FFNSpec(d, "swiglu", f, "int8"), tokens) == 2 * tokens * 3 * d * f
        assert flops(EndsSpec(d, 7), tokens) == 2 * tokens * d * 7
        projections = 2 * tokens * d * k * (h + g + g + h)
        scores = 2 * 2 * tokens * tokens * k * h
        assert flops(MixerSpec(d, "softmax", h, g, k), tokens) == projections + scores
