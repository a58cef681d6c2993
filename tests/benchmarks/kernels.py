"""Every kernel against the best alternative installed, on a GPU, in one go.

    PYTHONPATH=.:kernels python -m tests.benchmarks.kernels --out FOLDER

It needs torch, triton and numpy, no installation, and at most `--budget-s` seconds. Kernels are
compiled by several processes first; one process then compares every kernel and its alternatives
with a reference, times in turns those that agree, sets them against bandwidth and product rates
measured in the same run, and profiles what falls short of a target. A process that a kernel breaks,
or that hangs, is replaced, and goes on behind what broke it.

The folder gets `results.jsonl` (a line as soon as it is known), `report.md` (rewritten after every
case), `results.json` and `log.txt`. `--device cpu --quick` only shows that everything runs: there,
the kernels are their PyTorch references.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from tests.benchmarks._kernel_report import progress_text, report_text, split
from tests.benchmarks._kernel_targets import judged

TUNING = "NAS_KERNELS_TUNING"
"""Read by `nas_kernels.tuning`, which would import torch here."""
WORKER = "tests.benchmarks._kernel_worker"
BUDGET_S = 450.0
WARM_SHARE = 0.3
"""Of the budget, for compiling, at most."""
STALL_S = 120.0
"""Without a new line for so long a worker is taken to hang."""
GRACE_S = 15.0
MOST_WORKERS = 15
MOST_JOBS = 8


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in ("results.jsonl", "report.md", "results.json", "log.txt"):
        (options.out / name).unlink(missing_ok=True)
    deadline = time.time() + options.budget_s
    with (options.out / "log.txt").open("a", encoding="utf-8") as log:
        if options.jobs:
            warm(options, log, time.time() + WARM_SHARE * options.budget_s)
        measure(options, log, deadline)
    lines = read(options.out)
    if not any(line["kind"] == "start" for line in lines):
        tail = (options.out / "log.txt").read_text(encoding="utf-8")[-2000:]
        print(f"nothing could be measured:\n{tail}", file=sys.stderr)
        return 1
    write_report(options.out)
    name = "results.json" if options.json else "report.md"
    print((options.out / name).read_text(encoding="utf-8"))
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--ops", nargs="+", help="families of operations; all by default")
    parser.add_argument("--quick", action="store_true", help="small shapes: does everything run?")
    parser.add_argument("--json", action="store_true", help="print data instead of tables")
    parser.add_argument("--out", type=Path, default=Path("runs/kernels"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--budget-s", type=float, default=BUDGET_S)
    parser.add_argument("--jobs", type=int, help="processes that compile kernels beforehand")
    parser.add_argument(
        "--tune",
        action="store_true",
        help="measure configurations where kernels ask, into tuning.json in the folder",
    )
    parser.add_argument(
        "--profile",
        nargs="+",
        metavar="PART",
        help="profile cases with this in their name, not what falls short",
    )
    options = parser.parse_args(arguments)
    if options.jobs is None:
        cores = os.cpu_count() or 1
        options.jobs = min(cores, MOST_JOBS) if options.device.startswith("cuda") else 0
    return options


def warm(options: argparse.Namespace, log: IO[str], deadline: float) -> None:
    """Compile everything in several processes, until the deadline."""
    started = time.monotonic()
    workers = [
        _worker(options, log, deadline, "--warm", f"{i}/{options.jobs}")
        for i in range(options.jobs)
    ]
    with _ended(*workers):
        for worker in workers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.wait(max(deadline + GRACE_S - time.time(), 1.0))
    print(f"compiled in {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)


def measure(options: argparse.Namespace, log: IO[str], deadline: float) -> None:
    """Start workers until one gets to the end or time is up."""
    for _ in range(MOST_WORKERS):
        num_cases = count_cases(read(options.out))
        worker = _worker(options, log, deadline)
        with _ended(worker):
            note = watch(worker, options.out, deadline)
        lines = read(options.out)
        if note is None or time.time() > deadline:
            return
        last = lines[-1] if lines else {"kind": ""}
        if last["kind"] == "trying":
            crash = {"kind": "crash", "id": last["id"], "contender": last["contender"]}
            _append(options.out, crash | {"note": note})
            print(f"{last['id']}, {last['contender']}: {note}", file=sys.stderr, flush=True)
        elif count_cases(lines) == num_cases:
            # It ended before it tried anything: the next one would too.
            return


def watch(worker: subprocess.Popen[str], out: Path, deadline: float) -> str | None:
    """Report cases as they come; return why the worker ended early, or None."""
    seen, changed = len(read(out)), time.monotonic()
    while True:
        ended = worker.poll() is not None
        lines = read(out)
        if len(lines) > seen:
            changed = time.monotonic()
            roofs = split(lines)[0]["roofs"]
            for line in lines[seen:]:
                if line["kind"] == "case":
                    print(progress_text(line, roofs), file=sys.stderr, flush=True)
                    write_report(out)
            seen = len(lines)
        if ended:
            return None if worker.returncode == 0 else f"exit status {worker.returncode}"
        if time.monotonic() - changed > STALL_S:
            return f"nothing for {STALL_S:.0f} s"
        if time.time() > deadline + GRACE_S:
            return "time is up"
        time.sleep(0.2)


def write_report(out: Path) -> None:
    """Write what is known so far as text and as data."""
    lines = read(out)
    start, records, profiles = split(lines)
    verdicts = judged(records, start)
    (out / "report.md").write_text(report_text(lines, verdicts), encoding="utf-8")
    data = {
        **start, "targets": [asdict(verdict) for verdict in verdicts], "cases": records,
        "profiles": profiles,
    }  # fmt: skip
    (out / "results.json").write_text(json.dumps(data, indent=1), encoding="utf-8")


def read(out: Path) -> list[dict[str, Any]]:
    """Return the lines written so far, without one that is not whole yet."""
    path = out / "results.jsonl"
    if not path.exists():
        return []
    found = []
    for text in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(text))
    return found


def count_cases(lines: list[dict[str, Any]]) -> int:
    """Return how many cases have a record."""
    return sum(line["kind"] == "case" for line in lines)


def _append(out: Path, line: dict[str, Any]) -> None:
    with (out / "results.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _worker(
    options: argparse.Namespace, log: IO[str], deadline: float, *more: str
) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", WORKER, "--device", options.device, "--out", str(options.out),
               "--deadline", str(deadline), *more]  # fmt: skip
    command += ["--quick"] if options.quick else []
    command += ["--ops", *options.ops] if options.ops else []
    command += ["--profile", *options.profile] if options.profile else []
    # Many processes compile side by side already.
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    if options.tune and "--warm" not in more:
        # Not while several processes share the GPU.
        environment[TUNING] = str(options.out / "tuning.json")
    return subprocess.Popen(command, env=environment, stdout=log, stderr=log, text=True)


@contextlib.contextmanager
def _ended(*workers: subprocess.Popen[str]) -> Iterator[None]:
    """End these processes behind the block, however it is left."""
    try:
        yield
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.kill()
            worker.wait()


if __name__ == "__main__":
    sys.exit(main())
