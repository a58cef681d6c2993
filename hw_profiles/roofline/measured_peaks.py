"""Measuring `Peaks` in a few seconds.

Letters: M rows, K inner and N outer width of a product.
"""

from __future__ import annotations

import itertools
import logging
import random
from collections.abc import Mapping

import torch

from hw_profiles.backends import cuda
from hw_profiles.backends.base import Backend, Call
from hw_profiles.roofline.cuda_products import cuda_products
from hw_profiles.roofline.operator_work import work
from hw_profiles.roofline.peaks import FP32, Peaks
from hw_profiles.targets import build_for_timing, sub_block_inputs
from hw_profiles.timing import Sentinel, measured_sentinel, time_interleaved
from hw_profiles.workload import prefill
from searchspace.specs import FFNSpec, MixerSpec, SubBlockSpec

PRODUCT_SIZE = 512
"""Side of the square products: large enough for full speed, and no longer than the time that a
busy machine leaves a thread alone."""
COPY_BYTES = {"cpu": (1 << 19, 1 << 22, 1 << 28), "cuda": (1 << 22, 1 << 25, 1 << 28)}
"""Bytes read and written by the copies: near the core, in a shared cache, in memory; on a GPU, two
sizes in its cache, and memory."""
MAX_COPY_BYTES = {"cpu": 1 << 22, "cuda": 1 << 28}
"""Larger copies go through their memory in steps of this size, for the same reason."""
LEAST_SHARE = 0.25
"""Of the time of a copy, that moving its bytes takes at least; the rest is an operator's fixed
time."""
LOW_BIT_SIZE, LOW_BIT_ROWS, LOW_BIT_GROUP = 768, 8, 32
"""The low-bit kernels are made for few rows."""
SMALL_BLOCKS = (
    FFNSpec(16, "gelu", 16),
    MixerSpec(16, "softmax", 2, 2, 8),
    MixerSpec(16, "gla", 2, 2, 8),
)
"""Sub-blocks that are nothing but the fixed cost of operators, at one token."""
ONE_TOKEN = prefill(1, 1)
ROUNDS = 12
TIME_BUDGET_S = 4.0
CALLS_OF_SMALL = 16
VIEW_IN_GRAPH_US = 1e-3
"""Stands for nothing: a captured graph has no views."""

log = logging.getLogger(__name__)


def measure_peaks(
    backend: Backend, *, reference_us: float | None = None, seed: int = 0, realtime: bool = False
) -> Peaks:
    """Measure the peak rates of a backend's device with the present number of threads.

    Takes one to five seconds. Every rate is timed interleaved with the backend's sentinel, as
    latencies are, so that rates can be compared with each other.

    Args:
        backend: whose device is measured, with PyTorch's operators.
        reference_us: sentinel time that rates are stated for; a table's `sentinel_us`. None
            measures it now.
        seed: of the timing order.
        realtime: use real-time scheduling.

    Raises:
        TooBusyError: when the machine is too busy to time anything.

    Source: Williams et al. 2009, "Roofline: An Insightful Visual Performance Model", section 3.
    """
    kind = "cuda" if backend.accelerator() else "cpu"
    device = cuda.current_device() if kind == "cuda" else torch.device("cpu")
    if reference_us is None:
        reference_us = measured_sentinel(backend, realtime).reference_us
    with torch.no_grad():
        products = _products() if kind == "cpu" else cuda_products(device)
        blocks = {spec.key: _prepared(backend, spec) for spec in SMALL_BLOCKS}
        copies = {str(size): _copy(size, MAX_COPY_BYTES[kind], device) for size in COPY_BYTES[kind]}
        small = _small(device)
        if kind == "cuda":
            # Launched one by one they would take as long as launching does.
            copies = {name: cuda.graphed(call) for name, call in copies.items()}
            small = {"op": cuda.graphed(small["op"])}
        targets = {name: call for name, (call, _) in products.items()}
        targets |= copies | blocks | small
        with backend.clock() as clock:
            timings = time_interleaved(
                targets,
                rounds=ROUNDS,
                time_budget_s=TIME_BUDGET_S,
                rng=random.Random(seed),
                sentinel=Sentinel(backend.sentinel(), reference_us),
                min_sample_ms=0.5,
                realtime=realtime,
                clock=clock,
            )
    disturbed = [name for name, timing in timings.items() if not timing.reliable]
    if disturbed:
        log.warning("the machine was busy while peak rates were measured: %s", ", ".join(disturbed))
    us = {name: timing.latency_us for name, timing in timings.items()}
    op_us = us["op"] / CALLS_OF_SMALL
    view_us = us["view"] / CALLS_OF_SMALL if "view" in us else VIEW_IN_GRAPH_US
    slower = _slower_in_modules(us, op_us, view_us)
    return Peaks(
        gflops={name: flops / us[name] / 1e3 for name, (_, flops) in products.items()},
        copy_gb_s={
            size: _copied(size, kind) / max(us[size] - op_us, LEAST_SHARE * us[size]) / 1e3
            for size in copies
        },
        op_us=slower * op_us,
        view_us=slower * view_us,
    )


