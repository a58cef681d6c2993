"""`nas doctor`: what this machine has, how fast it multiplies, and what that means for a run."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from hw_profiles.backends import BACKENDS, get_backend
from hw_profiles.device import Device
from hw_profiles.energy import energy_meters
from hw_profiles.library.check import busy_here
from hw_profiles.process import current_settings, prepare_process

if TYPE_CHECKING:
    from rich.console import RenderableType

GEMM_SIZE = 768
GEMM_SAMPLES = 9
OPTIONAL_PACKAGES = ("triton", "ray")
# A ratio nearer to 1 than this is called "as fast as".
NOTICEABLE = 1.15
COMFORTABLE_MEMORY_GIB = 4.0


def collect() -> dict[str, Any]:
    """Return everything `render` shows, JSON-ready. Takes a few seconds at most."""
    prepare_process()
    device = Device.current()
    facts: dict[str, Any] = {
        "device_id": device.id,
        "device": device.to_dict(),
        "available_memory_gib": available_memory_gib(),
        "packages": {name: installed_version(name) for name in OPTIONAL_PACKAGES},
        "cuda": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "gemm_gops": gemm_rates(),
        "backends": {name: kind().unavailable() for name, kind in BACKENDS.items()},
        "energy_meters": [meter.name for meter in energy_meters()],
        "busy": busy_here(get_backend("eager")),
        "notes": list(current_settings().notes),
    }
    return {**facts, "meaning": meaning(facts)}


def installed_version(package: str) -> str | None:
    """Return a distribution's version without importing it, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def available_memory_gib() -> float | None:
    """Return the memory that programs can still take, or None where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return round(int(line.split()[1]) / 2**20, 1)
    except OSError:
        return None
    return None


def gemm_rates(size: int = GEMM_SIZE) -> dict[str, float | None]:
    """Return the rate of a square matrix product per precision, in 10^9 operations per second.

    None stands for a precision this PyTorch cannot multiply in.
    """
    generator = torch.Generator().manual_seed(0)
    fp32 = torch.randn(2, size, size, generator=generator)
    bf16 = fp32.to(torch.bfloat16)
    int8 = (fp32 * 30).clamp(-127, 127).to(torch.int8)
    products: dict[str, Callable[[], torch.Tensor]] = {
        "fp32": lambda: fp32[0] @ fp32[1],
        "bf16": lambda: bf16[0] @ bf16[1],
        "int8": lambda: torch._int_mm(int8[0], int8[1]),
    }
    return {name: _rate(product, 2e-9 * size**3) for name, product in products.items()}


def _rate(product: Callable[[], object], giga_operations: float) -> float | None:
    """Return the rate of the fastest of several runs: others only ever make it slower."""
    durations_s = []
    try:
        product()
        for _ in range(GEMM_SAMPLES):
            start = time.perf_counter()
            product()
            durations_s.append(time.perf_counter() - start)
    except (RuntimeError, AttributeError):
        return None
    return round(giga_operations / min(durations_s), 1)


def meaning(facts: Mapping[str, Any]) -> list[str]:
    """Return one sentence for each finding, saying what it means for the user."""
    rates, device, packages = facts["gemm_gops"], facts["device"], facts["packages"]
    sentences = [
        _compared("bf16", rates, "training in bf16 pays", "training is faster in fp32"),
        _compared(
            "int8", rates, "8-bit layers make networks faster", "8-bit layers only save memory"
        ),
        f"operators use {device['num_threads']} of {device['num_processors']} processors; latency "
        "tables hold for this number only",
    ]
    memory_gib = facts["available_memory_gib"]
    if memory_gib is not None and memory_gib < COMFORTABLE_MEMORY_GIB:
        sentences.append(
            f"only {memory_gib:g} GiB of memory are free; the quick start takes up to "
            f"{COMFORTABLE_MEMORY_GIB:g} GiB, so close other programs"
        )
    if facts["cuda"]:
        sentences.append(f"CUDA device: {', '.join(facts['cuda'])}")
    else:
        sentences.append("no CUDA device: everything runs on the processor")
    if not (packages["triton"] and facts["cuda"]):
        why = "there is no CUDA device" if packages["triton"] else "triton is not installed"
        sentences.append(f"kernels run as plain PyTorch because {why}")
    sentences += [
        f"backend {name} cannot be used: {lacking}"
        for name, lacking in facts["backends"].items()
        if lacking and name != "cuda"
    ]
    if not facts["energy_meters"]:
        sentences.append("no energy meter can be read: energies are not stated")
    if facts["busy"]:
        sentences.append(facts["busy"])
    return [*sentences, *facts["notes"]]


def _compared(name: str, rates: Mapping[str, float | None], faster: str, slower: str) -> str:
    rate, base = rates[name], rates["fp32"]
    if not rate or not base:
        return f"{name} matrix products do not run here: leave {name} out"
    ratio = rate / base
    if ratio >= NOTICEABLE:
        return f"{name} matrix products are {ratio:.1f}x faster than fp32 here: {faster}"
    if ratio <= 1 / NOTICEABLE:
        return f"{name} matrix products are {1 / ratio:.1f}x slower than fp32 here: {slower}"
    return f"{name} matrix products are as fast as fp32 here: {slower}"


def render(facts: Mapping[str, Any]) -> RenderableType:
    """Return what `collect` found as a table and a list of sentences for a terminal."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    device = facts["device"]
    memory = f"{device['memory_gib']:g} GiB"
    if facts["available_memory_gib"] is not None:
        memory += f", {facts['available_memory_gib']:g} GiB free"
    rows = {
        "device": f"{facts['device_id']} ({device['os']})",
        "processor": device["cpu"],
        "instructions": ", ".join(device["isa"]) or "none known",
        "threads": f"{device['num_threads']} of {device['num_processors']} processors",
        "memory": memory,
        "python, torch": f"{device['python']}, {device['torch']}",
        **{name: version or "not installed" for name, version in facts["packages"].items()},
        "CUDA": ", ".join(facts["cuda"]) or "none",
        "backends": ", ".join(name for name, lacking in facts["backends"].items() if not lacking),
        "energy meters": ", ".join(facts["energy_meters"]) or "none",
        "matrix products": ", ".join(
            f"{name} {rate:g} Gop/s" for name, rate in facts["gemm_gops"].items() if rate
        ),
    }
    table = Table(show_header=False, box=None)
    for name, value in rows.items():
        table.add_row(Text(name, style="bold"), Text(value))
    return Group(table, *(Text(f"- {sentence}") for sentence in facts["meaning"]))
