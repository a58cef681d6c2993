"""The command line: instant help, exit codes, one sentence for every mistake, kill and resume."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import optuna
import pytest

from hw_profiles.latency_table import LatencyTable
from nas.tasks.registry import TASKS

ROOT = Path(__file__).parents[2]
TINY = """
preset = "decoder-tiny"
budget = "100s"
[task]
name = "text"
data = {data!r}
vocab_size = 384
seq_len = 64
[train]
num_steps = 30
batch_size = 4
checkpoint_s = 0.5
[profile]
workloads = ["prefill_b1_t64", "decode_b1_t64"]
budget_s = 6.0
[search]
workload = "prefill_b1_t64"
num_evaluations = 20
evaluation_tokens = 2048
metric_pool = 8
[export]
front_size = 4
test_tokens = 2048
"""


def nas(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, env=environment(),
                          **options)  # type: ignore[call-overload, no-any-return]  # fmt: skip


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "nas", *arguments]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}


@pytest.fixture
def config(tmp_path: Path, text_file: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(TINY.format(data=str(text_file)))
    return path


def test_help_needs_neither_torch_nor_time() -> None:
    program = (
        "import sys, nas.cli\n"
        "try: nas.cli.main(['--help'])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "heavy = {'torch', 'numpy', 'optuna', 'rich', 'pymoo', 'ray'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", program], env=environment(), capture_output=True,
                          text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    for name in ("run", "profile", "train", "search", "export", "report", "generate", "doctor"):
        assert name in done.stdout
    assert all(f"  {name} " in done.stdout for name in TASKS)


def test_help_of_a_run_lists_the_tasks_and_who_takes_data() -> None:
    done = nas("run", "--help")
    text = " ".join(done.stdout.split())
    assert all(kind.summary in text for kind in TASKS.values())
    assert "for --task text, tokens or text_classification; without --task, text" in text


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["run", "--preset", "decoder-smal"], "did you mean 'decoder-small'"),
        (["run", "--set", "search.smpler=random"], "did you mean 'search.sampler'"),
        (["run", "--set", "search.sampler=randm"], "did you mean 'random'"),
        (["run", "--set", 'search.metrics=["synflw"]'], "did you mean 'synflow'"),
        (["run", "--set", "search.constraints=latncy_ms<=8"], "did you mean 'latency_ms'"),
        (["run", "--task", "txt"], "did you mean 'text'"),
        (["run", "--task", "digits", "--data", "x"], "digits, which does not use it"),
        (["profile", "--task", "digits"], "the task needs a vit"),
        (["run", "--budget", "soon"], "is not a duration"),
        (["run", "--seed", "-3"], "is negative"),
        (["run", "absent.toml"], "no config file"),
        (["run", "--data", "absent-*.txt"], "absent-*.txt"),
        (["generate", "absent", "--prompt", "x"], "there is no subnetwork config"),
        (["search", "--data", "{text}"], "run `nas profile` first"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(
    arguments: list[str], sentence: str, tmp_path: Path, text_file: Path
) -> None:
    out = [] if arguments[0] == "generate" else ["--out", str(tmp_path / "out"), "--quiet"]
    done = nas(*(a.format(text=text_file) for a in arguments), *out, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(b"", "is empty"), (b"\x00\x01\x02" * 5000, "is not text"), (b"short", "it has 5 bytes")],
)
def test_unusable_text_is_refused_before_anything_is_trained(
    content: bytes, sentence: str, tmp_path: Path
) -> None:
    (tmp_path / "data.txt").write_bytes(content)
    done = nas(
        "run", "--data", str(tmp_path / "data.txt"), "--out", str(tmp_path / "out"), "--quiet"
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert sentence in done.stderr
    assert not (tmp_path / "out" / "supernet").exists()


def test_foreign_and_unwritable_folders_are_refused(config: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("mine")
    done = nas("run", str(config), "--out", str(foreign), "--quiet")
    assert done.returncode == 2 and "is not empty and holds no run" in done.stderr
    assert [p.name for p in foreign.iterdir()] == ["thesis.tex"]
    (tmp_path / "file").write_text("")
    done = nas("run", str(config), "--out", str(tmp_path / "file" / "run"), "--quiet")
    assert done.returncode == 2 and "cannot write" in done.stderr


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    while not condition():
        assert process.poll() is None, "the command ended before it could be killed"
        time.sleep(0.02)


def kill_when(condition: Callable[[], bool], config: Path, out: Path) -> None:
    """Start the whole job in a process of its own and kill -9 it once the condition holds."""
    with (out.parent / "log.txt").open("ab") as log:
        process = subprocess.Popen(command("run", str(config), "--out", str(out), "--quiet"),
                                   env=environment(), stdout=log, stderr=log)  # fmt: skip
        try:
            wait_for(condition, process)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()


def trials(out: Path) -> list[optuna.trial.FrozenTrial]:
    if not (out / "study.db").exists():
        return []
    try:
        storage = optuna.storages.RDBStorage(f"sqlite:///{out / 'study.db'}")
        study = optuna.load_study(study_name="search", storage=storage)
        return study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    except Exception:
        # The search has only just begun to make its file.
        return []


def num_entries(out: Path) -> int:
    path = out / "latency_table.json"
    return path.read_text().count("measured_at") if path.exists() else 0


@pytest.mark.slow
def test_killed_in_every_stage_the_same_command_goes_on_and_loses_nothing(
    config: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    kill_when(lambda: num_entries(out) > 20, config, out)
    entries = LatencyTable.load(out / "latency_table.json").entries
    kill_when((out / "supernet" / "state.json").exists, config, out)
    later = LatencyTable.load(out / "latency_table.json").entries
    for name, entry in entries.items():
        assert later[name].num_samples >= entry.num_samples > 0, "measured rounds were lost"
    step = json.loads((out / "supernet" / "state.json").read_text())["step"]
    assert step > 0
    kill_when(lambda: len(trials(out)) >= 6, config, out)
    before = {t.number: (t.user_attrs["arch_id"], t.values) for t in trials(out)}
    kill_when(lambda: (out / "measurements.json").exists(), config, out)
    kill_when(lambda: any(out.glob("subnets/[!.]*")), config, out)
    done = nas("run", str(config), "--out", str(out), "--quiet", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)

    finished = trials(out)
    after = {t.number: (t.user_attrs["arch_id"], t.values) for t in finished}
    assert before.items() <= after.items(), "a finished evaluation was lost"
    evaluated = [t.user_attrs["arch_id"] for t in finished if "seconds" in t.user_attrs]
    assert len(evaluated) == len(set(evaluated)) == 20, "an evaluation was repeated"
    log = [json.loads(line) for line in (out / "supernet" / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == list(range(1, 31))
    for path in result["subnets"].values():
        formats = json.loads((Path(path) / "export.json").read_text())["formats"]
        assert max(formats["hf"]["verified"]["differences"]) <= 1e-4
    assert not list(out.rglob("*.tmp")), "something half-written was left"
    check_complete(out, result)
    check_commands_on_a_finished_run(config, out, result)


def check_complete(out: Path, result: dict[str, object]) -> None:
    names = ["config.json", "latency_table.json", "study.db", "front.csv", "front.json",
             "report.html", "search.json", "supernet/model.safetensors"]  # fmt: skip
    assert all((out / name).is_file() for name in names)
    front = result["front"]
    assert isinstance(front, dict)
    assert set(front["chosen"].values()) <= set(result["subnets"])  # type: ignore[call-overload]
    assert {r["arch_id"] for r in front["groups"]["front"]} == set(result["subnets"])  # type: ignore[call-overload]
    for group in ("front", "random", "uniform"):
        assert front["hypervolume"][group] > 0


def check_commands_on_a_finished_run(config: Path, out: Path, result: dict[str, object]) -> None:
    """Other commands on the finished folder: generate, report, refusals."""
    path = next(iter(result["subnets"].values()))  # type: ignore[attr-defined]
    text = nas("generate", path, "--prompt", "def ", "--max-tokens", "8", "--temperature", "0")
    assert text.returncode == 0 and text.stdout.startswith("def "), text.stderr
    (out / "report.html").unlink()
    assert nas("report", str(out), "--quiet").returncode == 0
    assert (out / "report.html").stat().st_size > 10_000
    other = nas("run", str(config), "--out", str(out), "--seed", "9", "--quiet")
    assert other.returncode == 2 and "holds a run with seed=0, not 9" in other.stderr
    table = LatencyTable.load(out / "latency_table.json")
    table.device = replace(table.device, cpu="Another CPU")
    table.save(out / "latency_table.json", keep_others=False)
    refused = nas("search", str(out), "--quiet")
    assert refused.returncode == 2 and "Another CPU" in refused.stderr
    copy = out.parent / "copy"
    shutil.copytree(path, copy)
    (copy / "model.safetensors").write_bytes(b"short")
    broken = nas("generate", str(copy), "--prompt", "x")
    assert broken.returncode == 2 and "not a whole safetensors file" in broken.stderr
