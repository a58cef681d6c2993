"""Why a kernel is as slow as it is: time by kernel, and what the compiler made of each."""

from __future__ import annotations

import gc
import re
from typing import Any

import torch

from tests.benchmarks._kernel_cases.case import OURS, Case
from tests.benchmarks._kernel_run import ready_call
from tests.benchmarks._kernel_targets import Verdict

CALLS = 10
MOST_CASES_EACH = 3
MOST_KERNELS = 16
INSTRUCTIONS = {
    "wgmma": r"wgmma\.mma_async", "mma": r"\bmma\.sync", "cp.async": r"cp\.async",
    "16-byte loads": r"ld\.global[^;]*\.v4\.b32", "local loads": r"ld\.local",
}  # fmt: skip


def worth_profiling(verdicts: list[Verdict]) -> list[str]:
    """Return the cases that fell short of each target most, without repetition."""
    names = [name for verdict in verdicts for name in verdict.short[:MOST_CASES_EACH]]
    return list(dict.fromkeys(names))


def profiled(case: Case, device: torch.device) -> str:
    """Return, as text, where the time of the project's own implementation goes.

    Args:
        case: what to run.
        device: of its inputs.
    """
    known = {id(kernel) for kernel in _compiled_kernels()}
    inputs = case.inputs()
    with torch.set_grad_enabled(bool(case.wanted)):
        call = ready_call(case, case.contenders[0], inputs)
        assert case.contenders[0].name == OURS
        table = _time_by_kernel(call, device)
    fresh = [kernel for kernel in _compiled_kernels() if id(kernel) not in known]
    used = fresh or [k for k in _compiled_kernels() if _name(k) in table]
    # Run before, they are told by name only: others of that name may be among them.
    lines = [table, *(_described(kernel) for kernel in used[-MOST_KERNELS:])]
    return "\n".join(lines)


def _time_by_kernel(call: Any, device: torch.device) -> str:
    on_gpu = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity
    activities = [activity.CPU, *([activity.CUDA] if on_gpu else [])]
    for _ in range(2):
        call()
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(CALLS):
            call()
        if on_gpu:
            torch.cuda.synchronize(device)
    times: dict[str, tuple[float, int]] = {}
    for event in profile.events():
        if on_gpu and event.device_type != torch.autograd.DeviceType.CUDA:
            continue
        total = event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total
        before = times.get(event.name, (0.0, 0))
        times[event.name] = before[0] + total, before[1] + 1
    rows = sorted(times.items(), key=lambda item: -item[1][0])[:15]
    return "\n".join(
        f"{total / CALLS:10.1f} us a call in {count / CALLS:5.1f} of {name[:90]}"
        for name, (total, count) in rows
    )


def _compiled_kernels() -> list[Any]:
    """Return every kernel that Triton holds compiled, whatever its version calls its caches."""
    return [x for x in gc.get_objects() if type(x).__name__ == "CompiledKernel"]


def _name(kernel: Any) -> str:
    return str(getattr(kernel, "name", None) or getattr(kernel.metadata, "name", "?"))


def _described(kernel: Any) -> str:
    metadata = kernel.metadata
    facts = {
        "registers": getattr(kernel, "n_regs", None),
        "spills": getattr(kernel, "n_spills", None),
        "shared": getattr(metadata, "shared", None),
        "warps": getattr(metadata, "num_warps", None),
        "stages": getattr(metadata, "num_stages", None),
    }
    code = getattr(kernel, "asm", {}).get("ptx", "")
    counts = {what: len(re.findall(text, code)) for what, text in INSTRUCTIONS.items()}
    parts = [f"{what} {value}" for what, value in facts.items() if value is not None]
    parts += [f"{what} {count}" for what, count in counts.items() if count]
    return f"  {_name(kernel)}: {', '.join(parts)}; {_constants(kernel)}"


def _constants(kernel: Any) -> str:
    """Return the compile-time arguments, the configuration among them."""
    source = getattr(kernel, "src", None)
    constants, names = getattr(source, "constants", None), None
    if source is not None:
        names = getattr(getattr(source, "fn", None), "arg_names", None)
    if not constants:
        return "constants unknown"

    def label(key: Any) -> str:
        index = key[0] if isinstance(key, tuple) and key else key
        return str(names[index]) if names and isinstance(index, int) else str(index)

    shown = {label(key): value for key, value in constants.items() if value is not None}
    return " ".join(f"{name}={value}" for name, value in shown.items())
