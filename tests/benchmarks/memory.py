"""Predicted memory of random archs against real checkpoints, states, runs and the real process.

    python -m tests.benchmarks.memory --json > memory.json

Bytes are compared one by one: weights with the tensors in the file that `Subnet.save` writes (the
header beside them is stated), states with the state of a real run, peaks with the storages alive in
a real run. The last two columns compare peaks with the process, in a child of its own for each
arch: `heap` is what malloc has handed out, read after every operator; `resident` is the kernel's
high-water mark of resident memory, with allocations of a page and more given back at once. Both
are growths since before the weights were made; `resident` also holds what operators use inside.
PyTorch's own objects, about a kilobyte a tensor, are in both and not in the prediction: 0.1 to 0.3
MiB of a network.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import multiprocessing
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hw_profiles.backends.eager import runner
from hw_profiles.memory import MIB, measured_peak_mib, peak_mib
from hw_profiles.process import M_MMAP_THRESHOLD
from hw_profiles.workload import Workload
from searchspace.arch import Arch
from searchspace.cost import arch_cost, state_bytes, weight_bytes
from searchspace.ends import example_inputs
from searchspace.linear import Linear
from searchspace.space import SearchSpace
from searchspace.subnet import Subnet
from searchspace.subnet import state_bytes as bytes_of_state
from tests.benchmarks._sub_blocks import aligned

PRESETS = ("decoder-small", "encoder-small", "vit-small")
FACTS: dict[str, dict[str, Any]] = {
    "encoder": {"kind": "encoder", "num_classes": 4, "max_tokens": 512},
    "vit": {"kind": "vit", "num_classes": 10, "image_size": 32, "channels": 3},
}
VOCABULARY = 256
WARM = 8
"""Tokens of the pass that loads libraries; its masks and tables are not those of the workloads."""
PAGE = 4096
COLUMNS = ("peak", "max diff", "ms", "max ms", "heap %", "max", "resident %", "max")


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--presets", nargs="+", default=list(PRESETS))
    parser.add_argument("--num", type=int, default=12, help="archs (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    # A forked child must not inherit threads; small allocations must leave no holes.
    torch.set_num_threads(1)
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, PAGE)
    result = {preset: run(preset, arguments) for preset in arguments.presets}
    print(json.dumps(result, indent=1) if arguments.json else table_text(result))


def run(preset: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Compare random archs of a preset; returns figures by workload, and rows of all archs."""
    kind = preset.split("-")[0]
    space = SearchSpace.load(preset, 0 if kind == "vit" else VOCABULARY, FACTS.get(kind))
    sizes = {"batch": arguments.batch, "tokens": arguments.tokens}
    phases = ("prefill",) if kind in FACTS else ("prefill", "decode")
    workloads = [Workload(phase, **sizes) for phase in phases]  # type: ignore[arg-type]
    rng = np.random.default_rng(arguments.seed)
    archs = [space.sample(rng) for _ in range(arguments.num)]
    # PyTorch imports a tenth of itself at the first use of some operators on the meta device.
    peak_mib(archs[0], Workload("prefill", 1, WARM))
    # First, and in children: masks and tables of earlier archs must not be there.
    grown = [[in_child(partial(process_peaks, arch, w)) for w in workloads] for arch in archs]
    rows = []
    for number, (arch, process) in enumerate(zip(archs, grown, strict=True)):
        network = built(Subnet(arch), number).pack()
        row = {"arch_id": arch.id, **stored(arch, network)}
        if "decode" in phases:
            row |= states(arch, network, workloads[-1])
        row["peaks"] = {
            workload.name: compared(arch, network, workload, measured)
            for workload, measured in zip(workloads, process, strict=True)
        }
        rows.append(row)
    return {"rows": rows, "summary": {w.name: summary(rows, w.name) for w in workloads}}


def built(network: Subnet, seed: int) -> Subnet:
    """Return a network with random weights, as it was trained."""
    return network.reset(torch.Generator().manual_seed(seed)).eval().requires_grad_(False)


