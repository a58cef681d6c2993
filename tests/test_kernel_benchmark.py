"""The kernels' benchmark on a CPU: every case's path, and what judges and survives on a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.benchmarks import _kernel_targets as targets
from tests.benchmarks import _kernel_worker as worker
from tests.benchmarks import kernels
from tests.benchmarks._gpu_timing import CpuClock, take_turns
from tests.benchmarks._kernel_cases import SECONDS, all_cases
from tests.benchmarks._kernel_cases.case import OURS, Case, Contender, Setting
from tests.benchmarks._kernel_report import report_text
from tests.benchmarks._kernel_run import run_case

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
ABSENT = ("matplotlib", "optuna", "ray", "rich", "scipy", "sklearn", "pymoo", "pandas",
          "transformers", "onnx", "onnxruntime", "safetensors", "tokenizers", "sqlalchemy",
          "pytest", "nas", "searchspace", "hw_profiles", "predictors")  # fmt: skip


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    paths = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True,
                          env=environment)  # fmt: skip


def test_every_case_runs_and_agrees(tmp_path: Path) -> None:
    done = python("-m", "tests.benchmarks.kernels", "--device", "cpu", "--quick", "--json",
                  "--out", str(tmp_path), "--profile", "retention")  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert {case["family"] for case in result["cases"]} == set(SECONDS)
    for case in result["cases"]:
        for name, found in case["contenders"].items():
            assert found["status"] in ("ok", "skipped"), (case["id"], name, found)
        assert case["contenders"][OURS]["us"] > 0, case["id"]
    assert {target["status"] for target in result["targets"]} == {targets.NOT_MEASURED}
    assert len(result["profiles"]) == 2 and "us a call" in result["profiles"][0]["text"]
    report = (tmp_path / "report.md").read_text()
    assert all(f"## {family}" in report for family in SECONDS)


def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    status = worker.main(["--device", "cuda", "--out", str(tmp_path), "--deadline", "0"])
    assert status == worker.NO_DEVICE and "there is no CUDA device" in capsys.readouterr().err


def test_it_needs_torch_and_numpy_only() -> None:
    names = [p.stem for p in (ROOT / "tests" / "benchmarks").glob("_kernel_*.py")]
    names += [f"_kernel_cases.{p.stem}" for p in
              (ROOT / "tests" / "benchmarks" / "_kernel_cases").glob("[!_]*.py")]  # fmt: skip
    program = (
        "import importlib, sys\n"
        f"for name in {ABSENT!r}: sys.modules[name] = None\n"
        f"for name in {[*names, 'kernels']!r}:\n"
        "    importlib.import_module(f'tests.benchmarks.{name}')\n"
    )
    done = python("-c", program)
    assert done.returncode == 0, done.stderr


def test_full_cases_have_names_of_their_own_and_budgets() -> None:
    cases = all_cases(Setting(CPU, quick=False))
    assert len({case.id for case in cases}) == len(cases)
    assert {case.family for case in cases} == set(SECONDS)
    assert all(case.contenders[0].name == OURS for case in cases)
    labels = {target.label for target in targets.TARGETS}
    assert labels == {label for case in cases for label in case.targets}
    assert all_cases(Setting(CPU, quick=False), ["norms"])[0].family == "norms"


def one_case(*contenders: Contender, name: str = "one", priority: int = 1) -> Case:
    return Case("norms", name, lambda: {"x": torch.ones(4)}, lambda given: (2 * given["x"],),
                contenders, min_bytes=32.0, priority=priority)  # fmt: skip


def test_a_wrong_or_failing_contender_is_not_timed() -> None:
    def fail() -> Any:
        raise RuntimeError("no such kernel")

    case = one_case(
        Contender(OURS, lambda given: lambda: (2 * given["x"],)),
        Contender("off", lambda given: lambda: (2.2 * given["x"],)),
        Contender("nan", lambda given: lambda: (given["x"] * torch.nan,)),
        Contender("short", lambda given: lambda: (2 * given["x"][1:],)),
        Contender("fails", lambda given: lambda: fail()),
        Contender("crashed", lambda given: lambda: (2 * given["x"],)),
        Contender("other", lambda given: lambda: (given["x"],), same=False),
    )
    announced: list[str] = []
    record = run_case(case, CpuClock(), CPU, 0.01, announced.append, {"crashed"})
    found = record["contenders"]
    status = {name: result["status"] for name, result in found.items()}
    assert status == {OURS: "ok", "off": "wrong", "nan": "wrong", "short": "wrong",
                      "fails": "failed", "crashed": "failed", "other": "ok"}  # fmt: skip
    assert "no such kernel" in found["fails"]["note"]
    assert {name for name, result in found.items() if "us" in result} == {OURS, "other"}
    assert "crashed" not in announced and OURS in announced
    text = report_text([{"kind": "start", "facts": {}, "roofs": {}}, record], [])
    assert "off: WRONG" in text and "(another function)" in text


def test_short_calls_run_on_several_sets_of_inputs() -> None:
    drawn = 0

    def inputs() -> dict[str, Any]:
        nonlocal drawn
        drawn += 1
        return {"x": torch.ones(4, requires_grad=True), "dy": torch.ones(4)}

    clock = CpuClock()
    clock.l2_bytes = 10
    ours = Contender(OURS, lambda given: lambda: (2 * given["x"],))
    case = Case("norms", "one", inputs, lambda given: (2 * given["x"],), (ours,), 32.0,
                wanted=("x",))  # fmt: skip
    record = run_case(case, clock, CPU, 0.01, lambda name: None)
    assert drawn == 5  # 16 times 10 bytes, 32 at a time
    assert record["contenders"][OURS]["us"] > 0 and record["mode"] == "forward+backward"


def test_unwritten_memory_shows() -> None:
    case = one_case(Contender(OURS, lambda given: lambda: (torch.empty(4),)))
    record = run_case(case, CpuClock(), CPU, 0.01, lambda name: None)
    assert record["contenders"][OURS]["status"] == "wrong"


def test_the_next_case_is_of_a_family_with_time_left() -> None:
    first, second = one_case(name="first"), one_case(name="second", priority=0)
    assert worker.next_case([first, second], {}).name == "second"
    other = Case("linear_scan", "other", dict, lambda given: (), (), 1.0, priority=2)
    assert worker.next_case([first, second, other], {"norms": 1e6}) is other
    assert worker.next_case([first, second], {"norms": 1e6}) is second


def test_a_worker_that_dies_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second worker goes on where the first one died, without what was tried then."""
    script = tmp_path / "worker.py"
    script.write_text(
        "import json, os, sys\n"
        "path = sys.argv[sys.argv.index('--out') + 1] + '/results.jsonl'\n"
        "def write(**line):\n"
        "    with open(path, 'a') as file: file.write(json.dumps(line) + '\\n')\n"
        "first = not os.path.exists(path)\n"
        "if first: write(kind='start', facts={'device': 'none'}, roofs={}, num_cases=1)\n"
        "write(kind='trying', id='norms/one', contender='bad')\n"
        "if first: os.abort()\n"
        "write(kind='case', id='norms/one', family='norms', name='one', targets=[], flops=0,\n"
        "      min_bytes=1, unit='bf16', contenders={'bad': {'status': 'failed'}})\n"
    )

    def fake(options: Any, log: Any, deadline: float, *more: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(script), "--out", str(options.out)]
        return subprocess.Popen(command, stdout=log, stderr=log, text=True)

    monkeypatch.setattr(kernels, "_worker", fake)
    assert kernels.main(["--out", str(tmp_path), "--device", "cpu"]) == 0
    lines = kernels.read(tmp_path)
    assert [line["kind"] for line in lines] == ["start", "trying", "crash", "trying", "case"]
    assert worker.ended_the_process(lines) == {"norms/one": {"bad"}}
    assert "A worker ended in norms/one, at bad" in (tmp_path / "report.md").read_text()


