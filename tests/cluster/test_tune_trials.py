"""Trials without Ray: a search that is taken up again, checkpoints, and results merged."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hw_profiles.latency_table import LatencyTable
from nas.cluster.job_config import JobConfig, SearchGrid, TrainingGrid
from nas.cluster.job_trials import TrialSpec, trials_of
from nas.cluster.merge_results import Found, merge_searches, merge_trainings, scaled_hypervolume
from nas.cluster.search_trial import search_in
from nas.cluster.training_trial import train_in
from nas.cluster.trial_folder import backup_database, base_files, read_files
from nas.cluster_command import prepared_files
from nas.config import load_config
from nas.pareto import hypervolume
from nas.progress import Reporter
from nas.samplers import make_sampler
from nas.samplers.random_state import random_state, restore_random_state
from nas.study import evaluated, read_evaluated, sqlite_url, studies_at
from nas.training import load_supernet, read_state
from searchspace.errors import UserError
from searchspace.space import SearchSpace
from tests.cluster.base_run import make_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def files(base: Path) -> dict[str, bytes]:
    return base_files(base, {}, with_supernet=True)


@pytest.fixture(autouse=True)
def one_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave more of these short searches to the sampler."""
    monkeypatch.setattr("nas.search_stage.uniform_networks", lambda space: {})
    monkeypatch.setattr(SearchSpace, "one_change_from_largest", lambda self: ())


class Killed(BaseException):
    """Stands for a kill of the trial's process."""


class Reports:
    """Keeps what a trial reports: metrics, and checkpoints in folders; may kill it."""

    def __init__(self, folder: Path, kill_after: int | None = None) -> None:
        self.folder, self.kill_after = folder, kill_after
        self.metrics: list[dict[str, Any]] = []

    def __call__(self, metrics: Mapping[str, Any], save: Callable[[Path], None]) -> None:
        target = self.folder / f"checkpoint_{len(self.metrics)}"
        target.mkdir(parents=True)
        save(target)
        self.metrics.append(dict(metrics))
        if len(self.metrics) == self.kill_after:
            raise Killed

    @property
    def last(self) -> Path:
        return self.folder / f"checkpoint_{len(self.metrics) - 1}"


def spec_of(sampler: str, evaluations: int = 21, seed: int = 3, device: str = "") -> TrialSpec:
    changes = {"search.sampler": sampler, "search.num_evaluations": evaluations, "seed": seed}
    return TrialSpec(f"{sampler}-{seed}", changes, device)


def found_ids(folder: Path) -> list[str]:
    (study,) = studies_at(sqlite_url(folder))
    return [item.arch.id for item in evaluated(study)]


@pytest.mark.parametrize("sampler", ["nsga2", "tpe"])
def test_a_search_that_is_killed_twice_finds_what_an_uninterrupted_one_finds(
    files: dict[str, bytes], tmp_path: Path, sampler: str
) -> None:
    spec = spec_of(sampler)
    whole = Reports(tmp_path / "whole")
    search_in(tmp_path / "run", files, spec, whole, checkpoint_s=1e9)
    assert [m["finished"] for m in whole.metrics] == [True]
    checkpoint = None
    for kills, count in [(1, 13), (2, 5)]:
        reports = Reports(tmp_path / f"part{kills}", kill_after=count)
        with pytest.raises(Killed):
            search_in(tmp_path / "run", files, spec, reports, checkpoint=checkpoint,
                      checkpoint_s=-1.0)  # fmt: skip
        # Nothing but the checkpoint is left: the next part may run on another machine.
        checkpoint = reports.last
    last = Reports(tmp_path / "last")
    search_in(tmp_path / "run", files, spec, last, checkpoint=checkpoint, checkpoint_s=1e9)
    ids = found_ids(last.last)
    assert len(ids) == len(set(ids)) == 21 and last.metrics[-1]["evaluations"] == 21
    assert ids == found_ids(whole.last)


def test_reports_say_where_a_search_stands(files: dict[str, bytes], tmp_path: Path) -> None:
    reports = Reports(tmp_path / "reports")
    search_in(tmp_path / "run", files, spec_of("random"), reports, checkpoint_s=-1.0)
    counts = [metrics["evaluations"] for metrics in reports.metrics]
    assert counts == sorted(counts) and counts[-1] == 21
    volumes = [metrics["hypervolume"] for metrics in reports.metrics]
    assert volumes == sorted(volumes) and 0 < volumes[-1] < 1
    (study,) = studies_at(sqlite_url(reports.last))
    losses = [item.values[0] for item in evaluated(study)]
    end = reports.metrics[-1]
    assert end["best_at_10"] == min(losses[:10]) and end["best_at_20"] == min(losses[:20])
    assert end["best"] == min(losses) and "best_at_50" not in end
    assert [m["finished"] for m in reports.metrics] == [False] * (len(counts) - 1) + [True]


