"""`nas assign`: on a small run folder, from scores to evaluated networks."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hw_profiles.backends import get_backend
from hw_profiles.device import Device
from hw_profiles.latency_table import LatencyTable
from nas.assignment.score_file import FILE
from nas.cli import build_parser, main
from nas.config import load_config
from nas.pipeline import Pipeline
from nas.progress import Reporter
from nas.study import evaluated, open_study
from nas.training.state import TrainState, save_state
from searchspace.arch import Arch
from searchspace.space import SearchSpace
from searchspace.supernet import Supernet

CONFIG = """
preset = "decoder-tiny"
out = {out!r}
[task]
name = "text"
data = {data!r}
vocab_size = 384
seq_len = 64
[profile]
workloads = ["prefill_b1_t64", "decode_b1_t64"]
num_threads = 1
[search]
objectives = ["loss", "latency_ms", "weight_bytes"]
evaluation_tokens = 256
"""
ONLY = [
    word
    for text in ("d_model=32", "mixer=softmax,none", "ffn=relu2", "position=rope", "heads=4x4,2x1",
                 "norm=layernorm")
    for word in ("--only", text)
]  # fmt: skip
ROOT = Path(__file__).parents[2]
FAST = [*ONLY, "--score-tokens", "64", "--evaluate", "2"]


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory,
    text_file: Path,
    table: LatencyTable,
    space: SearchSpace,
) -> Path:
    """A run folder with a task, a latency table and the weights of a supernet."""
    folder = tmp_path_factory.mktemp("runs") / "trained"
    config = folder.parent / "config.toml"
    config.write_text(CONFIG.format(out=str(folder), data=str(text_file)))
    pipeline = Pipeline(load_config(str(config)), Reporter(quiet=True))
    assert pipeline.space == space
    # Preparing the process is part of what a table's device is.
    here = replace(table, device=Device.current(get_backend("eager")))
    here.save(folder / "latency_table.json", keep_others=False)
    supernet = Supernet(space, torch.Generator().manual_seed(0))
    save_state(
        folder / "supernet", TrainState(1, done=True), {"weights": supernet.state_dict()}
    )  # fmt: skip
    return folder


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def assigned(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    assert main(["assign", *FAST, *map(str, arguments), "--json", "--quiet"]) == 0
    return dict(json.loads(capsys.readouterr().out))


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert main(["assign", *map(str, arguments), "--quiet"]) == 2
    out, error = capsys.readouterr()
    assert out == "" and len(error.strip().splitlines()) == 1
    return error


def test_networks_keep_the_limits_and_become_trials_of_the_study(
    folder: Path, table: LatencyTable, capsys: pytest.CaptureFixture[str]
) -> None:
    limits = "--constraint", "latency_ms<=0.07", "--constraint", "weight_bytes<=120000"
    (budget,) = assigned(capsys, folder, *limits)["budgets"]
    assert budget["status"] == "optimal" and budget["gap"] == 0.0
    networks = budget["networks"]
    assert len({network["depth"] for network in networks}) == len(networks) > 1
    for network in networks:
        arch = Arch.from_dict(network["arch"])
        whole = table.latency_ms(arch, table.workloads[0])
        assert network["table_ms"]["latency_ms"] == pytest.approx(whole) and whole <= 0.07
        assert network["costs"]["latency_ms"] == pytest.approx(whole)
        assert network["costs"]["weight_bytes"] <= 120_000
    losses = {n["arch_id"]: n["loss"] for n in networks if n["loss"] is not None}
    assert list(losses) == [n["arch_id"] for n in networks[:2]]
    assert budget["best"] == min(losses, key=lambda arch_id: losses[arch_id])

    pipeline = Pipeline(load_config(str(folder / "config.json"), out=str(folder)), Reporter(True))
    study = open_study(pipeline.storage, pipeline.objectives)
    trials = {item.arch.id: item for item in evaluated(study)}
    assert {arch_id: trials[arch_id].values[0] for arch_id in losses} == losses
    num_trials = len(study.trials)
    (again,) = assigned(capsys, folder, *limits)["budgets"]
    assert {n["arch_id"]: n["loss"] for n in again["networks"][:2]} == losses
    assert len(open_study(pipeline.storage, pipeline.objectives).trials) == num_trials


def test_another_budget_needs_no_new_score(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = assigned(capsys, folder, "--constraint", "latency_ms<=0.08")
    scores = (folder / FILE).read_bytes()
    second = assigned(capsys, folder, "--constraint", "latency_ms<=0.06", "--evaluate", "0")
    assert (folder / FILE).read_bytes() == scores
    best = [result["budgets"][0]["networks"][0]["predicted_loss"] for result in (first, second)]
    assert best[0] <= best[1]
    assert all(n["loss"] is None for n in second["budgets"][0]["networks"])


def test_a_sweep_gives_a_front(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    budgets = assigned(capsys, folder, "--sweep", "latency_ms", "3")["budgets"]
    assert len(budgets) == 3
    values = [float(b["constraints"][-1].partition("<=")[2]) for b in budgets]
    predicted = [b["networks"][0]["predicted_loss"] for b in budgets]
    assert values == sorted(values, reverse=True) and predicted == sorted(predicted)


def test_the_table_shows_sum_and_table_side_by_side(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["assign", str(folder), "--constraint", "latency_ms<=0.07", *FAST, "--quiet"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "sum / table" in shown and "scores added up" in shown and "optimal" in shown
    assert main([*arguments, "--sweep", "latency_ms", "2"]) == 0
    assert "latency_ms<=" in capsys.readouterr().out


def test_impossible_limits_are_answered_with_what_is_reachable(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limits = "--constraint", "latency_ms<=0.001", "--constraint", "weight_bytes<=120000"
    error = refused(capsys, folder, *limits, *FAST)
    assert "no assignment keeps latency_ms<=0.001: the smallest latency_ms of the space is" in error
    assert main(["assign", str(folder), *limits, *FAST, "--quiet", "--json"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert found["status"] == "infeasible" and found["blocking"] == ["latency_ms<=0.001"]
    assert found["nearest"]["latency_ms"] == pytest.approx(found["alone"]["latency_ms<=0.001"])


def test_mistakes_are_one_sentence(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        ((), "give --constraint"),
        (("--constraint", "latency<=3"), "did you mean 'latency_ms'"),
        (("--constraint", "latency_ms=3"), "is not understood"),
        (("--sweep", "latency", "3"), "unknown metric"),
        (("--sweep", "latency_ms", "1"), "at least 2"),
        (("--constraint", "params<=1e9", "--score-tokens", "0"), "--score-tokens 0"),
        (("--constraint", "params<=1e9", "--time-limit", "0"), "--time-limit"),
        (("--constraint", "params<=1e9", "--only", "mixer=gal"), "did you mean 'gla'"),
    ):
        assert words in refused(capsys, folder, *arguments)
    assert "no config.json" in refused(capsys, folder / "nowhere", "--constraint", "params<=1")
    (folder / "supernet" / "state.json").unlink()
    assert "nas train" in refused(capsys, folder, "--constraint", "params<=1e9")


def test_a_killed_command_goes_on(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["assign", str(folder), "--constraint", "params<=1e9", *FAST, "--quiet", "--json"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    process = subprocess.Popen(
        [sys.executable, "-m", "nas", *arguments], stdout=subprocess.DEVNULL, env=environment
    )
    path = folder / FILE
    deadline = time.monotonic() + 120
    while not path.exists() or len(path.read_bytes().splitlines()) < 5:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = path.read_text()
    assert main(arguments) == 0
    after = path.read_text()
    assert after.startswith(before[: before.rindex("\n") + 1]) and len(after) > len(before)
    names = re.findall(r'"name": "([^"]+)"', after)
    assert len(names) == len(set(names))
    assert json.loads(capsys.readouterr().out)["budgets"][0]["status"] == "optimal"


def test_the_readme_command_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^nas (assign .*)$", readme, flags=re.MULTILINE)
    assert commands
    for command in commands:
        arguments = shlex.split(command.replace("runs/quickstart", str(folder)))
        assert callable(build_parser().parse_args(arguments).command)
        loose = [re.sub(r"<=.*", "<=1e9", word) for word in arguments]
        kept = [w for i, w in enumerate(loose) if "--only" not in (w, loose[i - 1])]
        assert main([*kept, *FAST, "--quiet"]) == 0
        assert "scores added up" in capsys.readouterr().out
