"""Calibrating a latency table on whole random networks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from hw_profiles.latency_table import LatencyTable
from hw_profiles.profiler.correction_fit import Networks, fit_correction
from hw_profiles.subnets import measure_subnets
from hw_profiles.targets import archs_at_even_ranks, random_subnets
from hw_profiles.workload import Workload
from searchspace.arch import Arch
from searchspace.errors import UserError
from searchspace.space import SearchSpace

Progress = Callable[[float, str], None]

MIN_NETWORKS, MAX_NETWORKS = 12, 320
DEFAULT_NETWORKS = 128
"""Without a time budget."""
POOL_PER_NETWORK = 8
ROUNDS = 8
"""Rounds of each network: more networks say more than more rounds of few."""
SAMPLE_MS = 2.0
OVERHEAD = 2.5
"""Time that a sample takes, as a multiple of what it times: warming up, sentinels, resting."""
BUILDING_MS = 30.0
"""Time to make a network."""


def calibrate(
    table: LatencyTable,
    space: SearchSpace,
    workloads: Sequence[Workload],
    *,
    seed: int = 0,
    time_budget_s: float | None = None,
    realtime: bool = False,
    progress: Progress | None = None,
) -> None:
    """Time whole random networks and fit the table's correction of each workload.

    Raises:
        UserError: when the table does not hold any network of the space whole.
    """
    num = num_networks(table, space, workloads, seed, time_budget_s)
    archs = calibration_archs(table, space, workloads, seed, num)
    if not archs:
        raise UserError(
            f"the latency table holds no network of space {space.name!r} whole; profile with a "
            "longer time budget"
        )
    timings = measure_subnets(
        random_subnets(archs, seed),
        workloads,
        backend=table.device.backend,
        reference_us=table.sentinel_us,
        rounds=ROUNDS,
        min_sample_ms=SAMPLE_MS,
        time_budget_s=time_budget_s,
        seed=seed,
        realtime=realtime,
        progress=progress,
    )
    for workload in workloads:
        timed = {arch.id: timings[arch.id][workload.name] for arch in archs}
        kept = [arch for arch in archs if timed[arch.id].reliable] or archs
        specs = [arch.sub_blocks() for arch in kept]
        networks_timed = Networks(
            specs,
            [[table.entry(workload, s.key).latency_us for s in row] for row in specs],
            [timed[arch.id].latency_us for arch in kept],
            workload,
        )
        table.corrections[workload.name] = replace(
            fit_correction(networks_timed), arch_ids=tuple(arch.id for arch in kept)
        )


def num_networks(
    table: LatencyTable,
    space: SearchSpace,
    workloads: Sequence[Workload],
    seed: int,
    time_budget_s: float | None,
) -> int:
    """Return how many networks can be timed in a budget."""
    if time_budget_s is None:
        return DEFAULT_NETWORKS
    some = calibration_archs(table, space, workloads, seed, MIN_NETWORKS)
    if not some:
        return MIN_NETWORKS
    each_ms = BUILDING_MS
    for workload in workloads:
        typical_ms = math.fsum(raw_sum_us(table, arch, workload) / 1e3 for arch in some) / len(some)
        each_ms += OVERHEAD * ROUNDS * max(SAMPLE_MS, typical_ms)
    return int(np.clip(time_budget_s * 1e3 / each_ms, MIN_NETWORKS, MAX_NETWORKS))


def raw_sum_us(table: LatencyTable, arch: Arch, workload: Workload) -> float:
    """Return the sum of an arch's entries, without correction."""
    return math.fsum(table.entry(workload, spec.key).latency_us for spec in arch.sub_blocks())


def calibration_archs(
    table: LatencyTable,
    space: SearchSpace,
    workloads: Sequence[Workload],
    seed: int,
    num: int = MIN_NETWORKS,
) -> list[Arch]:
    """Return random archs at even quantiles of the table sums, the extremes included.

    Even quantiles and not even latencies: the fit must hold for the archs that a search sees.
    """
    return archs_at_even_ranks(
        space,
        lambda arch: raw_sum_us(table, arch, workloads[0]),
        num,
        POOL_PER_NETWORK * num,
        seed,
    )
