"""Measuring a latency table for a search space."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from hw_profiles.backends import Backend, get_backend
from hw_profiles.device import Device
from hw_profiles.latency_table import INTERPOLATED, MEASURED, TRANSFERRED, Entry, LatencyTable
from hw_profiles.latency_table.locking import one_profiler
from hw_profiles.latency_table.merge import joined as joined_spaces
from hw_profiles.process import prepare_process
from hw_profiles.profiler.calibration import calibrate
from hw_profiles.profiler.filling import Filling
from hw_profiles.profiler.planning import by_information
from hw_profiles.roofline import CalibratedPrior, Roofline, measure_peaks, suspicious
from hw_profiles.samples import TooBusyError
from hw_profiles.timing import measured_sentinel
from hw_profiles.workload import Workload
from searchspace.errors import UserError
from searchspace.space import SearchSpace
from searchspace.specs import EndsSpec, FFNSpec, SubBlockSpec

Progress = Callable[[float, str], None]

ENTRIES_SHARE = 0.5
"""Share of the time budget that sub-blocks get, whole networks have the rest: they cost as much,
and say how sub-blocks behave together."""
FIRST_PASS_SHARE = 0.75
"""Share that sub-blocks may get until each was measured once: a backend may take longer to prepare
them than to run them."""
TOLERATED_MAPE = 10.0
"""Error of left-out networks, in percent, above which the machine is called busy."""
PRIOR_EXAMPLES = 160
"""Measured entries that the prior is calibrated on; each costs some milliseconds."""

log = logging.getLogger(__name__)


def profile(
    space: SearchSpace,
    workloads: Sequence[Workload],
    path: Path,
    *,
    backend: str = "eager",
    num_threads: int | None = None,
    time_budget_s: float | None = None,
    progress: Progress | None = None,
    seed: int = 0,
    realtime: bool = False,
) -> LatencyTable:
    """Measure every sub-block a space can reach, and calibrate on whole networks.

    The most informative sub-blocks come first, all get a few rounds before any gets more, and the
    table is written after every session: it can be stopped at any time, and the same call goes on.
    What the time does not suffice for is filled by interpolation along FFN widths and by a
    calibrated roofline, and marked so.

    Args:
        space: whose sub-blocks are measured.
        workloads: what is timed.
        path: the table's file, which may exist already.
        backend: how sub-blocks are run, a name in `BACKENDS`.
        num_threads: threads of one operator; None takes what is set, or every processor.
        time_budget_s: time to aim at; None takes what it needs.
        progress: called with the share that is done (0 to 1) and a text.
        seed: of random weights and of the timing order.
        realtime: use real-time scheduling.

    Raises:
        UserError: when the file is of another device, damaged, in use by another profiler or cannot
            be written; or the backend cannot be used, or cannot run a sub-block of the space.
        TooBusyError: when the machine is too busy to time anything.
    """
    prepare_process(num_threads)
    began, report = time.monotonic(), progress or (lambda done, text: None)
    runs_on = get_backend(backend)
    path.parent.mkdir(parents=True, exist_ok=True)
    with one_profiler(path):
        table = open_table(path, workloads, runs_on, realtime)
        table.spaces = joined_spaces(table.spaces, space)
        if finished(table, space, workloads):
            return table
        if table.roofline is None:
            table.roofline = Roofline(measure_peaks(runs_on, reference_us=table.sentinel_us))
        specs = by_information(space, space.sub_blocks(), seed)
        share = 0.0 if complete(table, space, workloads) else ENTRIES_SHARE
        if share:
            Filling(table, path, runs_on, tuple(workloads), seed, realtime).measure(
                specs,
                None if time_budget_s is None else time_budget_s * share,
                lambda done, text: report(share * done, text),
                0.0 if time_budget_s is None else time_budget_s * FIRST_PASS_SHARE,
            )
        fill_from_prior(table, specs, workloads)
        left_s = None if time_budget_s is None else time_budget_s - (time.monotonic() - began)
        calibrate(
            table,
            space,
            workloads,
            seed=seed,
            time_budget_s=left_s,
            realtime=realtime,
            progress=lambda done, text: report(share + (1 - share) * done, text),
        )
        table.save(path)
    _say_too_busy(table, workloads)
    report(1.0, "table ready")
    return table


def complete(table: LatencyTable, space: SearchSpace, workloads: Sequence[Workload]) -> bool:
    """Return whether every sub-block of a space was measured or lies between two that were."""
    return not _missing(table, space.sub_blocks(), workloads)


def finished(table: LatencyTable, space: SearchSpace, workloads: Sequence[Workload]) -> bool:
    """Return whether a table prices every network of a space, correction included."""
    corrected = all(workload.name in table.corrections for workload in workloads)
    return corrected and complete(table, space, workloads)


def open_table(
    path: Path, workloads: Sequence[Workload], backend: Backend, realtime: bool = False
) -> LatencyTable:
    """Return the table at `path`, or a new one with its sentinel measured now.

    Raises:
        UserError: when the file is damaged or of another device.
    """
    device = Device.current(backend)
    if not path.exists():
        return LatencyTable(
            device, tuple(workloads), measured_sentinel(backend, realtime).reference_us
        )
    table = LatencyTable.load(path)
    table.device.require_same(device, f"the latency table {path}")
    table.workloads = tuple(dict.fromkeys([*table.workloads, *workloads]))
    return table


def _missing(
    table: LatencyTable, specs: Sequence[SubBlockSpec], workloads: Sequence[Workload]
) -> list[tuple[Workload, SubBlockSpec]]:
    """Return what is neither measured nor between two measured widths."""
    missing = []
    for workload in workloads:
        for spec in specs:
            try:
                lacks = table.entry(workload, spec.key).source not in (MEASURED, INTERPOLATED)
            except UserError:
                lacks = True
            if lacks:
                missing.append((workload, spec))
    return missing


def fill_from_prior(
    table: LatencyTable, specs: Sequence[SubBlockSpec], workloads: Sequence[Workload]
) -> None:
    """Enter a calibrated roofline for what is missing, and say which entries look wrong.

    Raises:
        TooBusyError: when nothing at all was measured.
    """
    names = {w.name for w in workloads}
    measured = {
        name: entry.latency_us
        for name, entry in table.entries.items()
        if entry.source == MEASURED and name[0] in names
    }
    if not measured:
        raise TooBusyError(
            "the machine is too busy to time anything: every sample of every sub-block was "
            "disturbed; stop other programs, use fewer threads or real-time scheduling, and run "
            "the same command again"
        )
    assert table.roofline is not None
    known = {key for _, key in measured}
    chosen = _examples([spec for spec in specs if spec.key in known])
    keys = {spec.key for spec in chosen}
    examples = {name: us for name, us in measured.items() if name[1] in keys}
    prior = CalibratedPrior.fit(examples, chosen, table.roofline)
    for sentence in suspicious(examples, prior):
        log.warning("%s", sentence)
    missing = _missing(table, specs, workloads)
    for workload in workloads:
        lacking = [
            spec
            for item, spec in missing
            if item == workload and not _transferred(table, workload, spec)
        ]
        if not lacking:
            continue
        log.warning(
            "%s: %d of %d sub-blocks are not measured yet and priced by a calibrated roofline; the "
            "same command with more time measures them",
            workload.name,
            len(lacking),
            len(specs),
        )
        for spec, us in zip(lacking, prior.predict_us(lacking, workload).tolist(), strict=True):
            table.enter(workload, spec.key, Entry.predicted(us, table.sentinel_us))


def _transferred(table: LatencyTable, workload: Workload, spec: SubBlockSpec) -> bool:
    entry = table.entries.get((workload.name, spec.key))
    return entry is not None and entry.source == TRANSFERRED


def _examples(specs: Sequence[SubBlockSpec]) -> list[SubBlockSpec]:
    """Return the largest sub-block of every kind, precision and norm, then others."""
    largest: dict[object, SubBlockSpec] = {}
    for spec in sorted(specs, key=lambda spec: -spec.d_model):
        if isinstance(spec, EndsSpec):
            kind: object = "ends"
        elif isinstance(spec, FFNSpec):
            kind = (spec.ffn, spec.precision, spec.norm)
        else:
            kind = (spec.mixer, spec.precision, spec.norm)
        largest.setdefault(kind, spec)
    return list(dict.fromkeys([*largest.values(), *specs]))[:PRIOR_EXAMPLES]


def _say_too_busy(table: LatencyTable, workloads: Sequence[Workload]) -> None:
    for workload in workloads:
        fit = table.correction(workload)
        if fit.mape > TOLERATED_MAPE:
            log.warning(
                "%s: networks are predicted to within %.0f %% only; the machine was busy; profile "
                "again when it is not, or with real-time scheduling",
                workload.name,
                fit.mape,
            )
