"""The job file: what it means, and what is said of mistakes in it."""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import pytest

from nas.cluster.job_config import JobConfig, job_of, load_job
from nas.cluster.job_trials import TrialSpec, trials_of
from nas.cluster.tune_jobs import Outcome, in_words
from nas.cluster_command import check_resumed, cluster_command, prepared_files
from nas.progress import Reporter
from searchspace.errors import UserError

JOB: dict[str, Any] = {
    "name": "front", "run": "runs/base", "out": "runs/front", "storage": "/shared/ray",
}  # fmt: skip


def job(**more: Any) -> JobConfig:
    return job_of({**JOB, **copy.deepcopy(more)})


def labels(**more: Any) -> list[str]:
    return [trial.label for trial in trials_of(job(**more))]


def test_searches_are_every_combination(tmp_path: Path) -> None:
    for name in ("laptop", "server"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "latency_table.json").write_text("{}")
    devices = [str(tmp_path / "laptop"), str(tmp_path / "server" / "latency_table.json")]
    grid = {
        "samplers": ["random", "nsga2"],
        "seeds": [0, 1],
        "evaluations": [50],
        "devices": devices,
    }
    trials = trials_of(job(search=grid))
    assert len(trials) == 8 and trials[0].label == "laptop-random-50-seed0"
    assert trials[-1] == TrialSpec(
        "server-nsga2-50-seed1",
        {"search.sampler": "nsga2", "search.num_evaluations": 50, "seed": 1},
        "server",
    )
    assert TrialSpec.from_dict(json.loads(json.dumps(trials[-1].to_dict()))) == trials[-1]
    assert labels(search={}) == ["seed0"]


def test_trainings_are_every_combination_or_drawn() -> None:
    lists = {"matrix_lr": [0.01, 0.02], "num_random": [1, 2]}
    assert labels(training={"hyperparameters": lists, "seeds": [0, 1]}) == [
        f"matrix_lr{lr}-num_random{n}-seed{seed}"
        for lr in (0.01, 0.02) for n in (1, 2) for seed in (0, 1)
    ]  # fmt: skip
    ranges = {
        "matrix_lr": {"low": 0.001, "high": 0.1, "log": True}, "num_random": {"low": 1, "high": 3},
    }  # fmt: skip
    drawn = trials_of(job(training={"hyperparameters": ranges, "num_samples": 40}))
    rates = sorted(trial.changes["train.matrix_lr"] for trial in drawn)
    assert 0.001 <= rates[0] < 0.003 and 0.03 < rates[-1] <= 0.1
    assert 0.005 < rates[len(rates) // 2] < 0.02  # the logarithm is uniform
    assert {trial.changes["train.num_random"] for trial in drawn} == {1, 2, 3}
    assert drawn == trials_of(job(training={"hyperparameters": ranges, "num_samples": 40}))
    one = {"hyperparameters": {"num_random": [1, 2]}, "num_samples": 30}
    many = {name: [0.123456789] for name in ("matrix_lr", "other_lr", "distillation",
            "decay_share", "norm_anneal_share", "hidden_distillation")}  # fmt: skip
    two = labels(training={"hyperparameters": {**many, "num_steps": [3, 4]}})
    assert len(set(two)) == 2 and all(len(label) < 140 for label in two)
    assert sorted(labels(training=one)) == ["num_random1-seed0", "num_random2-seed0"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({}, "give exactly one of the sections"),
        ({"search": {}, "training": {}}, "give exactly one of the sections"),
        ({"search": {"sampler": ["random"]}}, "did you mean 'search.samplers'"),
        ({"search": {"samplers": ["nsga"]}}, "unknown search.samplers 'nsga'"),
        ({"search": {"seeds": [1, 1]}}, "search.seeds holds 1 twice"),
        ({"search": {"seeds": [-1]}}, "whole numbers from 0 up"),
        ({"search": {"evaluations": [0]}}, "search.evaluations holds 0"),
        ({"search": {"devices": ["/nowhere"]}}, "run `nas profile` on that device"),
        ({"search": 3}, "search is a section"),
        ({"search": {}, "cpu": 2}, "did you mean 'cpus'"),
        ({"search": {}, "cpus": 0}, "a trial needs a processor"),
        ({"search": {}, "storage": "ray"}, "is relative, and means another folder on every node"),
        ({"search": {}, "name": "a/b"}, "cannot name a folder"),
        ({"training": {"num_workers": 0}}, "training.num_workers holds 0"),
        ({"training": {"hyperparameters": {"matrx_lr": [1.0]}}}, "did you mean 'matrix_lr'"),
        ({"training": {"hyperparameters": {"matrix_lr": 0.1}}}, "give a list of values"),
        ({"training": {"hyperparameters": {"matrix_lr": {"low": 1.0, "high": 2.0}}}},
         "num_samples is 0"),
        ({"training": {"num_samples": 1, "hyperparameters": {"matrix_lr": {"low": 2, "high": 1}}}},
         "which is no range"),
        ({"training": {"num_samples": 1, "hyperparameters": {
            "matrix_lr": {"low": 0.0, "high": 1.0, "log": True}}}}, "which is no range"),
    ],
)  # fmt: skip
def test_mistakes_are_named(more: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        trials_of(job(**more))


def test_a_job_needs_its_four_keys_and_a_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the job lacks 'storage'"):
        job_of({key: value for key, value in JOB.items() if key != "storage"})
    with pytest.raises(UserError, match="there is no job file"):
        load_job(tmp_path / "absent.toml")
    (tmp_path / "broken.toml").write_text("name = ")
    with pytest.raises(UserError, match="is not valid TOML"):
        load_job(tmp_path / "broken.toml")


@pytest.mark.parametrize(
    ("storage", "path"),
    [("/shared/ray", "/shared/ray"), ("s3://bucket/runs/", "s3://bucket/runs"),
     ("~/ray", str(Path.home() / "ray"))],
)  # fmt: skip
def test_storage_is_absolute_or_a_uri(storage: str, path: str) -> None:
    found = job(search={}, storage=storage)
    assert found.storage_path == path and found.experiment_path == f"{path}/front"


def test_resuming_another_job_is_refused(tmp_path: Path) -> None:
    before = job(search={"seeds": [0, 1]}, out=str(tmp_path))
    description = {
        "experiment": before.experiment_path,
        "trials": [trial.to_dict() for trial in trials_of(before)],
    }
    (tmp_path / "job.json").write_text(json.dumps(description))
    check_resumed(before, trials_of(before), resume=True)
    now = job(search={"seeds": [0, 2]}, out=str(tmp_path))
    check_resumed(now, trials_of(now), resume=False)
    with pytest.raises(UserError, match="begun with other trials \\(seed1 is on one side"):
        check_resumed(now, trials_of(now), resume=True)
    elsewhere = job(search={"seeds": [0, 2]}, out=str(tmp_path), storage="/other")
    check_resumed(elsewhere, trials_of(elsewhere), resume=True)


def test_a_base_run_that_lacks_something_is_refused(tmp_path: Path) -> None:
    searches = job(search={}, run=str(tmp_path))
    with pytest.raises(UserError, match="is no run folder"):
        prepared_files(searches, Reporter(quiet=True))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="holds no trained supernet; run `nas train"):
        prepared_files(searches, Reporter(quiet=True))
    with pytest.raises(UserError, match="there is no config file"):
        prepared_files(job(search={}, run=str(tmp_path / "absent")), Reporter(quiet=True))
    (tmp_path / "supernet").mkdir()
    (tmp_path / "supernet" / "state.json").write_text('{"done": true}')
    with pytest.raises(UserError, match="holds no latency table"):
        prepared_files(searches, Reporter(quiet=True))


