"""The parts of `tests.benchmarks.gpu`: how each is started, and what it has found.

Nothing heavy is imported here: a part fails alone where its packages are missing.
"""

from __future__ import annotations

import collections
import contextlib
import json
import math
import re
import shutil
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TESTED = ("tests/hw_profiles/backends/test_cuda_device.py", "tests/nas/test_training_cuda.py",
          "tests/kernels")  # fmt: skip
"""What is tested on a GPU: what only runs there, and kernels, elsewhere in an interpreter."""
TESTED_QUICKLY = ("tests/kernels/test_fp8_linear.py",)
TRAINING = "tests.benchmarks.training_throughput"
FEW_ARCHS_S = 150.0
"""Below this budget fewer networks are predicted."""
PYTEST_OPTIONS = ("-p", "no:cacheprovider", "--continue-on-collection-errors")
OUTCOME = re.compile(r" (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")
MOST_FIGURES = 6


@dataclass(frozen=True)
class Part:
    """A part of the benchmark.

    Args:
        name: for options, files and the table.
        weight: share of the budget, in relation to the others.
        command: arguments for Python, given the options, the part's folder and its budget in s.
        figures: what was found, read from the part's folder; anything missing is left out.
    """

    name: str
    weight: float
    command: Callable[[Namespace, Path, float], list[str]]
    figures: Callable[[Path], dict[str, Any]]


def tests_command(options: Namespace, folder: Path, budget_s: float) -> list[str]:
    """Run the tests of a GPU, verbosely: what ran counts though time is up."""
    paths = TESTED_QUICKLY if options.quick else TESTED
    wanted = "not slow and not cluster" if options.device == "cuda" else "not gpu and not slow"
    return ["-m", "pytest", *paths, "-v", "-m", wanted, *PYTEST_OPTIONS]


def tests_figures(folder: Path) -> dict[str, Any]:
    """Return the number of tests by outcome, and the names of some that failed."""
    counts: collections.Counter[str] = collections.Counter()
    failed = []
    for line in _lines(folder / "stdout.txt"):
        if line.startswith("tests/") and (outcome := OUTCOME.search(line)):
            counts[outcome[1].lower()] += 1
            if outcome[1] in ("FAILED", "ERROR"):
                failed.append(line.split(" ")[0])
    return {**counts, **({"which": failed[:20]} if failed else {})}


def kernels_command(options: Namespace, folder: Path, budget_s: float) -> list[str]:
    """Run every kernel against its alternatives; on a CPU one family, to show that it runs."""
    command = ["-m", "tests.benchmarks.kernels", "--out", str(folder)]
    command += ["--device", options.device, "--budget-s", f"{budget_s:.0f}", "--json"]
    return [*command, *(["--quick", "--ops", "norms"] if options.quick else [])]


def kernels_figures(folder: Path) -> dict[str, Any]:
    """Return the roofs, and how many cases and targets there are."""
    found = _json(folder / "results.json")
    if not found:
        return {}
    targets = collections.Counter(f"targets {t['status']}" for t in found["targets"])
    cases = len(found["cases"])
    return {"cases": f"{cases} of {found.get('num_cases', cases)}", **targets, **found["roofs"]}


def profile_command(options: Namespace, folder: Path, budget_s: float) -> list[str]:
    """Measure a latency table, precisions and energy."""
    command = ["-m", "tests.benchmarks._gpu_profile", "--out", str(folder)]
    command += ["--backend", _backend(options), "--budget-s", f"{budget_s:.0f}"]
    return [*command, *(["--quick"] if options.quick else [])]


def profile_figures(folder: Path) -> dict[str, Any]:
    """Return the table's entries and errors, the gain of each precision, and energies."""
    found = _json(folder / "figures.json")
    figures: dict[str, Any] = {}
    for name, row in found.get("precisions_us", {}).items():
        base = row.get("bf16")
        for precision, us in row.items():
            if precision != "bf16" and isinstance(us, float) and isinstance(base, float):
                figures[f"bf16/{precision} {name}"] = base / us
    table = found.get("table", {})
    for name, facts in table.get("workloads", {}).items():
        figures = {f"left out mape_pct {name}": facts["left_out_mape_pct"], **figures}
    figures = {"entries": table.get("num_entries", 0), **figures}
    return figures | found.get("energy", {}).get("energy_mj", {})


def latency_command(options: Namespace, folder: Path, budget_s: float) -> list[str]:
    """Predict networks that no fit has seen, going on with the table of the profile, if any."""
    table = folder.parent / "profile" / "latency_table.json"
    backend, preset = _backend(options), "decoder-tiny" if options.quick else "decoder-small"
    if table.exists() and not options.quick:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(table, folder / f"{preset}-{backend}-1t.table.json")
    archs, rounds = (60, 20) if budget_s >= FEW_ARCHS_S else (24, 12)
    command = ["-m", "tests.benchmarks.latency_model", "--presets", preset, "--threads", "1"]
    command += ["--backends", backend, "--out", str(folder), "--json"]
    if options.quick:
        archs, rounds, budget_s = 4, 2, 4.0
    command += ["--num", str(archs), "--rounds", str(rounds)]
    return [*command, "--budget-s", f"{budget_s / 3:.0f}"]


def latency_figures(folder: Path) -> dict[str, Any]:
    """Return the errors of the table's predictions, and what measuring again differs by."""
    figures: dict[str, Any] = {}
    for path in sorted(folder.glob("*t.json")):
        for name, found in _json(path).get("workloads", {}).items():
            rows = found["figures"]
            figures[f"mape_pct {name}"] = rows["table"]["mape_pct"]
            figures[f"again mape_pct {name}"] = rows["measured_again"]["mape_pct"]
            figures[f"tau {name}"] = rows["table"]["kendall_tau"]
    return figures


def training_command(options: Namespace, folder: Path, budget_s: float) -> list[str]:
    """Train a supernet and plain networks."""
    command = ["-m", TRAINING, "--device", options.device, "--json"]
    if options.quick:
        command += ["--preset", "decoder-tiny", "--batch-size", "2", "--tokens", "16"]
        command += ["--vocab", "64", "--steps", "1"]
        budget_s = min(budget_s, 4.0)
    return [*command, "--budget-s", f"{budget_s:.0f}"]


def training_figures(folder: Path) -> dict[str, Any]:
    """Return tokens per second of each way of training."""
    rows = _json(folder / "stdout.txt").get("rows", [])
    return {f"{r['what']} {r['mode']} {r['precision']} tokens/s": r["tokens_s"] for r in rows}


PARTS = {
    part.name: part
    for part in (
        Part("tests", 1.5, tests_command, tests_figures),
        Part("kernels", 3.0, kernels_command, kernels_figures),
        Part("profile", 3.0, profile_command, profile_figures),
        Part("latency_model", 2.5, latency_command, latency_figures),
        Part("training", 1.5, training_command, training_figures),
    )
}


def short(figures: dict[str, Any]) -> str:
    """Return some figures on one line."""
    return ", ".join(
        f"{name} {_text(value)}" for name, value in list(figures.items())[:MOST_FIGURES]
    )


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else str(value)
    return str(len(value)) if isinstance(value, list) else str(value)


def _backend(options: Namespace) -> str:
    return "cuda" if options.device == "cuda" else "eager"


def _json(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {"": found}
    return {}


def _lines(path: Path) -> list[str]:
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    return []
