"""Archs as named features: masks, totals against plain loops, alignment with a predictor."""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import numpy as np
import pytest

from predictors.encodings import ENCODINGS, Features, encode_archs, join, with_metrics
from predictors.encodings.aggregate import TOKENS
from searchspace.arch import Arch, LayerArch
from searchspace.cost import arch_cost, flops, num_params, weight_bytes
from searchspace.errors import UserError
from searchspace.family import Family
from searchspace.space import SearchSpace
from searchspace.specs import EndsSpec, FFNSpec, MixerSpec

SPACE = SearchSpace(
    name="small",
    vocab_size=50,
    d_model=(32, 16),
    head_dim=8,
    num_layers=3,
    mixers={"softmax": {}, "sliding_window": {"window": (16, 8)}, "pool": {}, "none": {}},
    heads=((4, 4), (4, 2), (2, 1)),
    intermediate_size=(64, 32, 0),
    position=("rope", "nope"),
    ffn=("swiglu", "relu2"),
    mixer_precision=("fp32", "int8"),
    norm=("rmsnorm", "layernorm"),
    kv_shared=(False, True),
)
WINDOW = LayerArch(
    "sliding_window", 4, 2, "rope", "int8", "relu2", 32, norm="layernorm",
    mixer_options=(("window", 8),),
)  # fmt: skip
POOL = LayerArch("pool", 0, 0, "nope", ffn="swiglu", intermediate_size=64)
SOFTMAX = LayerArch("softmax", 2, 1, "nope")
EXAMPLE = SPACE.arch(16, (WINDOW, POOL, LayerArch()))


def sampled(space: SearchSpace, num: int) -> list[Arch]:
    rows = space.sample_genotypes(np.random.default_rng(0), num)
    return [space.decode(row) for row in rows]


def row(kind: str, arch: Arch, space: SearchSpace | None = SPACE) -> dict[str, float]:
    features = encode_archs([arch], space, kind)
    return dict(zip(features.names, features.values[0].tolist(), strict=True))


def test_integer_holds_numbers_and_masks_what_is_not_there() -> None:
    found = row("integer", EXAMPLE)
    there = {name: value for name, value in found.items() if not math.isnan(value)}
    assert there == {
        "d_model": 16,
        "layers.0.skip": 0, "layers.0.mixer": 1, "layers.0.sliding_window.window": 8,
        "layers.0.num_heads": 4, "layers.0.num_kv_heads": 2, "layers.0.position": 0,
        "layers.0.mixer_precision": 1, "layers.0.ffn": 1,
        "layers.0.intermediate_size": 32, "layers.0.norm": 1,
        "layers.1.skip": 0, "layers.1.mixer": 2, "layers.1.ffn": 0,
        "layers.1.intermediate_size": 64, "layers.1.norm": 0,
        "layers.2.skip": 1,
    }  # fmt: skip
    assert len(found) == 1 + 3 * 11


def test_one_hot_is_a_choice_per_gene_or_nothing() -> None:
    found = row("one_hot", EXAMPLE)
    assert {name for name, value in found.items() if value} == {
        "d_model=16",
        "layers.0.skip=false", "layers.0.mixer=sliding_window",
        "layers.0.sliding_window.window=8", "layers.0.heads=4x2", "layers.0.position=rope",
        "layers.0.mixer_precision=int8", "layers.0.ffn=relu2",
        "layers.0.intermediate_size=32", "layers.0.norm=layernorm",
        "layers.1.skip=false", "layers.1.mixer=pool", "layers.1.ffn=swiglu",
        "layers.1.intermediate_size=64", "layers.1.norm=rmsnorm",
        "layers.2.skip=true",
    }  # fmt: skip
    assert set(found.values()) == {0.0, 1.0}


@pytest.mark.parametrize("preset", ["decoder-operators", "decoder-numerics"])
def test_a_gene_counts_exactly_where_another_choice_makes_another_layer(preset: str) -> None:
    space = SearchSpace.load(preset, 50)
    genotypes = space.sample_genotypes(np.random.default_rng(1), 20)
    archs = [space.decode(genotype) for genotype in genotypes]
    features = encode_archs(archs, space, "one_hot")
    for genotype, values in zip(genotypes, features.values, strict=True):
        params = space.to_params(genotype[None])[0]
        for slot in (0, space.num_layers - 1):
            prefix = f"layers.{slot}."
            choice = {g: options[0] for g, options in space.layer_choices().items()}
            choice |= {n.removeprefix(prefix): v for n, v in params.items() if prefix in n}
            for gene, options in space.layer_choices().items():
                if gene == "skip" or len(options) == 1:
                    continue
                layers = {space.layer(choice | {gene: option}) for option in options}
                columns = [
                    values[i]
                    for i, name in enumerate(features.names)
                    if name.startswith(f"{prefix}{gene}=")
                ]
                assert sum(columns) == (len(layers) > 1), (gene, choice)


