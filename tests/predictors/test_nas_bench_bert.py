"""The reader of NAS-Bench-BERT, on a file with every combination, and on the real one."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from predictors.benchmarks.nas_bench_bert import (
    FILE_NAME,
    MIXERS,
    READINGS,
    BertEntry,
    arch_of,
    read_nas_bench_bert,
    replicate_groups,
    space,
)
from searchspace.cost import arch_cost, num_params
from searchspace.errors import UserError
from searchspace.subnet import Subnet

LAYERS = [
    {
        "operation_type": kind,
        "operation_parameter": parameter,
        "num_operation_heads": heads,
        "feed_forward_dimension": width,
        "num_feed_forward": maps,
    }
    for (kind, parameter), heads, width, maps in itertools.product(
        MIXERS, (2, 4), (512, 1024), (1, 3)
    )
]


def network(id: int, hidden_size: int, layers: list[dict[str, Any]]) -> dict[str, Any]:
    overrides = {"hidden_size": hidden_size, "nas_config": {"encoder_layers": layers}}
    scores = {"cola": 30.0 + id, "glue": 70.0 + id}
    return {"id": id, "scores": scores, "hparams": {"model_hparam_overrides": overrides}}


def networks() -> list[dict[str, Any]]:
    """Every layer in networks of both widths and both depths."""
    made = [
        (hidden, LAYERS[first : first + depth])
        for hidden, depth in itertools.product((128, 256), (2, 4))
        for first in range(0, len(LAYERS), depth)
    ]
    return [network(number, *values) for number, values in enumerate(made)]


@pytest.fixture
def entries(tmp_path: Path) -> list[BertEntry]:
    (tmp_path / FILE_NAME).write_text(json.dumps(networks()))
    return read_nas_bench_bert(tmp_path)


@pytest.fixture(scope="module")
def real_entries() -> list[BertEntry]:
    folder = os.environ.get("HWNAS_DATA")
    if not folder:
        pytest.skip("HWNAS_DATA names no folder with public benchmarks")
    return read_nas_bench_bert(Path(folder) / "nas_bench_bert")


def num_params_trained(entry: BertEntry) -> int:
    """The number of parameters from the widths; linear maps have no biases."""
    hidden = entry.hidden_size
    embedding = (30522 + 512) * 128 + 2 * 128 + (128 * hidden if hidden != 128 else 0)
    total = embedding + 2 * hidden
    for layer in entry.layers:
        inner = [layer.feed_forward_dimension] * (layer.num_feed_forward - 1)
        widths = [hidden, 4 * hidden, *inner, hidden]
        attention, norms = 4 * hidden**2, 2 * 2 * hidden
        total += attention + norms + sum(a * b for a, b in itertools.pairwise(widths))
    return total


def require_in_space(entries: list[BertEntry]) -> None:
    for entry, reading in itertools.product(entries, READINGS):
        arch = arch_of(entry, reading)
        assert space().decode(space().encode(arch)).id == arch.id
        assert arch.depth == len(entry.layers)
        heads = [layer.num_operation_heads for layer in entry.layers]
        for given, layer in zip(heads, arch.layers, strict=False):
            assert layer.num_heads in (given, 0)
        if reading == "trained":
            assert arch_cost(arch, num_params) == num_params_trained(entry)


def test_every_network_is_in_the_space(entries: list[BertEntry]) -> None:
    assert len(entries) == len(networks())
    assert entries[1].scores == {"cola": 31.0, "glue": 71.0}
    require_in_space(entries)


def test_every_real_network_is_in_the_space(real_entries: list[BertEntry]) -> None:
    require_in_space(real_entries)


def test_real_replicates(real_entries: list[BertEntry]) -> None:
    groups = replicate_groups(real_entries)
    nominal = {arch_of(entry, "nominal").id for entry in real_entries}
    trained = {arch_of(entry).id for entry in real_entries}
    assert 1 < max(groups) + 1 == len(trained) < len(nominal)


def test_as_trained(tmp_path: Path) -> None:
    layers = [
        LAYERS[-1] | {"operation_type": "LT", "operation_parameter": "DFT"},
        LAYERS[0] | {"num_feed_forward": 3, "feed_forward_dimension": 1024},
    ]
    arch = arch_of(read_one(tmp_path, network(7, 128, layers)))
    assert [layer.mixer for layer in arch.layers] == ["softmax", "softmax", "none", "none"]
    assert {layer.intermediate_size for layer in arch.layers[:2]} == {512}
    assert arch.layers[1].all_ffn_options == {"bias": "none", "num_inner": 2, "inner_size": 1024}
    assert arch.layers[1].mixer_options == ()


def test_as_described(tmp_path: Path) -> None:
    for operation, (mixer, options) in MIXERS.items():
        layer = LAYERS[0] | {
            "operation_type": operation[0], "operation_parameter": operation[1],
            "num_feed_forward": 3, "feed_forward_dimension": 1024,
        }  # fmt: skip
        arch = arch_of(read_one(tmp_path, network(7, 128, [layer, layer])), "nominal")
        assert arch.layers[0].mixer == mixer
        assert options.items() <= arch.layers[0].all_options.items()
        assert arch.layers[0].intermediate_size == 1024
        assert arch.layers[0].all_ffn_options == {
            "bias": "none",
            "num_inner": 2,
            "inner_size": 1024,
        }


@torch.no_grad()
def test_the_networks_run(tmp_path: Path) -> None:
    layers = [LAYERS[i] for i in (3, 20, 29, 46)]
    entry = read_one(tmp_path, network(7, 256, layers))
    tokens = torch.randint(30522, (2, 21), generator=torch.Generator().manual_seed(0))
    for reading in READINGS:
        made = Subnet(arch_of(entry, reading)).reset(torch.Generator().manual_seed(0))
        logits = made(tokens)
        assert logits.shape == (2, 2) and torch.isfinite(logits).all()


def test_replicates_are_the_same_as_trained(tmp_path: Path) -> None:
    first = LAYERS[0] | {"num_feed_forward": 1, "feed_forward_dimension": 512}
    mixed = first | {"operation_type": "LT", "operation_parameter": "DCT"}
    unused = first | {"feed_forward_dimension": 1024}
    other = first | {"num_feed_forward": 3}
    pairs = [[first, first], [mixed, unused], [first, other], [other, first], [unused, mixed]]
    path = tmp_path / "bench.json"
    path.write_text(json.dumps([network(i, 256, pair) for i, pair in enumerate(pairs)]))
    assert replicate_groups(read_nas_bench_bert(path)) == [0, 0, 1, 2, 0]


def read_one(folder: Path, values: dict[str, Any]) -> BertEntry:
    path = folder / "one.json"
    path.write_text(json.dumps([values]))
    return read_nas_bench_bert(path)[0]


def changed(change: Callable[[dict[str, Any]], Any]) -> Any:
    values = network(7, 128, [dict(LAYERS[0])])
    change(values)
    return [values]


def config(values: dict[str, Any]) -> dict[str, Any]:
    overrides: dict[str, Any] = values["hparams"]["model_hparam_overrides"]
    return overrides


def first_layer(values: dict[str, Any]) -> dict[str, Any]:
    layer: dict[str, Any] = config(values)["nas_config"]["encoder_layers"][0]
    return layer


class TestMistakes:
    @pytest.mark.parametrize(
        ("content", "sentence"),
        [
            ({}, "holds no list of networks"),
            ([], "holds no list of networks"),
            ([3], "network 0: 3 stands where a mapping with"),
            (changed(lambda v: v.pop("id")), "network 0: field 'id' is missing"),
            (changed(lambda v: v.update(id="7")), "id='7' is a str; expected int"),
            (changed(lambda v: v["scores"].pop("glue")), "field 'glue' is missing"),
            (changed(lambda v: v["scores"].update(glue=True)), "glue=True is a bool"),
            (changed(lambda v: v["scores"].update(cola=float("nan"))), "cola=nan is not finite"),
            (changed(lambda v: config(v).pop("nas_config")), "field 'nas_config' is missing"),
            (
                changed(lambda v: config(v)["nas_config"].update(encoder_layers=[])),
                "encoder_layers is empty",
            ),
            (changed(lambda v: config(v).update(hidden_size=0)), "hidden_size=0 must be at least"),
            (
                changed(lambda v: first_layer(v).update(operation_type="SB")),
                "operation SB SDP is not known; it is one of SA SDP, SA WMA, LT DFT",
            ),
            (
                changed(lambda v: first_layer(v).update(num_feed_forward=None)),
                "num_feed_forward=None is a NoneType; expected int",
            ),
            ([network(1, 128, LAYERS[:2])] * 2, "lists a network twice"),
        ],
    )
    def test_content(self, content: Any, sentence: str, tmp_path: Path) -> None:
        path = tmp_path / "bench.json"
        path.write_text(json.dumps(content))
        with pytest.raises(UserError, match=sentence):
            read_nas_bench_bert(path)

    def test_files(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"no NAS-Bench-BERT file at .*BERT_benchmark"):
            read_nas_bench_bert(tmp_path)
        (tmp_path / "half.json").write_text('[{"id": 1,')
        with pytest.raises(UserError, match="is not a NAS-Bench-BERT file: it is truncated"):
            read_nas_bench_bert(tmp_path / "half.json")

    def test_readings(self, tmp_path: Path) -> None:
        entry = read_one(tmp_path, network(7, 128, LAYERS[:2]))
        with pytest.raises(UserError, match="unknown reading 'traind': did you mean 'trained'"):
            arch_of(entry, "traind")

    def test_too_deep(self, tmp_path: Path) -> None:
        entry = read_one(tmp_path, network(7, 128, LAYERS[:5]))
        with pytest.raises(UserError, match="network 7 has 5 layers, space 'nas-bench-bert' has 4"):
            arch_of(entry)
