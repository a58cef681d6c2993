"""Transfer of a latency table to a new device: a few whole networks instead of every sub-block.

Devices differ in what they do fast: another processor gains on int8 products, one more thread on
long sub-blocks and not on short ones. They differ by operator, precision and size and not sub-block
by sub-block; a complete table of another device says the rest. Whole networks are measured because
each averages over a dozen sub-blocks, in the surroundings that a sub-block timed alone lacks.

Letters: M networks, P features; see `hw_profiles.transfer.fit`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from hw_profiles.backends import get_backend
from hw_profiles.device import Device
from hw_profiles.latency_table import TRANSFERRED, Entry, LatencyTable
from hw_profiles.latency_table.correction import Correction
from hw_profiles.process import prepare_process
from hw_profiles.profiler.correction_fit import COVERED
from hw_profiles.samples import STANDARD_ERROR, Timing
from hw_profiles.subnets import measure_subnets
from hw_profiles.targets import random_subnets
from hw_profiles.timing import measured_sentinel
from hw_profiles.transfer.basis import Basis
from hw_profiles.transfer.choice import most_informative
from hw_profiles.transfer.features import Floats
from hw_profiles.transfer.fit import USUAL_SDS, TransferFit, fit_transfer
from hw_profiles.workload import Workload
from searchspace.arch import Arch
from searchspace.errors import UserError
from searchspace.space import SearchSpace
from searchspace.specs import SubBlockSpec

Progress = Callable[[float, str], None]

CANDIDATES = 512
"""Random networks among which the measured ones are chosen."""
MIN_MEASUREMENTS = 3
USUAL_NETWORKS = 128
"""Random networks that stated errors are errors of."""
MAD_OF_SD = 0.6745
"""Median absolute deviation of a normal value of standard deviation 1."""


def transfer(
    source: LatencyTable,
    space: SearchSpace,
    workloads: Sequence[Workload],
    path: Path,
    *,
    num_measurements: int = 20,
    backend: str = "eager",
    num_threads: int | None = None,
    seed: int = 0,
    realtime: bool = False,
    time_budget_s: float | None = None,
    progress: Progress | None = None,
) -> LatencyTable:
    """Make the table of this device from another one's and a few networks measured here.

    Args:
        source: a complete table of another device, thread count or backend.
        space: whose sub-blocks the table shall hold.
        workloads: what the table is about; the source holds them all.
        path: where the table is written; nothing may be there yet.
        num_measurements: whole networks that are timed here, each under every workload.
        backend: how networks are run here, a name in `BACKENDS`.
        num_threads: threads of one operator; None takes what is set, or every processor.
        seed: of the networks to choose from, their weights and the timing order.
        realtime: use real-time scheduling.
        time_budget_s: time to aim at for the measurements.
        progress: called with the share that is done (0 to 1) and a text.

    Returns:
        A complete table whose entries have the source ``"transferred"``. The errors that its
        corrections state are of measured networks left out of the fit one by one, as large as they
        would be had the networks been random.

    Raises:
        UserError: when `path` exists, the source lacks something, there are too few measurements,
            or the backend cannot be used here.
        TooBusyError: when the machine is too busy to time anything.
    """
    if path.exists():
        raise UserError(f"{path} exists already; give another path or delete it to transfer anew")
    prepare_process(num_threads)
    runs_on = get_backend(backend)
    archs = choose_networks(source, space, workloads, num_measurements, seed)
    device = Device.current(runs_on)
    sentinel_us = measured_sentinel(runs_on, realtime).reference_us
    timings = measure_subnets(
        random_subnets(archs, seed),
        workloads,
        backend=backend,
        reference_us=sentinel_us,
        time_budget_s=time_budget_s,
        seed=seed,
        realtime=realtime,
        progress=progress,
    )
    measured = {item.name: [timings[arch.id][item.name] for arch in archs] for item in workloads}
    target = LatencyTable(device, tuple(workloads), sentinel_us, spaces=(space,))
    table = transferred(source, space, target, archs, measured)
    table.save(path)
    return table


def choose_networks(
    source: LatencyTable,
    space: SearchSpace,
    workloads: Sequence[Workload],
    num_measurements: int,
    seed: int = 0,
) -> list[Arch]:
    """Return the networks of a space whose latencies tell most about all the others', best first.

    Raises:
        UserError: when the source lacks something, or for too few measurements.
    """
    if num_measurements < MIN_MEASUREMENTS:
        raise UserError(
            f"num_measurements={num_measurements} is too few to transfer a latency table; give at "
            f"least {MIN_MEASUREMENTS}, better 20"
        )
    rng = np.random.default_rng(seed)
    pool = [space.decode(row) for row in space.sample_genotypes(rng, CANDIDATES)]
    unique = list({arch.id: arch for arch in pool}.values())
    gradients, variances = [], []
    for workload in workloads:
        basis = Basis.of(source, space, workload)
        variances.append(basis.model.features.prior_variance(*USUAL_SDS[1:]))
        start = np.zeros(len(variances[-1]))
        gradients.append(basis.model.linearised(basis.amounts(unique), start)[1])
    return [unique[row] for row in most_informative(gradients, variances, num_measurements)]


def transferred(
    source: LatencyTable,
    space: SearchSpace,
    target: LatencyTable,
    targets: Sequence[Arch | SubBlockSpec],
    measured: Mapping[str, Sequence[Timing]],
) -> LatencyTable:
    """Return the target's table from the source's and what was measured on the target.

    Args:
        source: see `transfer`.
        space: see `transfer`.
        target: gives everything but entries and corrections of its workloads.
        targets: what was measured: whole networks, or sub-blocks alone.
        measured: timing of each on the target, by workload name.

    Raises:
        UserError: when the source lacks something.
    """
    table = replace(target, entries=dict(target.entries), corrections=dict(target.corrections))
    for workload in table.workloads:
        basis = Basis.of(source, space, workload)
        timings = measured[workload.name]
        latency_us = np.array([timing.latency_us for timing in timings])
        fit = fit_transfer(basis.model, basis.amounts(targets), latency_us, _errors(timings))
        for key, entry in _entries(basis, fit, timings, table.sentinel_us).items():
            table.enter(workload, key, entry)
        usual = space.sample_genotypes(np.random.default_rng(0), USUAL_NETWORKS)
        usual_amounts = basis.amounts([space.decode(row) for row in usual])
        _, gradient_MP = basis.model.linearised(usual_amounts, fit.weights_P)
        table.corrections[workload.name] = replace(
            _correction(basis, fit, fit.errors_expected(gradient_MP)),
            arch_ids=tuple(item.id for item in targets if isinstance(item, Arch)),
        )
    return table


def _errors(timings: Sequence[Timing]) -> Floats:
    """Return the relative standard error of each; the spread of few samples is not to be trusted
    when it is small.
    """
    spread = np.array([timing.spread for timing in timings])
    num_samples = np.array([timing.num_samples for timing in timings])
    errors = STANDARD_ERROR * np.maximum(spread, np.median(spread)) / np.sqrt(num_samples)
    return np.asarray(errors)


def _entries(
    basis: Basis, fit: TransferFit, timings: Sequence[Timing], sentinel_us: float
) -> dict[str, Entry]:
    """Return the target's entries; their spread is how far the fit may be off."""
    latency_us = basis.model.sub_block_us(fit.weights_P).tolist()
    relative_sd = fit.relative_sd(basis.model.features.values_SP).tolist()
    kept_fraction = statistics.fmean(timing.kept_fraction for timing in timings)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {
        spec.key: replace(
            Entry.predicted(us, sentinel_us, TRANSFERRED),
            spread=max(entry.spread, MAD_OF_SD * sd),
            num_samples=len(timings),
            kept_fraction=kept_fraction,
            reliable=True,
            implementation=entry.implementation,
            measured_at=now,
        )
        for spec, entry, us, sd in zip(
            basis.specs, basis.entries, latency_us[:-1], relative_sd[:-1], strict=True
        )
    }


def _correction(basis: Basis, fit: TransferFit, log_errors: Floats) -> Correction:
    """Return what is added once; what the source's correction did to entries is in the entries."""
    factor = float(basis.model.sub_block_us(fit.weights_P)[-1])
    ranked = np.sort(np.abs(log_errors))
    # The conformal rank: of n + 1 exchangeable errors the new one is rarely above it.
    rank = min(math.ceil(COVERED * (len(ranked) + 1)), len(ranked))
    return replace(
        basis.correction,
        intercept_us=factor * basis.correction.intercept_us,
        once_us={trait: factor * us for trait, us in basis.correction.once_us.items()},
        spills=tuple(
            replace(spill, us_per_mib=factor * spill.us_per_mib)
            for spill in basis.correction.spills
        ),
        mape=float(100 * np.mean(np.expm1(ranked))),
        error_90=float(np.expm1(ranked[rank - 1])),
        num_networks=len(ranked),
    )
