"""Calibrating a latency table on whole random networks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from hw_profiles.correction import fit_correction
from hw_profiles.latency_table import LatencyTable
from hw_profiles.process import single_threaded
from hw_profiles.subnets import measure_subnets
from hw_profiles.workload import Workload
from searchspace.arch import Arch
from searchspace.cost import arch_cost, weight_bytes
from searchspace.errors import UserError
from searchspace.space import SearchSpace
from searchspace.subnet import Subnet

Progress = Callable[[float, str], None]

CALIBRATION_NETWORKS = 24
CALIBRATION_POOL = 256


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
    archs = calibration_archs(table, space, workloads, seed)
    if not archs:
        raise UserError(
            f"the latency table holds no network of space {space.name!r} whole; profile with a "
            "longer time budget"
        )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad(), single_threaded():
        networks = {arch.id: Subnet(arch).reset(generator).pack().eval() for arch in archs}
    timings = measure_subnets(
        networks,
        workloads,
        backend=table.device.backend,
        reference_us=table.sentinel_us,
        time_budget_s=time_budget_s,
        seed=seed,
        realtime=realtime,
        progress=progress,
    )
    for workload in workloads:
        sums = [raw_sum_us(table, arch, workload) for arch in archs]
        table.corrections[workload.name] = fit_correction(
            sums,
            [len(arch.sub_blocks()) for arch in archs],
            [arch_cost(arch, weight_bytes) for arch in archs],
            [timings[arch.id][workload.name].latency_us for arch in archs],
            min(e.latency_us for (name, _), e in table.entries.items() if name == workload.name),
        )


def raw_sum_us(table: LatencyTable, arch: Arch, workload: Workload) -> float:
    """Return the sum of an arch's entries, without correction."""
    return math.fsum(table.entry(workload, spec.key).latency_us for spec in arch.sub_blocks())


def calibration_archs(
    table: LatencyTable, space: SearchSpace, workloads: Sequence[Workload], seed: int
) -> list[Arch]:
    """Return random archs at even quantiles of the table sums, the extremes included.

    Even quantiles and not even latencies: the fit must hold for the archs that a search sees.
    """
    rng = np.random.default_rng(seed)
    pool = {
        arch.id: arch for arch in map(space.decode, space.sample_genotypes(rng, CALIBRATION_POOL))
    }
    sums: dict[str, float] = {}
    for arch in pool.values():
        try:
            sums[arch.id] = raw_sum_us(table, arch, workloads[0])
        except UserError:
            continue
    if not sums:
        return []
    ranked = sorted(sums, key=lambda arch_id: sums[arch_id])
    ranks = np.linspace(0, len(ranked) - 1, min(CALIBRATION_NETWORKS, len(ranked)))
    chosen = dict.fromkeys(ranked[round(rank)] for rank in ranks)
    return [pool[arch_id] for arch_id in chosen]
