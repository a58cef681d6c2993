"""`nas search` and `nas study merge`: options, what is shown, workers, what may change later."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from hw_profiles.latency_table import LatencyTable
from nas._search_options import search_values
from nas.cli import build_parser
from nas.config import load_config
from nas.pipeline import Pipeline
from nas.progress import Reporter
from nas.samplers import SAMPLERS
from nas.search_view import _Lines, front_table, headline, search_view
from nas.study import Snapshot, evaluated, studies_at

ROOT = Path(__file__).parents[2]
CONFIG = """
preset = "decoder-tiny"
[task]
name = "text"
data = {data!r}
vocab_size = 384
seq_len = 64
[train]
num_steps = 2
batch_size = 2
[profile]
workloads = ["prefill_b1_t64", "decode_b1_t64"]
[search]
workload = "prefill_b1_t64"
num_evaluations = 4
evaluation_tokens = 256
metrics = []
"""


def nas(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "nas", *arguments], capture_output=True,
                          text=True, env=environment())  # fmt: skip


def environment() -> dict[str, str]:
    paths = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def ready(
    tmp_path_factory: pytest.TempPathFactory, text_file: Path, table: LatencyTable
) -> Iterator[Path]:
    """A run folder with a supernet and a made-up table of this device, before any search."""
    folder = tmp_path_factory.mktemp("runs") / "ready"
    path = folder.parent / "config.toml"
    path.write_text(CONFIG.format(data=str(text_file)))
    Pipeline(load_config(str(path), out=str(folder)), Reporter(quiet=True)).train()
    # The commands run in processes whose settings make them another device than this one.
    program = (
        "import sys; from pathlib import Path; from hw_profiles.process import prepare_process; "
        "prepare_process(); from nas.cli import main; from tests.nas.conftest import "
        "synthetic_table; from searchspace.space import SearchSpace; "
        "synthetic_table(SearchSpace.load('decoder-tiny', 384, {'kind': 'decoder'}))"
        ".save(Path(sys.argv[1]), keep_others=False)"
    )
    subprocess.run([sys.executable, "-c", program, str(folder / "latency_table.json")],
                   env=environment(), check=True, cwd=ROOT)  # fmt: skip
    yield folder


@pytest.fixture
def run_folder(ready: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(ready, tmp_path / "run"))


def options(*arguments: str) -> dict[str, object]:
    return search_values(build_parser().parse_args(arguments))


def test_options_stand_for_keys_of_the_config() -> None:
    given = options(
        "search", "runs/x", "--sampler", "nsga2", "--objectives", "loss, latency_ms",
        "--constraint", "latency_ms<=8", "--constraint", "weight_bytes<=1e6,params<=9", "--evals",
        "200", "--workers", "4", "--storage", "journal:a.log#b",
    )  # fmt: skip
    search = load_config(None, (), **given).search
    assert search.sampler == "nsga2" and search.objectives == ("loss", "latency_ms")
    assert search.constraints == ("latency_ms<=8", "weight_bytes<=1e6", "params<=9")
    assert (search.num_evaluations, search.workers) == (200, 4)
    assert search.storage == "journal:a.log#b"
    assert options("run", "--constraint", "none")["search__constraints"] == []
    assert all(value is None for value in options("run").values())
    assert options("report", "runs/x") == {}


def test_every_sampler_is_listed() -> None:
    done = nas("search", "--list-samplers")
    assert done.returncode == 0
    assert [line.split()[0] for line in done.stdout.splitlines()] == list(SAMPLERS)


def state(size: int) -> Snapshot:
    front = tuple((f"arch{i:02}", (2.0 + i, 1.0 / (i + 1))) for i in range(size))
    return Snapshot(("loss", "latency_ms"), 40, 2, front, 0.9 if size else 0.0, 2.0)


def test_lines_come_now_and_then_and_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[int] = []

    def look() -> Snapshot:
        asked.append(1)
        return state(3)

    with search_view() as view:
        assert isinstance(view, _Lines)
        for step in range(100):
            view.update(step / 100, look)
    out = capsys.readouterr()
    lines = out.err.splitlines()
    assert out.out == "" and len(lines) == len(asked) == 11
    assert lines[0].startswith("search:   0%, 40 evaluated, 2 failed, front 3, hypervolume 0.9000")
    assert lines[-1].startswith("search:  99%")


def test_quiet_shows_nothing_and_looks_at_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with search_view(quiet=True) as view:
        view.update(0.5, lambda: pytest.fail("looked"))
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("size", "rows"), [(0, 0), (1, 1), (12, 12), (40, 12)])
def test_the_table_holds_the_ends_of_the_front(size: int, rows: int) -> None:

    table = front_table(state(size))
    assert table.row_count == rows
    arch_ids = list(table.columns[0].cells)
    if size:
        assert arch_ids[0] == "arch00" and arch_ids[-1] == f"arch{size - 1:02}"
        assert len(set(arch_ids)) == rows
    assert ("none keeps every constraint so far" in headline(state(size))) == (size == 0)


def test_the_table_is_replaced_in_place_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr("nas.search_view.REFRESH_S", 0.0)
    with search_view() as view:
        for step in range(3):
            view.update(step / 2, lambda: state(2))
    out = capsys.readouterr()
    assert out.out == ""
    assert "\x1b[1A" in out.err, "the cursor goes up to draw over the last table"
    assert "search 100%" in out.err


@pytest.mark.slow
def test_a_search_goes_on_with_more_evaluations_and_other_objectives(run_folder: Path) -> None:
    url = f"sqlite:///{run_folder / 'study.db'}"
    first = nas("search", str(run_folder), "--evals", "5")
    assert first.returncode == 0, first.stderr
    assert first.stdout == f"search done: {run_folder}\n"
    assert "search: 100%, 5 evaluated" in first.stderr
    (study,) = studies_at(url)
    before = {item.arch.id for item in evaluated(study)}
    assert len(before) == 5
    more = nas("search", str(run_folder), "--evals", "7", "--quiet")
    assert (more.returncode, more.stderr) == (0, "")
    after = [t.user_attrs["arch_id"] for t in evaluations_of(study)]
    assert len(after) == len(set(after)) == 7 and before < set(after)
    other = nas("search", str(run_folder), "--objectives", "loss,params", "--constraint",
                "weight_bytes<=1e6", "--sampler", "random", "--evals", "8", "--quiet")  # fmt: skip
    assert other.returncode == 0, other.stderr
    second = studies_at(url)[1]
    assert set(after) < {item.arch.id for item in evaluated(second)}
    summary = json.loads((run_folder / "search.json").read_text())
    assert summary["objectives"] == ["loss", "params"] and len(summary["hypervolume"]) == 8


@pytest.mark.slow
def test_wrong_and_impossible_searches_end_early_and_leave_the_config(run_folder: Path) -> None:
    nas("report", str(run_folder), "--quiet")
    config = (run_folder / "config.json").read_text()
    for arguments, sentence in (
        (["--constraint", "latency_ms<=1e-6"], "latency_ms<=1e-06 alone, where the least"),
        (["--sampler", "randm"], "did you mean 'random'"),
        (["--storage", "study.db"], "is no storage"),
        (["--storage", "postgresql://a:secret@localhost:1/b"], "postgresql://a:***@localhost"),
        (["--objectives", "latency_ms"], "lacks 'loss'"),
        (["--evals", "0"], "is below 1"),
        (["--workers", "0"], "is below 1"),
    ):
        done = nas("search", str(run_folder), *arguments, "--quiet")
        assert done.returncode == 2 and sentence in done.stderr, done.stderr
        assert len(done.stderr.strip().splitlines()) == 1 and "secret" not in done.stderr
        assert (run_folder / "config.json").read_text() == config
    assert not (run_folder / "study.db").exists(), "something was evaluated"


@pytest.mark.slow
def test_when_no_loss_is_low_enough_the_nearest_is_said_and_nothing_is_exported(
    run_folder: Path,
) -> None:
    (run_folder / "front.json").write_text("{}")
    done = nas("search", str(run_folder), "--constraint", "loss<=0.1", "--evals", "4")
    assert done.returncode == 0, done.stderr
    assert "none of 4 evaluated archs keeps every constraint; the nearest is" in done.stderr
    refused = nas("export", str(run_folder), "--quiet")
    assert refused.returncode == 2 and "which breaks loss<=0.1" in refused.stderr
    assert not (run_folder / "front.json").exists() and not (run_folder / "subnets").exists()
    assert "the nearest is" in (run_folder / "report.html").read_text()


def evaluations_of(study: Study) -> list[FrozenTrial]:
    """Completed trials that were really evaluated, and not copied from an equal one."""
    done = study.get_trials(states=(TrialState.COMPLETE,))
    return [trial for trial in done if "seconds" in trial.user_attrs]


@pytest.mark.slow
def test_workers_share_a_search_one_is_killed_and_ctrl_c_stops_all(run_folder: Path) -> None:
    done = nas("search", str(run_folder), "--workers", "3", "--evals", "12", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["stage"] == "search"
    (study,) = studies_at(f"sqlite:///{run_folder / 'study.db'}")
    real = evaluations_of(study)
    assert len({t.user_attrs["arch_id"] for t in real}) == len(real) == 12
    command = [sys.executable, "-m", "nas", "search", str(run_folder), "--workers", "3"]
    with subprocess.Popen([*command, "--evals", "5000"], env=environment(), text=True,
                          stderr=subprocess.PIPE, stdout=subprocess.PIPE) as parent:  # fmt: skip
        while len(evaluations_of(study)) < 16:
            assert parent.poll() is None
            time.sleep(0.1)
        # The newest trials may not say yet whose they are.
        attrs = [t.user_attrs for t in study.trials[-6:]]
        owners = {item["owner"]["process"] for item in attrs if "owner" in item}
        victim = max(owners)
        os.kill(victim, signal.SIGKILL)
        before = len(study.trials)
        while len(study.trials) < before + 8:
            assert parent.poll() is None
            time.sleep(0.1)
        parent.send_signal(signal.SIGINT)
        _, said = parent.communicate(timeout=60)
    assert parent.returncode == 130
    assert "was ended by SIGKILL" in said and "the same command goes on from here" in said
    for process in owners:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)
    real = evaluations_of(study)
    assert len({t.user_attrs["arch_id"] for t in real}) == len(real)
    again = nas("search", str(run_folder), "--workers", "1", "--evals", str(len(real) + 2))
    assert again.returncode == 0, again.stderr
    assert not study.get_trials(states=(TrialState.RUNNING,))
    assert len(evaluated(study)) == len(real) + 2


@pytest.mark.slow
def test_runs_are_merged_or_a_sentence_says_why_not(run_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(run_folder, other)
    for folder, sampler in ((run_folder, "predictor"), (other, "random")):
        done = nas("search", str(folder), "--sampler", sampler, "--evals", "5", "--quiet")
        assert done.returncode == 0, done.stderr
    out = tmp_path / "both"
    done = nas("study", "merge", str(run_folder), str(other), "--out", str(out), "--json")
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    assert counts["from_first"] == 5 and counts["from_second"] + counts["in_both"] == 5
    total = 5 + counts["from_second"]
    more = nas("search", str(out), "--evals", str(total + 1), "--quiet")
    assert more.returncode == 0, more.stderr
    (study,) = studies_at(f"sqlite:///{out / 'study.db'}")
    assert len(evaluated(study)) == total + 1

    def refused(sentence: str, *more: str) -> None:
        done = nas("study", "merge", str(run_folder), str(other), "--out", *more)
        assert done.returncode == 2 and sentence in done.stderr, done.stderr

    refused("is there and not empty", str(out))
    nas("search", str(other), "--objectives", "loss,params", "--evals", "5", "--quiet")
    refused("only runs with the same can be merged", str(tmp_path / "new"))
    nas("search", str(other), "--objectives", "loss,latency_ms,weight_bytes", "--quiet")
    weights = other / "supernet" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\x00\x00\x00\x01")
    refused("the supernets of", str(tmp_path / "new"))
    done = nas("search", str(other), "--evals", "6", "--quiet")
    assert done.returncode == 2 and "holds losses of another supernet" in done.stderr
    config = json.loads((other / "config.json").read_text())
    config["preset"] = "decoder-small"
    (other / "config.json").write_text(json.dumps(config))
    refused("only runs of the same space can be merged", str(tmp_path / "new"))
    (other / "config.json").unlink()
    refused("is no run folder", str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()
