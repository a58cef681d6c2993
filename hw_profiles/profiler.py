"""Measuring a latency table for a search space, and timing whole networks."""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from torch import nn

from hw_profiles.correction import fit_correction
from hw_profiles.device import Device
from hw_profiles.latency_table import Entry, LatencyTable
from hw_profiles.memory import peak_mib as peak_mib
from hw_profiles.process import prepare_process, single_threaded
from hw_profiles.runners import build_for_timing, runner, sub_block_inputs
from hw_profiles.timing import Sentinel, Timing, time_interleaved
from hw_profiles.workload import Workload
from searchspace.arch import Arch
from searchspace.errors import UserError
from searchspace.space import SearchSpace
from searchspace.specs import FFNSpec, SubBlockSpec
from searchspace.subnet import Subnet

Progress = Callable[[float, str], None]

GROUP_SIZE = 48
"""Targets timed in one session: a round of it is short against the drift of the clock, and all rounds
together are long against the moods of other programs."""
ROUNDS = 24
SUB_BLOCK_ERROR = 0.02
"""Relative standard error at which a group of sub-blocks is done; errors average out in sums."""
SUBNET_ROUNDS = 60
SUBNET_ERROR = 0.007
SUBNET_SAMPLE_MS = 2.5
CALIBRATION_NETWORKS = 14
CALIBRATION_POOL = 256
CALIBRATION_SHARE = 0.25
"""Share of the time budget that whole networks get."""

log = logging.getLogger(__name__)


