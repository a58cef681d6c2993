"""Running one case: contenders are compared with the reference, and those that agree are timed.

A record is a dictionary that goes to JSON as it is. Times are in microseconds.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from tests.benchmarks._gpu_timing import Call, Clock, Timing, take_turns
from tests.benchmarks._kernel_cases.case import GRADIENT, OURS, Case, Contender, Inputs, Results
from tests.benchmarks._kernel_compare import compared, detached, poisoned

REFERENCE, TIMING = "the reference", "the timing"
"""Announced beside the contenders' names."""
MOST_SETS = 48
ENOUGH_S = 1e-3
"""A call that takes so long is timed alone; shorter ones on several sets of inputs."""
L2_SIZES = 16
"""Bytes that a sample should move, in sizes of the L2 cache."""
LARGE = 3e8
"""Numbers in the inputs from which on the reference computes in fp32 instead of float64."""


class Broken(RuntimeError):
    """The GPU's context is lost: nothing more can run in this process."""


def run_case(
    case: Case,
    clock: Clock,
    device: torch.device,
    seconds: float,
    announce: Callable[[str], None],
    banned: Collection[str] = (),
) -> dict[str, Any]:
    """Compare and time all contenders; return the record.

    Args:
        case: what to run.
        clock: times.
        device: of the inputs.
        seconds: that timing may take.
        announce: is told the contender's name before it runs for the first time.
        banned: contenders that ended the process before.

    Raises:
        Broken: when the GPU can no longer be used.
    """
    started = time.monotonic()
    if device.type == "cuda":
        torch._dynamo.reset()
    results: dict[str, dict[str, Any]] = {}
    record = _head(case) | {"contenders": results}
    announce(REFERENCE)
    inputs = case.inputs()
    expected = detached(_reference(case, inputs))
    calls: dict[str, list[Call]] = {}
    rough: dict[str, float] = {}
    for contender in case.contenders:
        name = contender.name
        if contender.missing or name in banned:
            reason = contender.missing or "it ended the process: see the log"
            status = "skipped" if contender.missing else "failed"
            results[name] = {"status": status, "note": reason}
            continue
        announce(name)
        result, call = _checked(case, contender, inputs, expected, device)
        results[name] = result
        if call is not None and result["status"] == "ok":
            calls[name] = [call]
            rough[name] = clock.sample_s([call], 0.0)
    del expected
    announce(TIMING)
    _more_sets(case, calls, rough, clock)
    if calls:
        for name, timing in take_turns(calls, clock, seconds).items():
            results[name] |= _times(timing)
    record["seconds"] = round(time.monotonic() - started, 2)
    return record


def failed_record(case: Case, note: str) -> dict[str, Any]:
    """Return the record of a case in which nothing could be measured."""
    ours = {OURS: {"status": "failed", "note": note}}
    return _head(case) | {"contenders": ours, "seconds": 0.0}


def warm_case(case: Case, device: torch.device) -> None:
    """Run what has to be compiled once, so that compilers' caches on disk know it."""
    if device.type == "cuda":
        torch._dynamo.reset()
    inputs = case.inputs()
    for contender in case.contenders:
        wanted = contender.name in (OURS, "kernel", "fla", "liger") or contender.compiled
        if wanted and not contender.missing:
            with contextlib.suppress(Exception), torch.set_grad_enabled(bool(case.wanted)):
                ready_call(case, contender, inputs)()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ready_call(case: Case, contender: Contender, inputs: Inputs) -> Call:
    """Return what computes the results, and the gradients where the case has some."""
    wanted = case.wanted if contender.wanted is None else contender.wanted
    forward = contender.build(inputs)
    if not wanted:
        return forward
    leaves, seeds = [inputs[name] for name in wanted], {}

    def call() -> list[Tensor]:
        outputs = list(forward())
        if "seed" not in seeds:
            # Cast once: the cast is not part of the operation.
            seeds["seed"] = inputs[GRADIENT].to(outputs[0].dtype)
        return outputs + list(torch.autograd.grad(outputs[:1], leaves, [seeds["seed"]]))

    return call