def test_a_trial_needs_neither_the_tables_device_nor_its_backend(
    base: Path, tmp_path: Path
) -> None:
    table = LatencyTable.load(base / "latency_table.json")
    table.device = replace(table.device, cpu="another machine", num_threads=64)
    table.save(tmp_path / "latency_table.json", keep_others=False)
    files = base_files(base, {"server": tmp_path / "latency_table.json"}, with_supernet=True)
    config = json.loads(files["config.json"])
    config["profile"] |= {"backend": "onnxruntime", "num_threads": 512}
    files["config.json"] = json.dumps(config).encode()
    reports = Reports(tmp_path / "reports")
    search_in(tmp_path / "run", files, spec_of("random", 3, device="server"), reports)
    assert reports.metrics[-1]["evaluations"] == 3
    held = LatencyTable.load(tmp_path / "run" / "latency_table.json").device
    assert held.num_threads == 64


def test_a_backup_is_whole_while_others_write(tmp_path: Path) -> None:
    source = tmp_path / "study.db"
    connection = sqlite3.connect(source, check_same_thread=False, isolation_level=None)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("CREATE TABLE pairs (a INTEGER, b INTEGER)")
    stop = threading.Event()

    def write() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            connection.execute("BEGIN")
            connection.execute("INSERT INTO pairs VALUES (?, 0)", (number,))
            connection.execute("UPDATE pairs SET b = ?", (number,))
            connection.execute("COMMIT")

    thread = threading.Thread(target=write)
    thread.start()
    try:
        counts = []
        for index in range(10):
            backup_database(source, tmp_path / f"{index}.db")
            with sqlite3.connect(tmp_path / f"{index}.db") as copy:
                rows = copy.execute("SELECT a, b FROM pairs").fetchall()
                assert all(b == len(rows) for _, b in rows)
                assert copy.execute("PRAGMA journal_mode").fetchone() == ("delete",)
            counts.append(len(rows))
    finally:
        stop.set()
        thread.join()
        connection.close()
    assert counts == sorted(counts) and counts[-1] > 0
    with pytest.raises(UserError, match="no study at"):
        backup_database(tmp_path / "absent.db", tmp_path / "copy.db")


@pytest.mark.parametrize("name", ["random", "nsga2", "nsga3", "tpe"])
def test_random_numbers_go_on_after_json(name: str) -> None:
    import optuna
    from optuna.distributions import FloatDistribution

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space: dict[str, Any] = {"a": FloatDistribution(0, 1), "b": FloatDistribution(0, 1)}

    def step(study: optuna.Study) -> dict[str, Any]:
        trial = study.ask(space)
        study.tell(trial, [trial.params["a"], 1 - trial.params["b"]])
        return trial.params

    study = optuna.create_study(directions=["minimize"] * 2, sampler=make_sampler(name, seed=1))
    for _ in range(15):
        step(study)
    state = json.loads(json.dumps(random_state(study.sampler)))
    assert state
    other = optuna.create_study(directions=["minimize"] * 2, sampler=make_sampler(name, seed=1))
    other.add_trials(study.trials)
    for key, value in study._storage.get_study_system_attrs(study._study_id).items():
        other._storage.set_study_system_attr(other._study_id, key, value)
    restore_random_state(other.sampler, state)
    assert [step(study) for _ in range(5)] == [step(other) for _ in range(5)]
    restore_random_state(other.sampler, {})  # an old checkpoint without one changes nothing


def job_of(tmp_path: Path, base: Path, **sections: Any) -> JobConfig:
    return JobConfig("job", str(base), str(tmp_path / "out"), "/storage", **sections)


def test_searches_become_one_front_and_one_report(
    base: Path, files: dict[str, bytes], tmp_path: Path
) -> None:
    job = job_of(tmp_path, base, search=SearchGrid(("random",), (0, 1), (12,)))
    found = []
    for spec in trials_of(job):
        reports = Reports(tmp_path / spec.label)
        search_in(tmp_path / "run", files, spec, reports, checkpoint_s=1e9)
        found.append(Found(spec, reports.last, reports.metrics[-1]))
    (first,) = merge_searches(job, files, found[:1])
    (result,) = merge_searches(job, files, found)
    assert result["evaluations"] > first["evaluations"] == 12
    out = tmp_path / "out"
    wanted = {arch_id for trial in found for arch_id in found_ids(trial.state)}
    assert set(found_ids(out)) == wanted and result["evaluations"] == len(wanted)
    assert [row["label"] for row in result["trials"]] == ["random-12-seed0", "random-12-seed1"]
    best = max(row["hypervolume"] for row in result["trials"])
    assert result["hypervolume"] >= best > 0
    page = (out / "report.html").read_text()
    assert "random (2 searches)" in page
    # An ordinary run folder: the base's config, which every command goes on with.
    config, held = load_config(str(base / "config.json")), load_config(str(out / "config.json"))
    assert replace(held, out=config.out) == config
    assert not list(out.glob(".*.tmp"))


