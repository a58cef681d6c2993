"""Filling a latency table, pass by pass: usable after the first, better after each further one."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor, nn

from hw_profiles.backends import Backend, Call, cuda
from hw_profiles.latency_table import MEASURED, Entry, LatencyTable
from hw_profiles.samples import Timing
from hw_profiles.targets import build_for_timing, sub_block_inputs
from hw_profiles.timing import Sentinel, time_interleaved
from hw_profiles.workload import Workload
from searchspace.cost import weight_bytes
from searchspace.specs import EndsSpec, SubBlockSpec

Progress = Callable[[float, str], None]
Name = tuple[str, str]
"""Workload name and sub-block key: what an entry is filed under."""

CHUNK = 128
"""Sub-blocks timed in one session, after which the table is written."""
PASS_ROUNDS = 4
ROUNDS = 24
"""Rounds after which an entry is done; the error of a median of so many is 1-2 %, and errors
average out in sums."""
SAMPLE_MS = 0.8
KEPT_BYTES = 1536 * 2**20
"""Weights of sub-blocks that are kept from one pass to the next."""


@dataclass
class Filling:
    """Measures sub-blocks in passes of a few rounds.

    Args:
        table: where entries go.
        path: the table's file, written after every session.
        backend: what runs the sub-blocks.
        workloads: what is timed.
        seed: of random weights and of the order.
        realtime: use real-time scheduling.
    """

    table: LatencyTable
    path: Path
    backend: Backend
    workloads: tuple[Workload, ...]
    seed: int
    realtime: bool
    _kept: dict[SubBlockSpec, _Prepared] = field(default_factory=dict, init=False)

    def measure(
        self,
        specs: Sequence[SubBlockSpec],
        time_budget_s: float | None,
        report: Progress,
        first_pass_s: float = 0.0,
    ) -> None:
        """Measure until every entry has `ROUNDS` rounds or the time is over.

        Args:
            specs: the most informative first.
            time_budget_s: nothing further is begun after it; None takes what is needed.
            report: called with the share that is done (0 to 1) and a text.
            first_pass_s: if this is more, what the first pass may take.
        """
        began = time.monotonic()
        deadline = None if time_budget_s is None else began + time_budget_s
        chunks = [specs[begin : begin + CHUNK] for begin in range(0, len(specs), CHUNK)]
        num_passes = -(-ROUNDS // PASS_ROUNDS)
        for number in range(num_passes):
            for index, chunk in enumerate(chunks):
                limit = deadline
                if limit is not None and number == 0:
                    limit = max(limit, began + first_pass_s)
                if limit is not None and time.monotonic() > limit and (number or index):
                    return
                self._session(chunk, number)
                done = (number * len(chunks) + index + 1) / (num_passes * len(chunks))
                if deadline is not None:
                    assert time_budget_s is not None
                    done = max(done, 1 - (deadline - time.monotonic()) / max(time_budget_s, 1e-9))
                report(min(done, 1.0), f"{len(specs)} sub-blocks, pass {number + 1}")

    def _session(self, chunk: Sequence[SubBlockSpec], number: int) -> None:
        wanted = {
            (workload.name, spec.key): (spec, workload)
            for spec in chunk
            for workload in self.workloads
            if self._rounds((workload.name, spec.key)) < ROUNDS
        }
        if not wanted:
            return
        self._prepare([spec for spec, _ in wanted.values()])
        targets = {
            " ".join(name): self._kept[spec].calls[workload]
            for name, (spec, workload) in wanted.items()
        }
        with self.backend.clock() as clock:
            timings = time_interleaved(
                targets,
                rounds=PASS_ROUNDS,
                rng=random.Random(self.seed * 1000 + number),
                sentinel=Sentinel(self.backend.sentinel(), self.table.sentinel_us),
                min_sample_ms=SAMPLE_MS,
                realtime=self.realtime,
                clock=clock,
            )
        for name, (spec, workload) in wanted.items():
            implementation = self._kept[spec].implementation
            self._enter(workload, spec.key, timings[" ".join(name)], implementation)
        self.table.save(self.path)

    def _rounds(self, name: Name) -> int:
        entry = self.table.entries.get(name)
        return entry.num_samples if entry is not None and entry.source == MEASURED else 0

    def _enter(self, workload: Workload, key: str, timing: Timing, implementation: str) -> None:
        """Enter a timing; one of which too few samples were undisturbed is refused."""
        if not timing.reliable:
            return
        entry = to_entry(timing, implementation)
        before = self.table.entries.get((workload.name, key))
        if before is not None and before.source == MEASURED:
            entry = joined(before, entry)
        self.table.enter(workload, key, entry)

    def _prepare(self, specs: Sequence[SubBlockSpec]) -> None:
        """Make what is not kept from an earlier pass; where memory is short, nothing is kept."""
        missing = [spec for spec in dict.fromkeys(specs) if spec not in self._kept]
        total = sum(map(weight_bytes, {*self._kept, *missing}))
        if total > KEPT_BYTES or (self.backend.accelerator() and cuda.short_of_memory()):
            self._kept.clear()
            missing = list(dict.fromkeys(specs))
        generator = torch.Generator().manual_seed(self.seed)
        inputs: dict[object, Tensor] = {}
        for spec in missing:
            block = build_for_timing(spec, generator)
            calls = {}
            for workload in self.workloads:
                # Sub-blocks of one width read the same input: it costs no memory, and no cache.
                of = spec if isinstance(spec, EndsSpec) else spec.d_model
                if (of, workload) not in inputs:
                    inputs[of, workload] = sub_block_inputs(spec, workload, generator)
                calls[workload] = self.backend.prepare(block, inputs[of, workload], workload)
            self._kept[spec] = _Prepared(calls, implementation_of(block))


@dataclass(frozen=True)
class _Prepared:
    calls: Mapping[Workload, Call]
    implementation: str


def implementation_of(block: nn.Module) -> str:
    """Return the name of the class that is timed."""
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


def joined(first: Entry, second: Entry) -> Entry:
    """Return what two sessions say together, each weighted by its rounds."""
    total = first.num_samples + second.num_samples

    def mean(name: str) -> float:
        mine, other = getattr(first, name), getattr(second, name)
        return float((mine * first.num_samples + other * second.num_samples) / total)

    return replace(
        second,
        num_samples=total,
        ratio=mean("ratio"),
        latency_us=mean("latency_us"),
        spread=mean("spread"),
        kept_fraction=mean("kept_fraction"),
    )
