"""`tests.benchmarks.gpu` without a GPU: that all parts start, and what becomes of failures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau

from tests.benchmarks import _gpu_parts as parts
from tests.benchmarks import gpu, latency_model
from tests.benchmarks._gpu_parts import PARTS, Part

ROOT = Path(__file__).parents[1]
ABSENT = ("matplotlib", "optuna", "ray", "rich", "scipy", "sklearn", "pymoo", "pandas",
          "transformers", "onnx", "onnxruntime", "safetensors", "tokenizers", "sqlalchemy",
          "pynvml")  # fmt: skip
FACTS = {"device": "this", "torch": "2", "triton": "3", "date": "today"}


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    paths = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True,
                          env=environment, check=False)  # fmt: skip


@pytest.mark.slow
def test_every_part_runs_and_is_collected(tmp_path: Path) -> None:
    done = python("-m", "tests.benchmarks.gpu", "--device", "cpu", "--quick", "--budget-s", "200",
                  "--out", str(tmp_path), "--json")  # fmt: skip
    summary = json.loads(done.stdout)
    assert summary == json.loads((tmp_path / "summary.json").read_text())
    assert set(summary["parts"]) == set(PARTS)
    for name, result in summary["parts"].items():
        assert result["status"] == "ok", (name, result)
        assert result["figures"], name
    assert done.returncode == 0
    assert summary["parts"]["tests"]["figures"]["passed"] > 20
    assert (tmp_path / "profile" / "latency_table.json").exists()


def test_parts_need_no_packages_for_searching() -> None:
    hidden = f"import sys; sys.modules |= dict.fromkeys({ABSENT})"
    modules = "latency_model, tests.benchmarks.kernels, hw_profiles.profiler"
    done = python(
        "-c", f"{hidden}; import tests.benchmarks._gpu_profile, tests.benchmarks.{modules}"
    )
    assert done.returncode == 0, done.stderr


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = python("-m", "tests.benchmarks.gpu", "--out", str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.startswith("no CUDA device is visible to PyTorch; --device cpu --quick")


def made(name: str, program: str) -> Part:
    return Part(name, 1.0, lambda *_: ["-c", program], lambda folder: {"numbers": 1.5})


def test_a_part_that_fails_or_hangs_leaves_the_others_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "GRACE_S", 0.5)
    monkeypatch.setattr(gpu, "facts_of", lambda device: FACTS)
    sleeper = (
        "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; "
        "time.sleep(60)']).wait()"
    )
    monkeypatch.setattr(
        gpu,
        "PARTS",
        {
            "breaks": made("breaks", "import no_such_package"),
            "hangs": made("hangs", sleeper),
            "works": made("works", "print(1)"),
        },
    )
    assert gpu.main(["--out", str(tmp_path), "--budget-s", "4", "--device", "cpu"]) == 1
    results = json.loads((tmp_path / "summary.json").read_text())["parts"]
    assert {name: result["status"] for name, result in results.items()} == {
        "breaks": "failed", "hangs": "failed", "works": "ok",
    }  # fmt: skip
    assert "No module named 'no_such_package'" in results["breaks"]["reason"]
    assert "time is up" in results["hangs"]["reason"]
    assert (tmp_path / "works" / "stdout.txt").read_text() == "1\n"
    text = capsys.readouterr().out
    assert "numbers 1.5" in text


def test_later_parts_get_what_earlier_ones_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, float] = {}

    def run(part: Part, options: object, budget_s: float) -> dict[str, Any]:
        given[part.name] = budget_s
        return {"status": "ok", "seconds": 0.0, "reason": "", "figures": {}}

    monkeypatch.setattr(gpu, "run", run)
    monkeypatch.setattr(gpu, "facts_of", lambda device: FACTS)
    names = ["kernels", "training"]
    assert gpu.main(["--out", str(tmp_path), "--device", "cpu", "--budget-s", "450", "--parts",
                     *names]) == 0  # fmt: skip
    assert list(given) == names
    assert given["kernels"] == pytest.approx(300, abs=15)
    assert given["training"] == pytest.approx(450, abs=20)


def test_figures_are_read_from_what_there_is(tmp_path: Path) -> None:
    for part in PARTS.values():
        assert not part.figures(tmp_path).get("passed")
    (tmp_path / "stdout.txt").write_text(
        "tests/kernels/test_a.py::test_one[1] PASSED   [ 1%]\n"
        "tests/kernels/test_a.py::test_two FAILED   [ 2%]\n"
        "tests/kernels/test_a.py::test_three"
    )
    figures = parts.tests_figures(tmp_path)
    assert figures == {"passed": 1, "failed": 1, "which": ["tests/kernels/test_a.py::test_two"]}
    row = {"bf16": 30.0, "fp8": 20.0, "int4": "no kernel"}
    content = {"precisions_us": {"decode_b1_t8": row}, "energy": {"energy_mj": {"decode": 2.0}}}
    (tmp_path / "figures.json").write_text(json.dumps(content))
    figures = parts.profile_figures(tmp_path)
    assert figures == {"entries": 0, "bf16/fp8 decode_b1_t8": 1.5, "decode": 2.0}
    rows = [{"what": "plain", "mode": "off", "precision": "bf16", "tokens_s": 5.0}]
    (tmp_path / "stdout.txt").write_text(json.dumps({"device": "this", "rows": rows}))
    assert parts.training_figures(tmp_path) == {"plain off bf16 tokens/s": 5.0}


def test_the_table_of_the_profile_is_gone_on_with(tmp_path: Path) -> None:
    (tmp_path / "profile").mkdir()
    (tmp_path / "profile" / "latency_table.json").write_text("{}")
    options = gpu.parse(["--out", str(tmp_path)])
    command = parts.latency_command(options, tmp_path / "latency_model", 300.0)
    assert (tmp_path / "latency_model" / "decoder-small-cuda-1t.table.json").read_text() == "{}"
    assert command[command.index("--backends") + 1] == "cuda"
    assert command[command.index("--num") + 1] == "60"
    assert command[command.index("--budget-s") + 1] == "100"


def test_rank_correlation_is_that_of_scipy() -> None:
    rng = np.random.default_rng(0)
    for size in (2, 5, 60):
        left, right = (rng.integers(0, 2 + size // 3, size).astype(float) for _ in range(2))
        left[0], right[0] = -1.0, -2.0
        expected = kendalltau(left, right).statistic
        assert latency_model.kendall_tau(left, right) == pytest.approx(expected)
