"""Jobs on a Ray of this machine: processes and the driver are killed, and `--resume` goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nas.config import load_config
from nas.pipeline import Pipeline
from nas.progress import Reporter
from nas.study import evaluated, sqlite_url, studies_at
from nas.training import load_supernet, read_state
from searchspace.files import read_json
from tests.cluster.base_run import make_base

pytest.importorskip("ray")
pytestmark = pytest.mark.cluster

ROOT = Path(__file__).parents[2]
PATIENCE_S = 120.0


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


def write_job(folder: Path, base: Path, section: str) -> Path:
    path = folder / "job.toml"
    path.write_text(
        f'name = "job"\nrun = "{base}"\nout = "{folder / "out"}"\nstorage = "{folder / "ray"}"\n'
        f"checkpoint_s = 0.5\n{section}\n"
    )
    return path


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start `nas cluster` on a job; what still runs at the end of the test is ended."""
    started: list[subprocess.Popen[str]] = []

    def run(job: Path, *options: str) -> subprocess.Popen[str]:
        paths = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"
        command = [sys.executable, "-m", "nas", "cluster", str(job), "--json", *options]
        started.append(subprocess.Popen(
            command, env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        ))  # fmt: skip
        return started[-1]

    yield run
    for process in started:
        if process.poll() is None:
            kill(process)


def wait_for(what: Callable[[], object], process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + PATIENCE_S
    while not what():
        if process.poll() is not None or time.monotonic() > until:
            process.kill()
            raise AssertionError(f"it did not come: {process.communicate()}")
        time.sleep(0.05)


def descendants(process: int) -> dict[int, str]:
    """Return the command lines of all processes that a process started, directly or not."""
    parents, names = {}, {}
    for entry in Path("/proc").iterdir():
        try:
            parents[int(entry.name)] = int(
                (entry / "stat").read_text().rpartition(")")[2].split()[1]
            )
            names[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ")
        except (ValueError, OSError):
            continue

    def is_below(number: int) -> bool:
        while number in parents:
            number = parents[number]
            if number == process:
                return True
        return False

    return {number: names[number] for number in parents if number in names and is_below(number)}


def kill(process: subprocess.Popen[str]) -> None:
    """End the driver as a power cut would; the local Ray that it started ends with it."""
    started = descendants(process.pid)
    process.kill()
    process.communicate()
    # Ray's own agents of a node take minutes to see that it is gone.
    agents = {number for number, name in started.items() if "Agent" in name}
    until = time.monotonic() + 30.0
    while any(is_running(number) for number in started.keys() - agents):
        assert time.monotonic() < until, "processes were left behind"
        time.sleep(0.1)
    for number in filter(is_running, agents):
        os.kill(number, signal.SIGKILL)


def is_running(number: int) -> bool:
    """Return whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def finish(process: subprocess.Popen[str], code: int = 0) -> dict[str, object]:
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == code, err
    shown: dict[str, object] = json.loads(out)
    return shown


def last_report(folder: Path) -> dict[str, object]:
    """Return the last whole line of what Tune writes of a trial."""
    path = folder / "result.json"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    return json.loads(whole[-1]) if whole else {}


def test_searches_survive_the_kill_of_a_trial_and_of_the_driver(
    base: Path, tmp_path: Path, start: Start
) -> None:
    grid = '[search]\nsamplers = ["random", "nsga2"]\nevaluations = [60]'
    job, trials = write_job(tmp_path, base, grid), tmp_path / "ray" / "job"
    first = start(job)
    wait_for(lambda: list(trials.glob("*/checkpoint_*/study.db")), first)
    running = [
        n for n, name in descendants(first.pid).items() if name.startswith("ray::ImplicitFunc")
    ]
    assert running
    os.kill(running[0], signal.SIGKILL)
    # Once the killed trial is under way again, on its own or after the other.
    labels = ("random-60-seed0", "nsga2-60-seed0")
    wait_for(lambda: all(last_report(trials / label) for label in labels), first)
    kill(first)
    assert start(job).wait(PATIENCE_S) == 2  # without --resume nothing is begun anew
    shown = finish(start(job, "--resume"))
    assert shown["failed"] == {}
    ids: dict[str, list[str]] = {}
    for label in labels:
        newest = max(trials.glob(f"{label}/checkpoint_*"))
        (study,) = studies_at(sqlite_url(newest))
        ids[label] = [item.arch.id for item in evaluated(study)]
        assert len(ids[label]) == len(set(ids[label])) == 60
        assert last_report(trials / label)["evaluations"] == 60
    (merged,) = studies_at(sqlite_url(tmp_path / "out"))
    found = {item.arch.id for item in evaluated(merged)}
    assert found == {arch_id for several in ids.values() for arch_id in several}
    assert len(found) > 60
    assert "(2 searches)" in (tmp_path / "out" / "report.html").read_text()
    assert read_json(tmp_path / "out" / "trials.json", "trials")["evaluations"] == len(found)


def test_a_training_goes_on_with_another_number_of_workers(
    base: Path, tmp_path: Path, start: Start
) -> None:
    values = (
        "hyperparameters = { num_steps = [24], num_random = [2], first_stage_share = [0.2], "
        "matrix_lr = [0.02, 1e30], other_lr = [0.003] }"
    )
    job = write_job(tmp_path, base, f"[training]\nnum_workers = 2\n{values}")
    first = start(job)
    folders = tmp_path / "ray" / "job"
    wait_for(lambda: any(reached(folder, 6) for folder in folders.glob("*lr0.02-*")), first)
    kill(first)
    job = write_job(tmp_path, base, f"[training]\nnum_workers = 1\n{values}")
    shown = finish(start(job, "--resume"), code=1)
    # The one that diverges ends with its reason, and is not tried again and again.
    ((label, reason),) = dict(shown["failed"]).items()  # type: ignore[call-overload]
    assert "matrix_lr1e+30" in label and "lower train.matrix_lr" in reason
    ((trained,),) = [list((tmp_path / "out").glob("num_steps*"))]
    state = read_state(trained / "supernet")
    assert state is not None and state.done and state.step == 24
    log = log_of(trained)
    assert [entry["step"] for entry in log] == list(range(1, 25))
    config = load_config(str(trained / "config.json"), out=str(tmp_path / "alone"))
    alone = Pipeline(config, Reporter(quiet=True))
    alone.train()
    load_supernet(alone.space, trained / "supernet")
    for mine, other in zip(log, log_of(tmp_path / "alone"), strict=True):
        assert mine.keys() == other.keys()
        assert all(mine[k] == pytest.approx(other[k], rel=0.02) for k in mine if k != "elapsed_s")


def reached(folder: Path, step: int) -> bool:
    return int(str(last_report(folder).get("step", 0))) >= step


def log_of(folder: Path) -> list[dict[str, float]]:
    lines = (folder / "supernet" / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]
