"""What each precision buys: latency and stored bytes of sub-blocks against fp32.

    python -m tests.benchmarks.precisions --json > precisions.json

A softmax attention block and a SwiGLU block of every precision, all in the form that is deployed
and interleaved in one session per workload. `held` are the bytes of the weights in memory after the
first call: some kernels keep a layout of their own beside what is stored.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import torch
from torch import nn

from hw_profiles.backends.eager import EagerBackend
from hw_profiles.memory import kept_tensors
from hw_profiles.process import prepare_process
from hw_profiles.targets import build_for_timing
from hw_profiles.timing import measured_sentinel
from hw_profiles.workload import Workload
from searchspace.precisions import PRECISIONS
from searchspace.specs import FFNSpec, MixerSpec, SubBlockSpec
from searchspace.subnet import weight_bytes
from tests.benchmarks._sub_blocks import Block, add_timing_arguments, aligned, latencies_ms

HEAD_DIM = 32
BASE = "fp32"
WORKLOADS = ["prefill_b1_t1", "prefill_b1_t16", "prefill_b1_t256", "decode_b1_t256"]


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--d-model", nargs="+", type=int, default=[192, 512])
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS))
    add_timing_arguments(parser, WORKLOADS)
    arguments = parser.parse_args()
    arguments.precisions = list(dict.fromkeys([BASE, *arguments.precisions]))
    prepare_process(arguments.threads)
    result = run(arguments)
    print(json.dumps(result, indent=1) if arguments.json else table_text(result))


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure; returns bytes and latencies by sub-block and precision."""
    sentinel_us = measured_sentinel(EagerBackend(), arguments.realtime).reference_us
    generator = torch.Generator().manual_seed(arguments.seed)
    blocks: dict[str, Block] = {}
    for d_model in arguments.d_model:
        for kind in ("softmax", "swiglu"):
            for precision in arguments.precisions:
                spec = spec_of(kind, d_model, precision)
                name = f"{kind} {d_model} {precision}"
                blocks[name] = spec, build_for_timing(spec, generator)
    latencies: dict[str, dict[str, float]] = {}
    for name in arguments.workloads:
        print(name, file=sys.stderr)
        latencies[name] = latencies_ms(blocks, Workload.parse(name), sentinel_us, arguments)
    result: dict[str, Any] = {}
    for name, (_, block) in blocks.items():
        group, precision = name.rsplit(" ", 1)
        result.setdefault(group, {})[precision] = {
            **bytes_of(block),
            "latency_ms": {workload: found[name] for workload, found in latencies.items()},
        }
    for rows in result.values():
        for row in rows.values():
            add_ratios(row, rows[BASE])
    return result


def spec_of(kind: str, d_model: int, precision: str) -> SubBlockSpec:
    """Return a sub-block's spec; `kind` is a mixer or an FFN."""
    if kind == "softmax":
        heads = d_model // HEAD_DIM
        return MixerSpec(d_model, kind, heads, heads, HEAD_DIM, "rope", precision)
    return FFNSpec(d_model, kind, 8 * d_model // 3 // 32 * 32, precision)


def bytes_of(block: nn.Module) -> dict[str, int]:
    """Return the bytes that are stored, and those held in memory."""
    stored = weight_bytes(block)
    kept = sum(t.numel() * t.element_size() for t in kept_tensors(block))
    return {"stored_bytes": stored, "held_bytes": stored + kept}


def add_ratios(row: dict[str, Any], base: dict[str, Any]) -> None:
    """Add what is compared with fp32."""
    row["stored_ratio"] = row["stored_bytes"] / base["stored_bytes"]
    row["held_ratio"] = row["held_bytes"] / base["held_bytes"]
    row["latency_ratio"] = {
        name: value / base["latency_ms"][name] for name, value in row["latency_ms"].items()
    }


def table_text(result: dict[str, Any]) -> str:
    """Return the ratios as text for a terminal; the rows of fp32 are ms and bytes."""
    parts = []
    for group, rows in result.items():
        workloads = list(rows[BASE]["latency_ms"])
        lines = [[group, *workloads, "stored", "held"]]
        base = rows[BASE]
        ms = [f"{value:.3f} ms" for value in base["latency_ms"].values()]
        lines.append([BASE, *ms, str(base["stored_bytes"]), str(base["held_bytes"])])
        for name, row in rows.items():
            if name != BASE:
                ratios = [*row["latency_ratio"].values(), row["stored_ratio"], row["held_ratio"]]
                lines.append([name, *(f"{ratio:.3f}" for ratio in ratios)])
        parts.append(aligned(lines))
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()
