"""Timing a sample of a latency table again."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch

from hw_profiles.backends import Backend, Call
from hw_profiles.latency_table import MEASURED, LatencyTable
from hw_profiles.subnets import measure_subnets
from hw_profiles.targets import (
    archs_at_even_ranks,
    build_for_timing,
    even_ranks,
    random_subnets,
    sub_block_inputs,
)
from hw_profiles.timing import Sentinel, time_interleaved
from hw_profiles.workload import Workload
from searchspace.errors import UserError
from searchspace.specs import SubBlockSpec

Progress = Callable[[float, str], None]

ROUNDS = 24
TARGET_ERROR = 0.01
"""Relative standard error at which sub-blocks are done."""
ARCH_POOL = 64


def sampled_entries(table: LatencyTable, num: int) -> dict[Workload, list[SubBlockSpec]]:
    """Return measured entries at even ranks of latency, about as many of each workload.

    Raises:
        UserError: when the table holds none.
    """
    specs = {spec.key: spec for space in table.spaces for spec in space.sub_blocks()}
    chosen: dict[Workload, list[SubBlockSpec]] = {}
    for index, workload in enumerate(table.workloads):
        share = num // len(table.workloads) + (index < num % len(table.workloads))
        known = sorted(
            (entry.latency_us, key)
            for (name, key), entry in table.entries.items()
            if name == workload.name and key in specs and entry.source == MEASURED
        )
        if known and share:
            chosen[workload] = [specs[known[rank][1]] for rank in even_ranks(len(known), share)]
    if not chosen:
        raise UserError("the latency table holds no measured sub-block; run `nas profile` first")
    return chosen


class Retimed:
    """Sub-blocks that were timed again."""

    def __init__(self, table: LatencyTable, backend: Backend, seed: int, realtime: bool) -> None:
        self.ratios: dict[tuple[str, str], float] = {}
        self.num_reliable = 0
        self._table, self._backend = table, backend
        self._seed, self._realtime = seed, realtime

    def time(self, workload: Workload, specs: Sequence[SubBlockSpec], time_budget_s: float) -> None:
        """Time sub-blocks in one session."""
        generator = torch.Generator().manual_seed(self._seed)
        targets: dict[str, Call] = {}
        for spec in specs:
            block = build_for_timing(spec, generator)
            inputs = sub_block_inputs(spec, workload, generator)
            targets[spec.key] = self._backend.prepare(block, inputs, workload)
        with self._backend.clock() as clock:
            timings = time_interleaved(
                targets,
                rounds=ROUNDS,
                rng=random.Random(self._seed),
                sentinel=Sentinel(self._backend.sentinel(), self._table.sentinel_us),
                time_budget_s=time_budget_s,
                target_error=TARGET_ERROR,
                realtime=self._realtime,
                clock=clock,
            )
        for key, timing in timings.items():
            entry = self._table.entry(workload, key)
            self.ratios[workload.name, key] = timing.latency_us / entry.latency_us
            self.num_reliable += timing.reliable

    def worst(self, num: int) -> tuple[tuple[str, str, float], ...]:
        """Return the ratios that are furthest from 1."""
        ranked = sorted(
            self.ratios, key=lambda key: max(self.ratios[key], 1 / self.ratios[key]), reverse=True
        )
        return tuple((*key, self.ratios[key]) for key in ranked[:num])


def network_ratios(
    table: LatencyTable,
    num: int,
    seed: int,
    realtime: bool,
    time_budget_s: float,
    progress: Progress,
) -> list[float]:
    """Return measured / predicted latency of each network under each corrected workload."""
    workloads = [item for item in table.workloads if item.name in table.corrections]
    if not workloads or not num:
        return []
    archs = archs_at_even_ranks(
        table.spaces[0],
        lambda arch: sum(table.latency_ms(arch, item) for item in workloads),
        num,
        ARCH_POOL,
        seed,
    )
    if not archs:
        return []
    timings = measure_subnets(
        random_subnets(archs, seed),
        workloads,
        backend=table.device.backend,
        reference_us=table.sentinel_us,
        time_budget_s=time_budget_s,
        seed=seed,
        realtime=realtime,
        progress=progress,
    )
    return [
        timings[arch.id][workload.name].latency_us / (1e3 * table.latency_ms(arch, workload))
        for arch in archs
        for workload in workloads
    ]