def test_what_one_device_evaluated_counts_for_every_other(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = {}
    for name, factor in (("slow", 3.0), ("fast", 1.0)):
        table = LatencyTable.load(base / "latency_table.json")
        table.entries = {
            key: replace(entry, ratio=factor * entry.ratio, latency_us=factor * entry.latency_us)
            for key, entry in table.entries.items()
        }
        (tmp_path / name).mkdir()
        table.save(tmp_path / name / "latency_table.json", keep_others=False)
        tables[name] = tmp_path / name
    devices = tuple(str(path) for path in tables.values())
    job = job_of(tmp_path, base, search=SearchGrid(("random",), (0, 1), (5,), devices))
    files = base_files(base, {k: v / "latency_table.json" for k, v in tables.items()}, True)
    found = []
    for spec in trials_of(job)[::3]:  # one seed for one device, the other for the other
        reports = Reports(tmp_path / spec.label)
        search_in(tmp_path / "run", files, spec, reports, checkpoint_s=1e9)
        found.append(Found(spec, reports.last, reports.metrics[-1]))
    monkeypatch.setattr("nas.cluster.merge_results.write_report", lambda folder: folder)
    results = merge_searches(job, files, found)
    assert [result["device"] for result in results] == ["slow", "fast"]
    assert [len(result["trials"]) for result in results] == [1, 1]
    slow, fast = (
        {item.arch.id: item.values for item in read_evaluated(
            sqlite_url(Path(result["folder"])), ("loss", "latency_ms"))}
        for result in results
    )  # fmt: skip
    assert slow.keys() == fast.keys() and len(slow) > 5  # more than one search finds
    for arch_id, (loss, latency_ms) in slow.items():
        assert loss == fast[arch_id][0]
        assert latency_ms == pytest.approx(3 * fast[arch_id][1])


def test_the_common_scale_of_hypervolumes() -> None:
    everything = np.array([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]])
    assert scaled_hypervolume(everything[:1], everything) == pytest.approx(1.1**2)
    assert scaled_hypervolume(everything[1:], everything) == pytest.approx(0.6**2)
    assert scaled_hypervolume(everything[:0], everything) == 0.0
    unit = np.array([[0.0, 0.5], [0.5, 0.0]])
    assert scaled_hypervolume(unit, unit * 2) == pytest.approx(hypervolume(unit, [1.1, 1.1]))


def test_trainings_are_compared_and_become_run_folders(base: Path, tmp_path: Path) -> None:
    grid = TrainingGrid(hyperparameters={"num_steps": [2, 3], "matrix_lr": [0.01]})
    job = job_of(tmp_path, base, training=grid)
    files = base_files(base, {}, with_supernet=False)
    assert not any(name.startswith("supernet") for name in files)
    found = []
    for spec in trials_of(job):
        killed = Reports(tmp_path / f"{spec.label}-killed", kill_after=1)
        with pytest.raises(Killed):
            train_in(tmp_path / "run", files, spec, killed, checkpoint_s=-1.0)
        assert killed.metrics[0]["step"] == 1 and killed.metrics[0]["train_largest"] > 0
        reports = Reports(tmp_path / spec.label)
        train_in(tmp_path / "run", files, spec, reports, checkpoint=killed.last, checkpoint_s=-1.0)
        found.append(Found(spec, reports.last, reports.metrics[-1]))
    rows = merge_trainings(job, files, found)
    assert [set(row) for row in rows] == [
        {"label", "folder", "changes", "loss_random", "loss_largest", "loss_smallest"}
    ] * 2
    assert rows[0]["loss_random"] <= rows[1]["loss_random"]
    assert json.loads((tmp_path / "out" / "trials.json").read_text()) == rows
    for row in rows:
        folder = Path(row["folder"])
        config = load_config(str(folder / "config.json"))
        steps = row["changes"]["train.num_steps"]
        assert config.train.num_steps == steps and config.out == str(folder)
        state = read_state(folder / "supernet")
        assert state is not None and state.done and state.step == steps
        lines = (folder / "supernet" / "log.jsonl").read_text().splitlines()
        assert len(lines) == steps
        load_supernet(SearchSpace.load("decoder-tiny", 384), folder / "supernet")


def test_a_base_run_is_made_of_a_config_where_there_is_none(base: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    text = (base.parent / "run.toml").read_text().replace("num_steps = 8", "num_steps = 1")
    config.write_text(f'out = "{tmp_path / "run"}"\n{text}')
    grid = SearchGrid(devices=(str(base),))
    job = JobConfig("job", str(config), str(tmp_path / "out"), "/storage", search=grid)
    files = prepared_files(job, Reporter(quiet=True))
    assert {"config.json", "supernet/model.safetensors", "task/task.json"} <= set(files)
    assert files["base/latency_table.json"] == (base / "latency_table.json").read_bytes()
    assert "latency_table.json" not in files  # nothing is timed where devices are named
    assert prepared_files(replace(job, run=str(tmp_path / "run")), Reporter(quiet=True)) == files


def test_only_the_asked_parts_travel(base: Path) -> None:
    names = set(read_files(base, ["supernet", "absent", "config.json"]))
    assert names == {
        "config.json", "supernet/log.jsonl", "supernet/model.safetensors", "supernet/state.json",
    }  # fmt: skip
