"""Measuring a latency table for a search space."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import nn

from hw_profiles.backends import Backend, get_backend
from hw_profiles.calibration import calibrate
from hw_profiles.device import Device
from hw_profiles.latency_table import Entry, LatencyTable
from hw_profiles.memory import peak_mib as peak_mib
from hw_profiles.process import prepare_process
from hw_profiles.samples import Timing
from hw_profiles.subnets import measure_subnets as measure_subnets
from hw_profiles.targets import build_for_timing, sub_block_inputs
from hw_profiles.timing import Sentinel, measured_sentinel, time_interleaved
from hw_profiles.workload import Workload
from searchspace.errors import UserError
from searchspace.space import SearchSpace
from searchspace.specs import FFNSpec, SubBlockSpec

Progress = Callable[[float, str], None]

GROUP_SIZE = 48
"""Sub-blocks timed in one session: a round is short against the drift of the clock, all rounds
together are long against the moods of other programs."""
ROUNDS = 24
SUB_BLOCK_ERROR = 0.02
"""Relative standard error at which a group of sub-blocks is done; errors average out in sums."""
CALIBRATION_SHARE = 0.25
"""Share of the time budget that whole networks get."""

TOLERATED_OVERRUN = 1.1
TOLERATED_MAPE = 10.0
"""Error of left-out networks, in percent, above which the machine is called busy."""

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

    The table is written after each group of sub-blocks. The same call goes on from there; what the
    table at `path` already holds is not measured again.

    Args:
        space: whose sub-blocks are measured.
        workloads: what is timed.
        path: the table's file, which may exist already.
        backend: how sub-blocks are run, a name in `BACKENDS`.
        num_threads: threads of one operator; None takes what is set, or every processor.
        time_budget_s: time to aim at. Rounds are saved first; then inner FFN widths are left to
            interpolation; what still cannot be saved is said in the log and taken.
        progress: called with the share that is done (0 to 1) and a text.
        seed: of random weights and of the timing order.
        realtime: use real-time scheduling.

    Raises:
        UserError: when the file is of another device, damaged or cannot be written, or the machine
            is too busy to time anything.
    """
    prepare_process(num_threads)
    began = time.monotonic()
    runs_on = get_backend(backend)
    table = open_table(path, workloads, runs_on, realtime)
    report = progress or (lambda done, text: None)
    if finished(table, space, workloads):
        return table
    session = _Filling(table, path, runs_on, tuple(workloads), seed, realtime, report)
    session.measure(space.sub_blocks(), _share(time_budget_s, 1 - CALIBRATION_SHARE))
    left_s = None if time_budget_s is None else time_budget_s - (time.monotonic() - began)
    calibrate(
        table,
        space,
        workloads,
        seed=seed,
        time_budget_s=left_s,
        realtime=realtime,
        progress=lambda done, text: report(1 - CALIBRATION_SHARE * (1 - done), text),
    )
    table.save(path)
    _say_too_busy(table, workloads)
    report(1.0, "table ready")
    return table


def finished(table: LatencyTable, space: SearchSpace, workloads: Sequence[Workload]) -> bool:
    """Return whether a table prices every network of a space, correction included."""
    try:
        for workload in workloads:
            for spec in space.sub_blocks():
                table.entry(workload, spec.key)
    except UserError:
        return False
    return all(workload.name in table.corrections for workload in workloads)


def _share(seconds: float | None, share: float) -> float | None:
    return None if seconds is None else seconds * share


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


