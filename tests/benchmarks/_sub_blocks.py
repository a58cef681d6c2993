"""Timing sub-blocks beside each other, as a latency table does, and printing tables."""

from __future__ import annotations

import argparse
import random
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from hw_profiles.backends.eager import EagerBackend
from hw_profiles.targets import sub_block_inputs
from hw_profiles.timing import Sentinel, time_interleaved
from hw_profiles.workload import Workload
from searchspace.specs import SubBlockSpec

Block = tuple[SubBlockSpec, nn.Module]


def add_timing_arguments(parser: argparse.ArgumentParser, workloads: Sequence[str]) -> None:
    parser.add_argument("--workloads", nargs="+", default=list(workloads))
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--realtime", action="store_true")
    parser.add_argument("--json", action="store_true")


def latencies_ms(
    blocks: Mapping[str, Block],
    workload: Workload,
    sentinel_us: float,
    arguments: argparse.Namespace,
) -> dict[str, float]:
    """Time ready-made sub-blocks in one interleaved session.

    Args:
        blocks: spec and module by any name.
        workload: what is timed.
        sentinel_us: speed that latencies are stated for.
        arguments: of `add_timing_arguments`.
    """
    backend, generator = EagerBackend(), torch.Generator().manual_seed(arguments.seed)
    with torch.inference_mode():
        calls = {
            name: backend.prepare(block, sub_block_inputs(spec, workload, generator), workload)
            for name, (spec, block) in blocks.items()
        }
    with backend.clock() as clock:
        timings = time_interleaved(
            calls,
            rounds=arguments.rounds,
            rng=random.Random(arguments.seed),
            sentinel=Sentinel(backend.sentinel(), sentinel_us),
            realtime=arguments.realtime,
            clock=clock,
        )
    return {name: timing.latency_us / 1e3 for name, timing in timings.items()}


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of cells as text, all columns but the first to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