def record(label: str, *, rms: float = 1e-3, **times: float) -> dict[str, Any]:
    found = {name.replace("_", " "): {"status": "ok", "us": us, "rms": rms}
             for name, us in times.items()}  # fmt: skip
    return {"id": f"{label}/{len(times)}", "targets": [label], "min_bytes": 1e9,
            "contenders": found}  # fmt: skip


def test_targets_are_judged_by_what_was_measured() -> None:
    start = {"facts": {"capability": "9.0"}, "roofs": {"copy_gb_s": 1000.0}}
    records = [
        record("memory", ours=1100.0),  # 909 GB/s
        record("int4", ours=10.0, **{"cuBLAS_bf16": 29.0}),
        record("decode", ours=10.0, sdpa=12.0, sdpa_flash=10.1),
        record("elastic", ours=10.0, **{"cuBLAS,_contiguous": 9.0}),
        record("fla", ours=10.0),
    ]
    verdicts = {v.name.split()[0]: v for v in targets.judged(records[:2], start)}
    assert verdicts["memory-bound"].status == targets.MET
    assert verdicts["int4"].status == targets.NOT_MET and verdicts["int4"].short == ["int4/2"]
    statuses = [v.status for v in targets.judged(records, start)]
    assert statuses == ["met", "not met", "not measured", "not met", "met", "not measured"]
    records[0]["contenders"][OURS] = {"status": "wrong", "rms": 0.5}
    wrong = targets.judged(records, start)[0]
    assert wrong.status == targets.NOT_MET and "wrong or failed" in wrong.detail
    assert targets.judged(records, start | {"quick": True})[1].status == targets.NOT_MEASURED


def test_turns_are_taken() -> None:
    order: list[str] = []
    calls = {name: [lambda name=name: order.append(name)] for name in "ab"}
    timings = take_turns(calls, CpuClock(), 0.0, least_samples=4)
    assert timings["a"].num_samples == timings["b"].num_samples == 4
    assert "".join(order[6:]) == "abbaabba"
    assert timings["a"].low_s <= timings["a"].median_s <= timings["a"].high_s