def _prepared(backend: Backend, spec: SubBlockSpec) -> Call:
    generator = torch.Generator().manual_seed(0)
    inputs = sub_block_inputs(spec, ONE_TOKEN, generator)
    return backend.prepare(build_for_timing(spec, generator), inputs, ONE_TOKEN)


def _slower_in_modules(us: Mapping[str, float], op_us: float, view_us: float) -> float:
    """Return how much longer tiny operators take inside modules than one after another in a loop.

    The interpreter, module calls and cold code are three quarters of what eager modules of this
    size take; a compiled backend has less of all that.
    """
    done = [work(spec, ONE_TOKEN) for spec in SMALL_BLOCKS]
    alone_us = sum(one.num_ops * op_us + one.num_views * view_us for one in done)
    return sum(us[spec.key] for spec in SMALL_BLOCKS) / alone_us


def _products() -> dict[str, tuple[Call, float]]:
    """Return a product and its FLOPs for every precision that processors multiply."""
    size = PRODUCT_SIZE
    ones = torch.ones(size, size)
    calls: dict[str, tuple[Call, float]] = {}
    for name, dtype in ((FP32, torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        left, right, out = (ones.to(dtype, copy=True) for _ in range(3))
        calls[name] = (_mm(left, right, out), 2.0 * size**3)
    values, weights = (ones.to(torch.int8) for _ in range(2))
    sums = ones.to(torch.int32)
    calls["int8"] = (lambda: torch._int_mm(values, weights.t(), out=sums), 2.0 * size**3)
    return calls | _low_bit()


def _mm(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> Call:
    return lambda: torch.mm(left, right.t(), out=out)


def _low_bit() -> dict[str, tuple[Call, float]]:
    """Return products with the CPU kernels for 8- and 4-bit weights."""
    size, rows = LOW_BIT_SIZE, LOW_BIT_ROWS
    x_MK = torch.ones(rows, size, dtype=torch.bfloat16)
    weight_NK, scale_N = torch.ones(size, size, dtype=torch.int8), torch.ones(size).bfloat16()
    codes_NK = torch.ones(size, size, dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes_NK, 1)
    scale_zero_GN2 = torch.ones(size // LOW_BIT_GROUP, size, 2, dtype=torch.bfloat16)
    run_int4 = torch.ops.aten._weight_int4pack_mm_for_cpu
    flops = 2.0 * rows * size**2
    return {
        "int8_weight": (lambda: torch._weight_int8pack_mm(x_MK, weight_NK, scale_N), flops),
        "int4": (lambda: run_int4(x_MK, packed, LOW_BIT_GROUP, scale_zero_GN2), flops),
    }


def _copy(num_bytes: int, most_bytes: int, device: torch.device) -> Call:
    """Return a copy within `num_bytes`; each call takes the next `most_bytes` of them."""
    step = min(num_bytes, most_bytes) // 8
    sources, targets = torch.ones(2, num_bytes // 8 // step, step, device=device)
    pairs = itertools.cycle(list(zip(sources, targets, strict=True)))

    def copy() -> None:
        source, target = next(pairs)
        target.copy_(source)

    return copy


def _copied(size: str, kind: str) -> int:
    return min(int(size), MAX_COPY_BYTES[kind])


def _small(device: torch.device) -> dict[str, Call]:
    """Return `CALLS_OF_SMALL` calls of the smallest operator, and of a view."""
    left, right = torch.ones(2, 8, device=device)

    def operators() -> None:
        for _ in range(CALLS_OF_SMALL):
            torch.add(left, right)

    def views() -> None:
        for _ in range(CALLS_OF_SMALL):
            left.unsqueeze(0)

    return {"op": operators, "view": views}