def test_different_archs_have_different_integers_and_one_hots() -> None:
    archs = list({arch.id: arch for arch in sampled(SPACE, 300)}.values())
    for kind in ("integer", "one_hot"):
        values = encode_archs(archs, SPACE, kind).values
        assert len(np.unique(np.nan_to_num(values, nan=-1.0), axis=0)) == len(archs)


def slow_aggregate(arch: Arch) -> dict[str, float]:
    """A few of the aggregate features, by loops over the layers."""
    mixers = [s for _, s in arch.named_sub_blocks() if isinstance(s, MixerSpec)]
    ffns = [s for _, s in arch.named_sub_blocks() if isinstance(s, FFNSpec)]
    blocks: list[MixerSpec | FFNSpec] = [*mixers, *ffns]
    active = [slot for slot, layer in enumerate(arch.layers) if not layer.skip]
    place = {
        slot: 0.0 if len(active) == 1 else 2.0 * i / (len(active) - 1) - 1.0
        for i, slot in enumerate(active)
    }
    widths = {slot: arch.layers[slot].intermediate_size for slot in active}
    width = sum(widths.values())
    heads = [spec.num_heads for spec in mixers]

    def tokens(spec: object) -> int:
        return min(TOKENS, arch.family.max_tokens) if isinstance(spec, EndsSpec) else TOKENS

    return {
        "depth": len(active),
        "d_model": arch.d_model,
        "depth x d_model": len(active) * arch.d_model,
        "log params": math.log1p(arch_cost(arch, num_params)),
        "log weight bytes": math.log1p(arch_cost(arch, weight_bytes)),
        "log flops": math.log1p(arch_cost(arch, lambda spec: flops(spec, tokens(spec)))),
        "log params in mixers": math.log1p(sum(map(num_params, mixers))),
        "log params in ffns": math.log1p(sum(map(num_params, ffns))),
        "log params in ends": math.log1p(num_params(arch.ends)),
        "heads total": sum(heads),
        "heads mean": sum(heads) / max(sum(h > 0 for h in heads), 1),
        "head width total": sum(s.num_heads * s.head_dim for s in mixers),
        "ffn width total": width,
        "log ffn width total": math.log1p(width),
        "ffn width mean": width / max(len(ffns), 1),
        "ffn width trend": sum(place[s] * w for s, w in widths.items()) / width if width else 0.0,
        "share of mixer=pool": sum(s.mixer == "pool" for s in mixers) / len(active),
        "share of ffn=relu2": sum(s.ffn == "relu2" for s in ffns) / len(active),
        "share of mixer precision=int8": sum(s.precision == "int8" for s in mixers) / len(active),
        "share of norm=layernorm": sum(s.norm == "layernorm" for s in blocks) / len(blocks),
        "shared keys and values total": sum(s.kv_shared for s in mixers),
        "ffn hidden layers total": len(ffns),
    }


def test_aggregate_equals_plain_loops() -> None:
    archs = sampled(SPACE, 40)
    features = encode_archs(archs)
    for index, arch in enumerate(archs):
        for name, value in slow_aggregate(arch).items():
            assert features.column(name)[index] == pytest.approx(value, rel=1e-12), name
    assert np.isfinite(features.values).all()


@pytest.mark.parametrize("preset", ["decoder-numerics", "encoder-small", "vit-small"])
def test_flops_of_every_family_equal_those_of_the_modules(preset: str) -> None:
    facts = {
        "encoder-small": {"kind": "encoder", "num_classes": 3},
        "vit-small": {"kind": "vit", "num_classes": 10, "image_size": 8, "channels": 1},
    }
    space = SearchSpace.load(preset, 0 if preset == "vit-small" else 50, facts.get(preset))
    archs = sampled(space, 2)
    logs = encode_archs(archs).column("log flops")
    for arch, log in zip(archs, logs, strict=True):
        slow = arch_cost(
            arch,
            lambda spec: flops(
                spec, min(TOKENS, spec.family.max_tokens) if isinstance(spec, EndsSpec) else TOKENS
            ),
        )
        assert log == pytest.approx(math.log1p(slow), rel=1e-12)


def test_every_hidden_layer_of_a_stack_counts() -> None:
    stack = LayerArch(
        ffn="gelu_stack", intermediate_size=64,
        ffn_options=(("inner_size", 24), ("num_inner", 2)),
    )  # fmt: skip
    features = encode_archs([SPACE.arch(16, (stack, POOL, LayerArch()))])
    assert features.column("ffn width total").tolist() == [64 + 24 + 24 + 64]
    assert features.column("ffn hidden layers total").tolist() == [4]