def profile(
    space: SearchSpace,
    workloads: Sequence[Workload],
    path: Path,
    *,
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
    table = open_table(path, workloads, realtime)
    report = progress or (lambda done, text: None)
    session = _Session(table, path, seed, realtime, report)
    session.measure(space.sub_blocks(), _share(time_budget_s, 1 - CALIBRATION_SHARE))
    if session.measured_any or any(item.name not in table.corrections for item in workloads):
        left = None if time_budget_s is None else time_budget_s - (time.monotonic() - began)
        calibrate(table, space, workloads, seed, left, realtime, report)
        table.save(path)
    report(1.0, "table ready")
    return table


def _share(seconds: float | None, share: float) -> float | None:
    return None if seconds is None else seconds * share


def open_table(path: Path, workloads: Sequence[Workload], realtime: bool = False) -> LatencyTable:
    """Return the table at `path`, or a new one with its sentinel measured now.

    Raises:
        UserError: when the file is damaged or of another device.
    """
    device = Device.current()
    if not path.exists():
        return LatencyTable(device, tuple(workloads), Sentinel.measured(realtime=realtime).reference_us)
    table = LatencyTable.load(path)
    table.device.require_same(device, f"the latency table {path}")
    table.workloads = tuple(dict.fromkeys([*table.workloads, *workloads]))
    return table


@dataclass
class _Session:
    """Fills a table, group by group."""

    table: LatencyTable
    path: Path
    seed: int
    realtime: bool
    report: Progress
    measured_any: bool = False

    def measure(self, specs: Sequence[SubBlockSpec], time_budget_s: float | None) -> None:
        """Measure what is missing."""
        start, done = time.monotonic(), 0
        todo = self._missing(specs)
        total, skipped = len(todo), 0
        while todo:
            group, todo = todo[:GROUP_SIZE], todo[GROUP_SIZE:]
            left_s = None
            if time_budget_s is not None:
                left_s = time_budget_s - (time.monotonic() - start)
                left_s = max(left_s, 0.0) * len(group) / (len(group) + len(todo))
            self._measure_group(group, left_s)
            done += len(group)
            elapsed_s = time.monotonic() - start
            if not skipped and _too_slow(elapsed_s, done, len(todo), time_budget_s):
                todo, skipped = _without_inner_widths(todo), len(todo)
                skipped -= len(todo)
                self._say_too_slow(elapsed_s, done, len(todo), time_budget_s)
            share = (1 - CALIBRATION_SHARE) * (done + skipped) / total
            self.report(share, f"{done + skipped} of {total} sub-blocks")

    def _missing(self, specs: Sequence[SubBlockSpec]) -> list[SubBlockSpec]:
        """Return the specs that lack an entry, mixed, with FFN ends and the middle early.

        A group of mixed sub-blocks runs them in the surroundings they have in networks.
        """
        names = [item.name for item in self.table.workloads]
        lacking = [
            spec
            for spec in specs
            if any((name, spec.key) not in self.table.entries for name in names)
        ]
        random.Random(self.seed).shuffle(lacking)
        first = set(_without_inner_widths(lacking))
        return sorted(lacking, key=lambda spec: spec not in first)

    def _measure_group(self, group: Sequence[SubBlockSpec], time_budget_s: float | None) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        blocks = {spec: build_for_timing(spec, generator) for spec in group}
        for workload in self.table.workloads:
            targets = {
                spec.key: runner(block, sub_block_inputs(spec, workload, generator), workload)
                for spec, block in blocks.items()
                if (workload.name, spec.key) not in self.table.entries
            }
            timings = time_interleaved(
                targets,
                rounds=ROUNDS,
                rng=random.Random(self.seed),
                sentinel=Sentinel.gemm(self.table.sentinel_us),
                time_budget_s=_share(time_budget_s, 1 / len(self.table.workloads)),
                target_error=SUB_BLOCK_ERROR,
                realtime=self.realtime,
            )
            for spec in group:
                if spec.key in timings:
                    entry = to_entry(timings[spec.key], implementation(blocks[spec]))
                    self.table.entries[workload.name, spec.key] = entry
        self.measured_any = True
        self.table.save(self.path)

    def _say_too_slow(
        self, elapsed_s: float, done: int, left: int, time_budget_s: float | None
    ) -> None:
        needed_s = elapsed_s * (1 + left / done)
        log.warning(
            "profiling takes longer than its budget of %.0f s: inner FFN widths are interpolated, "
            "and about %.0f s are needed",
            time_budget_s or math.nan,
            needed_s,
        )


def _too_slow(elapsed_s: float, done: int, left: int, time_budget_s: float | None) -> bool:
    return time_budget_s is not None and elapsed_s * (1 + left / done) > 1.1 * time_budget_s


def _without_inner_widths(specs: Sequence[SubBlockSpec]) -> list[SubBlockSpec]:
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
    return spec.d_model, spec.ffn, spec.precision, spec.norm


def implementation(block: nn.Module) -> str:
    """Return the class that does a sub-block's work."""
    return type(getattr(block, "op", block)).__name__


def to_entry(timing: Timing, implementation: str) -> Entry:
    """Return a timing as a table entry that says what was timed, and when."""
    return Entry(
        ratio=timing.ratio,
        latency_us=timing.latency_us,
        spread=timing.spread,
        num_samples=timing.num_samples,
        kept_fraction=timing.kept_fraction,
        reliable=timing.reliable,
        implementation=implementation,
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def calibrate(
    table: LatencyTable,
    space: SearchSpace,
    workloads: Sequence[Workload],
    seed: int,
    time_budget_s: float | None,
    realtime: bool,
    report: Progress,
) -> None:
    """Time whole random networks and fit the table's correction of each workload."""
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
        reference_us=table.sentinel_us,
        time_budget_s=time_budget_s,
        seed=seed,
        realtime=realtime,
        progress=lambda done, text: report(
            1 - CALIBRATION_SHARE * (1 - done), "whole networks, for the correction"
        ),
    )
    for workload in workloads:
        sums = [raw_sum_us(table, arch, workload) for arch in archs]
        table.corrections[workload.name] = fit_correction(
            sums,
            [len(arch.sub_blocks()) for arch in archs],
            [timings[arch.id][workload.name].latency_us for arch in archs],
            min(e.latency_us for (name, _), e in table.entries.items() if name == workload.name),
        )


def raw_sum_us(table: LatencyTable, arch: Arch, workload: Workload) -> float:
    """Return the sum of an arch's entries, without correction."""
    return math.fsum(table.entry(workload, spec.key).latency_us for spec in arch.sub_blocks())


def calibration_archs(
    table: LatencyTable, space: SearchSpace, workloads: Sequence[Workload], seed: int
) -> list[Arch]:
    """Draw random archs and return some whose table sums are evenly spread, extremes included."""
    rng = np.random.default_rng(seed)
    pool = {
        arch.id: arch
        for arch in map(space.decode, space.sample_genotypes(rng, CALIBRATION_POOL))
    }
    sums: dict[str, float] = {}
    for arch in pool.values():
        try:
            sums[arch.id] = raw_sum_us(table, arch, workloads[0])
        except UserError:
            continue
    if not sums:
        return []
    wanted = np.geomspace(min(sums.values()), max(sums.values()), CALIBRATION_NETWORKS)
    chosen: dict[str, None] = {}
    for target in wanted:
        rest = [arch_id for arch_id in sums if arch_id not in chosen]
        if rest:
            chosen[min(rest, key=lambda arch_id: abs(sums[arch_id] - target))] = None
    return [pool[arch_id] for arch_id in chosen]


def measure_subnets(
    subnets: Mapping[str, nn.Module],
    workloads: Sequence[Workload],
    *,
    rounds: int = SUBNET_ROUNDS,
    reference_us: float | None = None,
    time_budget_s: float | None = None,
    seed: int = 0,
    realtime: bool = False,
    progress: Progress | None = None,
) -> dict[str, dict[str, Timing]]:
    """Time whole networks, interleaved in groups.

    Args:
        subnets: packed networks in evaluation mode, by any id.
        workloads: what to run.
        rounds: rounds at most.
        reference_us: sentinel time that latencies are stated for; give a table's `sentinel_us` to
            compare with it. None measures it now.
        time_budget_s: time to aim at; rounds are saved, down to a minimum.
        seed: of the token ids and the order.
        realtime: use real-time scheduling.
        progress: called with the share that is done (0 to 1) and a text.

    Returns:
        Timings by id and workload name.

    Raises:
        TooBusyError: when the machine is too busy to time anything.
    """
    if reference_us is None:
        reference_us = Sentinel.measured(realtime=realtime).reference_us
    sentinel, generator = Sentinel.gemm(reference_us), torch.Generator().manual_seed(seed)
    ids = list(subnets)
    groups = [ids[begin : begin + GROUP_SIZE] for begin in range(0, len(ids), GROUP_SIZE)]
    steps = [(workload, group) for group in groups for workload in workloads]
    result: dict[str, dict[str, Timing]] = {name: {} for name in ids}
    for index, (workload, group) in enumerate(steps):
        calls = {}
        for name in group:
            vocab_size = getattr(subnets[name], "arch").vocab_size
            shape = (workload.batch, workload.new_tokens)
            tokens = torch.randint(vocab_size, shape, generator=generator)
            calls[name] = runner(subnets[name], tokens, workload)
        timings = time_interleaved(
            calls,
            rounds=rounds,
            rng=random.Random(seed),
            sentinel=sentinel,
            time_budget_s=_share(time_budget_s, 1 / len(steps)),
            target_error=SUBNET_ERROR,
            min_sample_ms=SUBNET_SAMPLE_MS,
            realtime=realtime,
        )
        for name, timing in timings.items():
            result[name][workload.name] = timing
        if progress:
            progress((index + 1) / len(steps), f"{workload.name}")
    return result
