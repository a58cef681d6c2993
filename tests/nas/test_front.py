"""The final front: the plain networks of any space, and what is measured of each task."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nas.evaluation import held_out_loss
from nas.front import measuring, uniform_networks, write_front
from nas.progress import Reporter
from nas.tasks import TaskConfig, prepare_task
from nas.tasks.language_model import LanguageModelTask
from searchspace.space import SearchSpace
from searchspace.supernet import Supernet

ROOT = Path(__file__).parents[2]
FACTS: dict[str, dict[str, Any]] = {
    "encoder": {"kind": "encoder", "num_classes": 10},
    "vit": {"kind": "vit", "num_classes": 10, "image_size": 8, "channels": 1},
}


@pytest.mark.parametrize(
    "preset", [path.stem for path in sorted((ROOT / "searchspace" / "presets").glob("*.toml"))]
)
def test_every_preset_has_plain_networks(preset: str) -> None:
    kind = preset.partition("-")[0]
    space = SearchSpace.load(preset, 0 if kind == "vit" else 50, FACTS.get(kind))
    networks = uniform_networks(space)
    assert len({arch.id for arch in networks.values()}) == len(networks)
    assert {arch.d_model for arch in networks.values()} == set(space.d_model)
    for name, arch in networks.items():
        space.encode(arch)
        layers = {layer for layer in arch.layers if not layer.skip}
        (layer,) = layers
        assert name == f"{layer.mixer} d{arch.d_model} L{arch.depth}"
        assert layer.mixer == "softmax" or "softmax" not in space.mixers
        assert layer.mixer_precision == layer.ffn_precision == "fp32"
        assert layer.position == "rope" or layer.mixer != "softmax" or "rope" not in space.position


@pytest.mark.parametrize(
    ("changes", "mixer", "position"),
    [
        ({"mixers": {"none": {}, "pool": {"window": (3, 5)}}, "position": ("nope",)},
         "pool", "nope"),
        ({"mixers": {"gla": {}, "none": {}}}, "gla", "nope"),
        ({"mixers": {"none": {}}, "intermediate_size": (64, 0)}, "none", "nope"),
        ({"position": ("alibi", "nope")}, "softmax", "alibi"),
        ({"mixer_precision": ("int8", "ternary"), "ffn_precision": ("int4",)}, "softmax", "rope"),
        ({"heads": ((2, 1), (4, 2))}, "softmax", "rope"),
        ({"intermediate_size": (0,)}, "softmax", "rope"),
        ({"kv_shared": (True, False)}, "softmax", "rope"),
    ],
)  # fmt: skip
def test_odd_spaces_have_plain_networks(
    space: SearchSpace, changes: dict[str, Any], mixer: str, position: str
) -> None:
    odd = replace(space, **changes)
    networks = uniform_networks(odd)
    assert networks
    for arch in networks.values():
        odd.encode(arch)
        assert {(layer.mixer, layer.position) for layer in arch.layers if not layer.skip} == {
            (mixer, position)
        }


def test_accuracy_is_measured_where_a_task_is_judged_by_it_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = prepare_task(TaskConfig("digits"), tmp_path / "task")
    space = SearchSpace.load("vit-small", 0, task.family_facts)
    supernet = Supernet(space, torch.Generator().manual_seed(0))
    sources = SimpleNamespace(task=task, supernet=supernet)
    archs = {arch.id: arch for arch in (space.smallest(), space.largest())}
    first = measuring.test_qualities(sources, archs, 640, tmp_path, Reporter(quiet=True))
    batches = task.evaluation_batches("test", 640 // 16, 8)
    for arch_id, arch in archs.items():
        subnet = supernet.extract(arch).pack()
        right = total = 0
        for inputs, targets in batches:
            right += int((subnet(inputs).argmax(-1) == targets).sum())
            total += len(targets)
        assert total == 40 and first[arch_id]["accuracy"] == right / total
        assert first[arch_id]["loss"] == held_out_loss(subnet, batches, task)
    monkeypatch.setattr(measuring, "held_out_loss", None)  # nothing is measured a second time
    assert measuring.test_qualities(sources, archs, 640, tmp_path, Reporter(quiet=True)) == first


def test_text_has_no_accuracy_and_numbers_of_older_releases_are_measured_again(
    task: LanguageModelTask, space: SearchSpace, supernet: Supernet, tmp_path: Path
) -> None:
    arch = space.smallest()
    (tmp_path / "measurements.json").write_text(json.dumps({"256": {arch.id: 1.5}}))
    sources = SimpleNamespace(task=task, supernet=supernet)
    found = measuring.test_qualities(sources, {arch.id: arch}, 256, tmp_path, Reporter(quiet=True))
    assert set(found[arch.id]) == {"loss"} and found[arch.id]["loss"] != 1.5


@pytest.mark.parametrize("accuracy", [None, 0.75])
def test_the_table_has_an_accuracy_or_an_empty_cell(
    space: SearchSpace, accuracy: float | None, tmp_path: Path
) -> None:
    arch = space.smallest()
    quality = {"loss": 1.5} if accuracy is None else {"loss": 1.5, "accuracy": accuracy}
    record = {
        "arch_id": arch.id, "name": None, "arch": arch.to_dict(), "params": 5, "weight_bytes": 20,
        "measured": {**quality, "latency_ms": {"w": 2.0}, "peak_mib": 1.0},
        "predicted": {"latency_ms": {"w": 2.5}}, "search_loss": 1.6,
    }  # fmt: skip
    write_front(tmp_path, {"workloads": ["w"], "groups": {"front": [record]}})
    (row,) = csv.DictReader((tmp_path / "front.csv").open())
    assert row["measured_accuracy"] == ("" if accuracy is None else "0.75")
    assert (row["measured_loss_nats"], row["search_loss_nats"]) == ("1.5", "1.6")
    assert (row["measured_w_ms"], row["predicted_w_ms"]) == ("2.0", "2.5")
    assert row["depth"] == str(arch.depth)