@dataclass
class _Filling:
    """Fills a table, group by group."""

    table: LatencyTable
    path: Path
    backend: Backend
    workloads: tuple[Workload, ...]
    seed: int
    realtime: bool
    report: Progress

    def measure(self, specs: Sequence[SubBlockSpec], time_budget_s: float | None) -> None:
        """Measure what is missing."""
        start, done = time.monotonic(), 0
        todo, essential = self._missing(specs)
        total = len(todo)
        while todo:
            group, todo = todo[:GROUP_SIZE], todo[GROUP_SIZE:]
            left_s = None
            if time_budget_s is not None:
                left_s = time_budget_s - (time.monotonic() - start)
                left_s = max(left_s, 0.0) * len(group) / (len(group) + len(todo))
            self._measure_group(group, left_s)
            done += len(group)
            needed_s = (time.monotonic() - start) * (1 + len(todo) / done)
            if time_budget_s is not None and needed_s > TOLERATED_OVERRUN * time_budget_s:
                before = len(todo)
                todo = [spec for spec in todo if spec in essential]
                if len(todo) < before:
                    _say_too_slow(time_budget_s, needed_s)
            self.report((1 - CALIBRATION_SHARE) * (1 - len(todo) / total), f"{total} sub-blocks")

    def _missing(
        self, specs: Sequence[SubBlockSpec]
    ) -> tuple[list[SubBlockSpec], set[SubBlockSpec]]:
        """Return the specs that lack an entry, and which of them no interpolation can replace.

        They are shuffled, so that a mood of the machine does not hit one kind of sub-block; what
        cannot be interpolated comes first.
        """
        essential = set(without_inner_widths(specs))
        lacking = [
            spec
            for spec in specs
            if any((item.name, spec.key) not in self.table.entries for item in self.workloads)
        ]
        random.Random(self.seed).shuffle(lacking)
        return sorted(lacking, key=lambda spec: spec not in essential), essential

    def _measure_group(self, group: Sequence[SubBlockSpec], time_budget_s: float | None) -> None:
        began = time.monotonic()
        generator = torch.Generator().manual_seed(self.seed)
        blocks = {spec: build_for_timing(spec, generator) for spec in group}
        for index, workload in enumerate(self.workloads):
            left_s = None if time_budget_s is None else time_budget_s + began - time.monotonic()
            targets = {
                spec.key: self.backend.prepare(
                    block, sub_block_inputs(spec, workload, generator), workload
                )
                for spec, block in blocks.items()
                if (workload.name, spec.key) not in self.table.entries
            }
            with self.backend.clock() as clock:
                timings = time_interleaved(
                    targets,
                    rounds=ROUNDS,
                    rng=random.Random(self.seed),
                    sentinel=Sentinel(self.backend.sentinel(), self.table.sentinel_us),
                    time_budget_s=_share(left_s, 1 / (len(self.workloads) - index)),
                    target_error=SUB_BLOCK_ERROR,
                    realtime=self.realtime,
                    clock=clock,
                )
            for spec in group:
                if spec.key in timings:
                    entry = to_entry(timings[spec.key], blocks[spec])
                    self.table.entries[workload.name, spec.key] = entry
        self.table.save(self.path)


def _say_too_slow(time_budget_s: float, needed_s: float) -> None:
    log.warning(
        "all sub-blocks would take about %.0f s, not %.0f s: inner FFN widths are interpolated",
        needed_s,
        time_budget_s,
    )


def _say_too_busy(table: LatencyTable, workloads: Sequence[Workload]) -> None:
    for workload in workloads:
        fit = table.correction(workload)
        unreliable = sum(
            not entry.reliable
            for (name, _), entry in table.entries.items()
            if name == workload.name
        )
        if unreliable or fit.mape > TOLERATED_MAPE:
            log.warning(
                "%s: networks are predicted to within %.0f %% and %d sub-blocks were disturbed; "
                "the machine was busy; profile again when it is not, or with real-time scheduling",
                workload.name,
                fit.mape,
                unreliable,
            )


def without_inner_widths(specs: Sequence[SubBlockSpec]) -> list[SubBlockSpec]:
    """Keep the smallest, the middle and the largest width of FFNs that are otherwise equal."""
    widths: dict[object, list[int]] = {}
    for spec in specs:
        if isinstance(spec, FFNSpec):
            widths.setdefault(_family(spec), []).append(spec.intermediate_size)
    keep = {family: {min(w), sorted(w)[len(w) // 2], max(w)} for family, w in widths.items()}
    return [
        spec
        for spec in specs
        if not isinstance(spec, FFNSpec) or spec.intermediate_size in keep[_family(spec)]
    ]


def _family(spec: FFNSpec) -> object:
    return replace(spec, intermediate_size=0)


def to_entry(timing: Timing, block: nn.Module) -> Entry:
    """Return a timing as a table entry that says what was timed, and when."""
    return Entry(
        ratio=timing.ratio,
        latency_us=timing.latency_us,
        spread=timing.spread,
        num_samples=timing.num_samples,
        kept_fraction=timing.kept_fraction,
        reliable=timing.reliable,
        implementation=type(getattr(block, "op", block)).__name__,
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