def test_trends_say_where_the_width_is() -> None:
    wide, narrow = replace(POOL, intermediate_size=64), replace(POOL, intermediate_size=0)
    last = SPACE.arch(16, (narrow, LayerArch(), wide))
    first = SPACE.arch(16, (wide, LayerArch(), narrow))
    alone = SPACE.arch(16, (LayerArch(), wide, LayerArch()))
    trend = encode_archs([last, first, alone]).column("ffn width trend")
    assert trend.tolist() == [1.0, -1.0, 0.0]


def test_the_bag_counts_sub_blocks_wherever_they_stand() -> None:
    archs = [SPACE.arch(16, (POOL, SOFTMAX, POOL)), SPACE.arch(16, (SOFTMAX, POOL, POOL))]
    features = encode_archs(archs, kind="adjacency_free")
    assert (features.values[0] == features.values[1]).all()
    found = dict(zip(features.names, features.values[0].tolist(), strict=True))
    assert found == {
        "count of ends/d16/v50": 1,
        "count of ffn/swiglu/d16/f64/rmsnorm/fp32": 2,
        "count of mixer/pool/d16/h0x0x0/nope/rmsnorm/fp32": 2,
        "count of mixer/softmax/d16/h2x1x8/nope/rmsnorm/fp32": 1,
    }


def test_archs_of_different_spaces_and_families_may_be_mixed_where_no_space_is_needed() -> None:
    vit = Family("vit", num_classes=10, image_size=8, channels=1, patch_size=4)
    other = Arch(24, 12, 0, (replace(POOL, intermediate_size=7),) * 5, vit)
    for kind in ("aggregate", "adjacency_free"):
        features = encode_archs([EXAMPLE, other], kind=kind)
        assert np.isfinite(features.values).all() and len(features.values) == 2
    assert encode_archs([EXAMPLE, other]).column("depth").tolist() == [2.0, 5.0]
    with pytest.raises(UserError, match=f"arch {other.id}: the arch has layer slots=5"):
        encode_archs([EXAMPLE, other], SPACE, "integer")


def test_no_archs_and_networks_without_layers_are_encoded() -> None:
    for kind in ENCODINGS:
        assert encode_archs([], SPACE, kind).values.shape[0] == 0
    empty = SPACE.arch(16, (LayerArch(),) * 3)
    assert np.isfinite(encode_archs([empty]).values).all()


def test_encodings_can_be_joined_and_share_no_column_twice() -> None:
    both = encode_archs([EXAMPLE], SPACE, "aggregate+integer")
    assert both.names.count("d_model") == 1
    assert {"log params", "layers.1.mixer"} <= set(both.names)


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("agregate", "did you mean 'aggregate'"),
        ("aggregate+aggregate", "names one twice"),
        ("integer", "need the archs' space"),
    ],
)
def test_wrong_encodings_are_refused(kind: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        encode_archs([EXAMPLE], None, kind)


def test_a_predictor_gets_its_own_columns(caplog: pytest.LogCaptureFixture) -> None:
    known = encode_archs([SPACE.arch(16, (POOL, POOL, POOL))])
    new = SPACE.arch(16, (SOFTMAX, POOL, LayerArch()))
    with caplog.at_level(logging.WARNING):
        features = encode_archs([new, EXAMPLE], names=known.names)
    assert features.names == known.names
    assert "'share of mixer=sliding_window'" in caplog.text
    assert features.column("share of mixer=pool").tolist() == [0.5, 0.5]
    more = encode_archs([new], names=(*known.names, "share of mixer=mamba"))
    assert more.column("share of mixer=mamba").tolist() == [0.0]
    with pytest.raises(UserError, match="have no 'synflow'"):
        encode_archs([new], names=(*known.names, "synflow"))
    with pytest.raises(UserError, match=r"was not fitted on 'layers\.0\.skip'"):
        encode_archs([new], SPACE, "integer", names=["d_model"])


def test_metrics_become_columns() -> None:
    features = with_metrics(encode_archs([EXAMPLE, EXAMPLE]), {"synflow": [1.0, 2.0]})
    assert features.names[-1] == "synflow" and features.column("synflow").tolist() == [1.0, 2.0]
    with pytest.raises(UserError, match="shape \\(1,\\) for 2 archs"):
        with_metrics(features, {"snip": [1.0]})
    with pytest.raises(UserError, match="'snip' is not finite for 1 archs"):
        with_metrics(features, {"snip": [1.0, math.nan]})
    with pytest.raises(UserError, match="called 'synflow'"):
        with_metrics(features, {"synflow": [1.0, 2.0]})


def test_features_say_what_is_wrong_with_them() -> None:
    with pytest.raises(UserError, match="have 1 names"):
        Features(np.zeros((2, 2)), ("a",))
    with pytest.raises(UserError, match="no 'b'"):
        Features(np.zeros((2, 1)), ("a",)).column("b")
    with pytest.raises(UserError, match="2, 3 archs"):
        join(Features(np.zeros((2, 1)), ("a",)), Features(np.zeros((3, 1)), ("b",)))
