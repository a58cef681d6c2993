"""The process that runs cases: started, and started again where a kernel broke it.

    python -m tests.benchmarks._kernel_worker OPTIONS

Every line of the results file is a JSON object, written as soon as it is known, with its `kind`:
"start" (device and roofs), "trying" (what is about to run), "case", "profile", "end". The process
that started this one adds "crash": what was tried when a worker ended or hung. It is not tried
again by the next one.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import sys
import time
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks._gpu_device import Nvml, facts, measured_roofs
from tests.benchmarks._gpu_timing import Clock, clock_of
from tests.benchmarks._kernel_cases import SECONDS, all_cases
from tests.benchmarks._kernel_cases.case import Case, Setting
from tests.benchmarks._kernel_profile import profiled, worth_profiling
from tests.benchmarks._kernel_run import (
    REFERENCE,
    TIMING,
    Broken,
    check_context,
    failed_record,
    run_case,
    warm_case,
)
from tests.benchmarks._kernel_targets import judged

BROKEN = 3
"""Exit status of a worker that cannot use the GPU any more; another one can."""
NO_DEVICE = 2
TIMED_S = {True: 0.01, False: 0.6}
"""Seconds of samples for a case, quick or not."""
PROFILE_S = 40.0
"""Kept for profiles of what falls short of a target."""


class Log:
    """The results file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, **line: Any) -> None:
        """Append a line; it outlives this process when this returns."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def lines(self) -> list[dict[str, Any]]:
        """Return what was written; a line that was cut off is left out."""
        if not self.path.exists():
            return []
        found = []
        for text in self.path.read_text(encoding="utf-8").splitlines():
            try:
                found.append(json.loads(text))
            except json.JSONDecodeError:
                continue
        return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the worker."""
    options = parse(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("there is no CUDA device; --device cpu --quick tries the code", file=sys.stderr)
        return NO_DEVICE
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(name)s: %(message)s")
    _configure(device)
    setting = Setting(device, options.quick)
    cases = all_cases(setting, options.ops)
    if options.warm is not None:
        return _warm(cases, device, options)
    log = Log(options.out / "results.jsonl")
    try:
        return _measure(cases, device, options, log)
    except Broken as error:
        print(f"the GPU's context is lost: {error}", file=sys.stderr, flush=True)
        return BROKEN


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--ops", nargs="*")
    parser.add_argument("--deadline", type=float, required=True, help="seconds since the epoch")
    parser.add_argument("--warm", help="I/N: only compile every N-th case from the I-th on")
    parser.add_argument("--profile", nargs="*", help="parts of names of cases to profile")
    return parser.parse_args(arguments)


def _configure(device: torch.device) -> None:
    torch.manual_seed(0)
    if device.type != "cuda":
        torch.set_num_threads(1)
        return
    # A shape too many must not run uncompiled without a word.
    from torch import _dynamo

    _dynamo.config.fail_on_recompile_limit_hit = True


def _warm(cases: list[Case], device: torch.device, options: argparse.Namespace) -> int:
    """Compile a share of the cases, so that the caches on disk are warm for the one that times."""
    first, step = (int(part) for part in options.warm.split("/"))
    for case in cases[first::step]:
        if time.time() > options.deadline:
            break
        try:
            warm_case(case, device)
        except RuntimeError as error:
            print(f"warming {case.id}: {error}", file=sys.stderr, flush=True)
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return 0


def _measure(cases: list[Case], device: torch.device, options: argparse.Namespace, log: Log) -> int:
    clock = clock_of(device)
    lines = log.lines()
    if not any(line["kind"] == "start" for line in lines):
        roofs = measured_roofs(device, clock, options.quick)
        told = {"facts": facts(device), "roofs": roofs, "num_cases": len(cases)}
        log.write(kind="start", quick=options.quick, **told)
    nvml = Nvml(device) if device.type == "cuda" else None
    banned = ended_the_process(lines)
    spent = seconds_spent(lines)
    done = {line["id"] for line in lines if line["kind"] == "case"}
    left = [case for case in cases if case.id not in done]
    until = options.deadline - (0.0 if options.quick else PROFILE_S)
    while left and time.time() < until:
        case = next_case(left, spent)
        left.remove(case)
        started = time.monotonic()
        record = _one_case(case, clock, device, options.quick, log, banned.get(case.id, set()))
        if nvml is not None:
            record["sm_mhz"], record["temperature_c"] = nvml.clock_mhz(), nvml.temperature_c()
            record["power_w"] = nvml.power_w()
            gc.collect()
            torch.cuda.empty_cache()
        log.write(**record)
        taken = time.monotonic() - started
        spent[case.family] = spent.get(case.family, 0.0) + taken
    _profile(cases, device, options, log)
    if not options.quick and device.type == "cuda":
        log.write(kind="end", roofs=measured_roofs(device, clock, False))
    return 0


def _one_case(
    case: Case, clock: Clock, device: torch.device, quick: bool, log: Log, banned: set[str]
) -> dict[str, Any]:
    """Return the record; one of the case's own failure where that is what happens."""

    def announce(name: str) -> None:
        log.write(kind="trying", id=case.id, contender=name)

    if banned & {REFERENCE, TIMING}:
        return failed_record(case, "the process ended or hung: see the log")
    try:
        return run_case(case, clock, device, TIMED_S[quick], announce, banned)
    except Broken:
        raise
    except Exception as error:  # one case must not take the others with it
        traceback.print_exc()
        note = f"{type(error).__name__}: {str(error)[:300]}"
        if device.type == "cuda":
            check_context(device, note)
        return failed_record(case, note)


def _profile(
    cases: list[Case], device: torch.device, options: argparse.Namespace, log: Log
) -> None:
    """Profile what was asked for, or what fell short of a target."""
    lines = log.lines()
    banned = ended_the_process(lines)
    records = [line for line in lines if line["kind"] == "case"]
    done = {line["id"] for line in lines if line["kind"] == "profile"}
    if options.profile is not None:
        chosen = [c for c in cases if any(part in c.id for part in options.profile)]
    else:
        names = worth_profiling(judged(records, lines[0]))
        chosen = [case for name in names for case in cases if case.id == name]
    for case in chosen:
        crashed = "profile" in banned.get(case.id, ())
        if case.id in done or crashed or time.time() > options.deadline:
            continue
        log.write(kind="trying", id=case.id, contender="profile")
        try:
            log.write(kind="profile", id=case.id, text=profiled(case, device))
        except Exception as error:  # a profile that fails must not hide the figures
            log.write(kind="profile", id=case.id, text=f"{type(error).__name__}: {error}")


def next_case(left: list[Case], spent: dict[str, float]) -> Case:
    """Return the next case: of a family with time left, then by priority, then in order."""
    return min(
        left,
        key=lambda case: (spent.get(case.family, 0.0) > SECONDS[case.family], case.priority),
    )


def ended_the_process(lines: Iterable[dict[str, Any]]) -> dict[str, set[str]]:
    """Return what was tried, by case, when a worker ended before its time."""
    banned: dict[str, set[str]] = {}
    for line in lines:
        if line["kind"] == "crash":
            banned.setdefault(line["id"], set()).add(line["contender"])
    return banned


def seconds_spent(lines: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Return what each family has taken so far."""
    spent: dict[str, float] = {}
    for line in lines:
        if line["kind"] == "case":
            spent[line["family"]] = spent.get(line["family"], 0.0) + line.get("seconds", 0.0)
    return spent


if __name__ == "__main__":
    sys.exit(main())