def _head(case: Case) -> dict[str, Any]:
    return {
        "kind": "case", "family": case.family, "name": case.name, "id": case.id,
        "mode": "forward+backward" if case.wanted else "forward", "min_bytes": case.min_bytes,
        "flops": case.flops, "unit": case.unit, "targets": list(case.targets),
        "bound": case.bound,
    }  # fmt: skip


def _reference(case: Case, inputs: Inputs) -> Results:
    count = sum(value.numel() for value in inputs.values() if isinstance(value, Tensor))
    dtype = torch.float32 if count > LARGE else torch.float64

    def wide(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return value.detach().to(dtype).requires_grad_(name in case.wanted)

    raised = {name: wide(name, value) for name, value in inputs.items()}
    with torch.set_grad_enabled(bool(case.wanted)):
        reference = Contender("reference", lambda given: lambda: case.reference(given))
        return ready_call(case, reference, raised)()


def _checked(
    case: Case, contender: Contender, inputs: Inputs, expected: list[Tensor], device: torch.device
) -> tuple[dict[str, Any], Call | None]:
    """Return the result of the comparison, and the call where it ran."""
    on_gpu = device.type == "cuda"
    try:
        with torch.set_grad_enabled(bool(case.wanted)):
            call = _in_mode(ready_call(case, contender, inputs), bool(case.wanted))
        if on_gpu:
            torch.cuda.synchronize(device)
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
        with poisoned() if contender.name == OURS else contextlib.nullcontext():
            found = detached(call())
        result = compared(case, contender, found, expected)
        if on_gpu:
            torch.cuda.synchronize(device)
            peak = torch.cuda.max_memory_allocated(device) - before
            result["extra_mib"] = round(peak / 2**20, 1)
        return result, call
    except Exception as error:  # whatever a library raises is that contender's result
        text = next(iter(str(error).splitlines()), "")
        if on_gpu:
            check_context(device, f"{type(error).__name__}: {text}")
        oom = isinstance(error, torch.OutOfMemoryError)
        note = "out of memory" if oom else f"{type(error).__name__}: {text[:200]}"
        return {"status": "failed", "note": note}, None


def _in_mode(call: Call, gradients: bool) -> Call:
    def run() -> Any:
        with torch.set_grad_enabled(gradients):
            return call()

    return run


def check_context(device: torch.device, text: str) -> None:
    """Raise `Broken` with a text when the GPU does not answer any more."""
    try:
        torch.cuda.empty_cache()
        torch.cuda.synchronize(device)
        torch.zeros(1, device=device).item()
    except RuntimeError as error:
        raise Broken(text) from error


def _more_sets(
    case: Case, calls: dict[str, list[Call]], rough: dict[str, float], clock: Clock
) -> None:
    """Add sets of inputs for calls that are too short to be timed one at a time."""
    short = {name for name, seconds in rough.items() if seconds < ENOUGH_S}
    if not short or not clock.l2_bytes:
        return
    sets = math.ceil(L2_SIZES * clock.l2_bytes / max(case.min_bytes, 1.0))
    contenders = {contender.name: contender for contender in case.contenders}
    for _ in range(min(sets, MOST_SETS) - 1):
        try:
            inputs = case.inputs()
            with torch.set_grad_enabled(bool(case.wanted)):
                more = {name: ready_call(case, contenders[name], inputs) for name in short}
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return
        for name, call in more.items():
            calls[name].append(_in_mode(call, bool(case.wanted)))
            calls[name][-1]()


def _times(timing: Timing) -> dict[str, Any]:
    return {
        "us": timing.median_s * 1e6,
        "low_us": timing.low_s * 1e6,
        "high_us": timing.high_s * 1e6,
        "samples": timing.num_samples,
        "host_us": timing.host_s * 1e6,
    }