def stored(arch: Arch, network: Subnet) -> dict[str, int]:
    """Compare the bytes of weights with the file; the header is beside them."""
    with tempfile.TemporaryDirectory() as folder:
        network.save(folder)
        content = (Path(folder) / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    predicted = int(arch_cost(arch, weight_bytes))
    return {
        "weight_bytes": predicted,
        "weight_diff": len(content) - header - predicted,
        "header_bytes": header,
    }


def states(arch: Arch, network: Subnet, workload: Workload) -> dict[str, int]:
    """Compare the bytes of the state with one that has seen tokens."""
    batch, room = workload.batch, workload.max_tokens
    predicted = int(arch_cost(arch, partial(state_bytes, batch=batch, max_tokens=room)))
    state = network.init_state(batch, room)
    with torch.inference_mode():
        network(example_inputs(arch.ends, batch, WARM), state)
    return {"state_bytes": predicted, "state_diff": bytes_of_state(state) - predicted}


def compared(
    arch: Arch, network: Subnet, workload: Workload, process: dict[str, float]
) -> dict[str, float]:
    """Compare the peak with a run that counts storages, and with what `process_peaks` measured."""
    began = time.perf_counter()
    predicted = peak_mib(arch, workload)
    row = {"peak_mib": predicted, "ms": (time.perf_counter() - began) * 1e3}
    row["diff_bytes"] = (measured_peak_mib(network, workload) - predicted) * MIB
    for name, value in process.items():
        row |= {f"{name}_mib": value, f"{name}_pct": 100 * (predicted / value - 1)}
    return row


def in_child(call: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Return the result of a call in a forked process."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(call()))
    process.start()
    sender.close()
    result: dict[str, float] = receiver.recv()
    process.join()
    return result


def process_peaks(arch: Arch, workload: Workload) -> dict[str, float]:
    """Return how much this process grows by a network and one pass, in MiB."""
    with torch.no_grad():
        warm_up(arch, workload)
        with torch.device("meta"):
            # Python's objects are there before the count starts.
            network = Subnet(arch)
        libc().malloc_trim(0)
        heap, resident, mapped = heap_bytes(), status("VmRSS"), status("RssFile")
        network = built(network.to_empty(device="cpu"), 0).pack()
        run = runner(
            network, example_inputs(arch.ends, workload.batch, workload.new_tokens), workload
        )
        run()
        Path("/proc/self/clear_refs").write_text("5")
        run()
        grown = status("VmHWM") - resident - (status("RssFile") - mapped)
        with HeapPeak() as peak:
            run()
    return {"heap": (peak.bytes - heap) / MIB, "resident": grown / MIB}


def warm_up(arch: Arch, workload: Workload) -> None:
    """Run parts of an arch, so that libraries and what they keep for good are there.

    MKL takes two buffers of 4.4 MiB at its first large products, and hardly touches them. Masks
    and tables must not be there, so the network itself sees few tokens.
    """
    network = built(Subnet(arch), 0)
    linears = {m: m.weight.shape[1] for m in network.modules() if isinstance(m, Linear)}
    network.pack()
    short = replace(workload, tokens=WARM)
    runner(network, example_inputs(arch.ends, short.batch, short.new_tokens), short)()
    rows = workload.batch * workload.new_tokens
    for linear, in_features in linears.items():
        linear(torch.zeros(rows, in_features))


class HeapPeak(TorchDispatchMode):  # type: ignore[no-untyped-call,unused-ignore]
    """Reads after every operator what malloc has handed out."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call,unused-ignore]
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operator."""
        result = func(*args, **(kwargs or {}))
        self.bytes = max(self.bytes, heap_bytes())
        return result


class MallInfo(ctypes.Structure):
    """The ten fields of glibc's `struct mallinfo2`."""

    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd",
        "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
    )]  # fmt: skip


def libc() -> ctypes.CDLL:
    """Return the C library, knowing what `mallinfo2` returns."""
    library = ctypes.CDLL(None)
    library.mallinfo2.restype = MallInfo
    return library


def heap_bytes() -> int:
    """Return the bytes that malloc has handed out, in its heap and in maps of their own."""
    info = libc().mallinfo2()
    return int(info.uordblks + info.hblkhd)


def status(name: str) -> int:
    """Return a size from /proc/self/status, in bytes."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def summary(rows: list[dict[str, Any]], workload: str) -> dict[str, float]:
    """Return medians and worst cases over archs."""
    found = [row["peaks"][workload] for row in rows]
    result = {
        "peak_mib": float(np.median([row["peak_mib"] for row in found])),
        "max_diff_bytes": max(abs(row["diff_bytes"]) for row in found),
        "median_ms": float(np.median([row["ms"] for row in found])),
        "max_ms": max(row["ms"] for row in found),
    }
    for name in ("heap", "resident"):
        errors = [abs(row[f"{name}_pct"]) for row in found]
        result |= {f"{name}_mape_pct": math.fsum(errors) / len(errors)}
        result |= {f"{name}_max_pct": max(errors)}
    return result


def table_text(result: dict[str, Any]) -> str:
    """Return the summaries as text for a terminal."""
    lines = [["", *COLUMNS]]
    notes = []
    for preset, found in result.items():
        for workload, values in found["summary"].items():
            lines.append([f"{preset} {workload}", *(f"{value:.2f}" for value in values.values())])
        rows = found["rows"]
        weights = max(abs(row["weight_diff"]) for row in rows)
        state = max(abs(row.get("state_diff", 0)) for row in rows)
        header = max(row["header_bytes"] for row in rows)
        notes.append(
            f"{preset}: weights off by at most {weights} bytes (file headers up to {header} bytes "
            f"not counted), states by at most {state} bytes"
        )
    return "\n".join([aligned(lines), *notes])


if __name__ == "__main__":
    main()
