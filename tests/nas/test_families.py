"""The whole job for every family: classified images, classified tokens, and a decoder probe."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from nas.config import load_config
from nas.evaluation import held_out_accuracy, held_out_loss
from nas.generation import generate_text, generate_tokens
from nas.pipeline import Pipeline, Run
from nas.progress import Reporter
from searchspace.arch import Arch
from searchspace.errors import UserError
from searchspace.subnet import Subnet

TINY = {
    "budget": "20s",
    "train.num_steps": 4,
    "train.batch_size": 4,
    "train.precision": "fp32",
    "profile.num_threads": 1,
    "profile.budget_s": 0.5,
    "search.num_evaluations": 6,
    "search.evaluation_tokens": 256,
    "search.metric_pool": 3,
    "export.front_size": 2,
    "export.test_tokens": 512,
}

SMALL_SPACE = """
d_model = [32, 16]
head_dim = 8
num_layers = 2
[family]
kind = "vit"
patch_size = 4
embedding_position = "learned"
[layers]
heads = [[2, 2]]
position = ["nope"]
ffn = ["gelu"]
intermediate_size = [32]
norm = ["layernorm", "unified_norm"]
[layers.mixer.retention]
[layers.mixer.pool]
"""


@dataclass(frozen=True)
class Case:
    """A run, and what its networks are."""

    preset: str
    task: dict[str, Any]
    workloads: tuple[str, ...]
    kind: str
    unit: str
    refusal: str
    patch_size: int = 2


CASES = [
    Case("vit-small", {"name": "digits"}, ("prefill_b1_t16",), "vit", "example",
         r"classifier of images \(1, 8, 8\) into 10 classes"),
    Case("encoder-small",
         {"name": "listops", "num_examples": 64, "min_length": 8, "max_length": 40},
         ("prefill_b1_t40",), "encoder", "example", "classifier of token ids below"),
    Case("decoder-tiny", {"name": "copy", "num_items": 8},
         ("prefill_b1_t17", "decode_b1_t17"), "decoder", "token", "about token ids below"),
]  # fmt: skip


def run(case: Case, out: Path) -> tuple[Pipeline, Run]:
    values = {**TINY, "preset": case.preset, "out": str(out)}
    values |= {f"task.{key}": value for key, value in case.task.items()}
    config = load_config(None, [f"{key}={json.dumps(value)}" for key, value in values.items()])
    pipeline = Pipeline(config, Reporter(quiet=True))
    return pipeline, pipeline.run()


def test_the_whole_job_on_a_small_space_without_softmax(tmp_path: Path) -> None:
    preset = tmp_path / "small.toml"
    preset.write_text(SMALL_SPACE)
    case = replace(CASES[0], preset=str(preset), workloads=("prefill_b1_t4",))
    check_job(replace(case, patch_size=4), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.kind)
def test_the_whole_job(case: Case, tmp_path: Path) -> None:
    check_job(case, tmp_path)


def check_job(case: Case, tmp_path: Path) -> None:
    """Run everything and look at what lies in the folder."""
    pipeline, done = run(case, tmp_path / "run")
    front = json.loads((done.folder / "front.json").read_text())
    assert (front["unit"], front["metric"]) == (case.unit, "accuracy")
    assert tuple(front["workloads"]) == case.workloads
    rows = {row["arch_id"]: row for row in csv.DictReader((done.folder / "front.csv").open())}
    for group in ("front", "random", "uniform"):
        for record in front["groups"][group]:
            assert Arch.from_dict(record["arch"]).family.kind == case.kind
            assert 0 <= record["measured"]["accuracy"] <= 1
            row = rows[record["arch_id"]]
            assert float(row["measured_accuracy"]) == record["measured"]["accuracy"]
    check_exports(pipeline, done, front)
    check_report(case, done, front)
    for folder in done.subnets.values():
        with pytest.raises(UserError, match=case.refusal) as error:
            next(generate_text(folder, "def "))
        assert "\n" not in str(error.value)


def check_exports(pipeline: Pipeline, done: Run, front: dict[str, Any]) -> None:
    """Exported networks load again and are as good as the front says."""
    assert set(front["chosen"].values()) <= set(done.subnets)
    records = {record["arch_id"]: record for record in front["groups"]["front"]}
    amount = 512 // 16 if front["unit"] == "example" else 512
    batches = pipeline.task.evaluation_batches("test", amount, 8)
    for arch_id, folder in done.subnets.items():
        subnet = Subnet.load(folder)
        assert subnet.arch.id == arch_id
        measured = records[arch_id]["measured"]
        assert held_out_loss(subnet, batches, pipeline.task) == pytest.approx(
            measured["loss"], rel=1e-4
        )
        assert held_out_accuracy(subnet, batches) == pytest.approx(measured["accuracy"], abs=0.04)
        exported = json.loads((folder / "export.json").read_text())
        assert ("state_bytes_per_sequence" in exported) == subnet.arch.family.causal
        if subnet.arch.family.causal:
            assert len(list(generate_tokens(subnet, [3, 1, 2], 5, temperature=0))) == 5
        else:
            with pytest.raises(UserError, match="continues nothing"):
                next(generate_tokens(subnet, [3, 1, 2], 5))


def check_report(case: Case, done: Run, front: dict[str, Any]) -> None:
    """The report says what is true of this task."""
    page = (done.folder / "report.html").read_text(encoding="utf-8")
    assert f"nats/{case.unit}" in page and "nats/byte" not in page and "bits/" not in page
    best = max(r["measured"]["accuracy"] for r in front["groups"]["front"])
    assert f"<b>{100 * best:.1f} %</b>" in page
    assert "nas generate" not in page and "Subnet.load(" in page
    assert (f"image of 8 pixels in patches of {case.patch_size}" in page) == (case.kind == "vit")
    assert ("head of 10 classes" in page) == (case.kind != "decoder")


def test_a_task_and_a_preset_of_other_families_are_refused(tmp_path: Path) -> None:
    for task, preset, sentence in (
        ("digits", "decoder-tiny", "the task needs a vit"),
        ("copy", "vit-small", "the task needs a decoder"),
    ):
        config = load_config(
            None, [f"task.name={task}", f"preset={preset}", f"out={tmp_path / task}"]
        )
        with pytest.raises(UserError, match=sentence):
            Pipeline(config, Reporter(quiet=True)).profile()