class Checkpoint:
    """Stands for Ray's handle."""

    def to_directory(self, path: str) -> str:
        Path(path).mkdir()
        return path


def run_command(
    tmp_path: Path, outcomes: list[Outcome], monkeypatch: pytest.MonkeyPatch, as_json: bool
) -> int:
    """Run the command on a job whose trials ended as given."""
    text = "\n".join(f"{key} = {value!r}" for key, value in {**JOB, "out": str(tmp_path)}.items())
    (tmp_path / "job.toml").write_text(f"{text}\n[training]\n")
    row = {"label": "seed0", "folder": "f", "loss_random": 2.0, "loss_largest": 1.0}
    monkeypatch.setattr("nas.cluster_command.connect", lambda address: __import__(
        "contextlib").nullcontext())  # fmt: skip
    monkeypatch.setattr("nas.cluster_command.prepared_files", lambda job, reporter: {})
    monkeypatch.setattr("nas.cluster_command.run_trials", lambda *args: outcomes)
    monkeypatch.setattr("nas.cluster_command.merge_trainings", lambda job, files, found: [row])
    options = argparse.Namespace(
        job=str(tmp_path / "job.toml"), ray=None, resume=False, json=as_json, quiet=True
    )
    return cluster_command(options)


def test_the_exit_code_says_how_the_trials_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done = Outcome(TrialSpec("seed0"), {"finished": True}, Checkpoint(), "", True)
    failed = Outcome(TrialSpec("seed1"), {}, None, "the loss is nan", False)
    cut_off = Outcome(TrialSpec("seed2"), {"step": 3}, Checkpoint(), "", False)
    assert run_command(tmp_path, [done], monkeypatch, as_json=False) == 0
    assert "best:     f" in capsys.readouterr().out
    assert run_command(tmp_path, [done, failed], monkeypatch, as_json=True) == 1
    shown = json.loads(capsys.readouterr().out)
    assert shown["failed"] == {"seed1": "the loss is nan"}
    assert [row["label"] for row in shown["results"]] == ["seed0"]
    assert run_command(tmp_path, [failed], monkeypatch, as_json=False) == 1
    assert "failed:   seed1: the loss is nan" in capsys.readouterr().out
    with pytest.raises(KeyboardInterrupt):
        run_command(tmp_path, [done, cut_off], monkeypatch, as_json=True)


def test_reports_are_one_line() -> None:
    search = {"evaluations": 9, "front": 3, "hypervolume": 0.25, "best": 1.5}
    assert in_words(search) == "9 evaluated, front 3, hypervolume 0.2500, best loss 1.5"
    training = {"step": 7, "train_largest": 2.5, "train_random": 3.0, "finished": False}
    assert in_words(training) == "step 7, largest 2.5, random 3"
    end = {"loss_largest": 1.0, "loss_smallest": 2.0, "loss_random": 1.5, "finished": True}
    assert in_words(end).endswith("random ones 1.5, done")
    assert in_words({"refused": "no arch keeps it"}) == "no arch keeps it"
