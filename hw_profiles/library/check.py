"""Does an old latency table still hold, and is the machine quiet enough to ask?"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from hw_profiles.backends import Backend, Call, get_backend
from hw_profiles.clock import Clock
from hw_profiles.latency_table import LatencyTable
from hw_profiles.library.comparison import NEAR_PCT, Ratios
from hw_profiles.library.retiming import Retimed, network_ratios, sampled_entries
from hw_profiles.timing import measured_sentinel
from searchspace.errors import UserError

Progress = Callable[[float, str], None]

NUM_ENTRIES = 24
NUM_NETWORKS = 4
TIME_BUDGET_S = 30.0
SUB_BLOCK_SHARE = 0.5
"""Share of the time that sub-blocks get; whole networks get the rest."""
MIN_NEAR_PCT = 75.0
"""Percentage of the ratios that must be near 1 for a table to hold."""
TOLERATED_ERRORS = 2.0
"""Networks may be off by so many times the error that the table states for them."""
MIN_RELIABLE_SHARE = 0.5
PROBE_NS = 200_000_000
BUSY_SHARE = 0.03
"""Share of the probe that its threads waited for a processor, from which a machine is busy."""


@dataclass(frozen=True)
class TableCheck:
    """What timing a sample of a table again has shown.

    Args:
        entries: time now / time in the table, of sub-blocks.
        networks: time now / predicted time, of whole networks; None where the table predicts none.
        sentinel: what the sentinel takes now / when the table was begun: the clock's speed, which
            ratios do not depend on.
        worst: (workload, key, ratio) of the sub-blocks that are furthest off, furthest first.
        reliable: whether enough samples were undisturbed to judge.
    """

    entries: Ratios
    networks: Ratios | None
    sentinel: float
    worst: tuple[tuple[str, str, float], ...]
    reliable: bool

    @property
    def holds(self) -> bool:
        """Whether the table can be used as it is."""
        return self.reliable and not self._faults()

    def _faults(self) -> list[str]:
        faults = []
        for what, ratios in (("sub-blocks", self.entries), ("whole networks", self.networks)):
            if ratios is None:
                continue
            if not ratios.is_near:
                faults.append(f"{what} take {ratios.median:.2f} times what it says")
            elif ratios.near_pct < MIN_NEAR_PCT:
                faults.append(f"only {_within(ratios, what)} of it")
        return faults

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON-ready form."""
        return {**asdict(self), "holds": self.holds, "verdict": self.verdict}

    @property
    def verdict(self) -> str:
        """One sentence, with what to do where the table does not hold."""
        if not self.reliable:
            return (
                "it cannot be said whether the table holds: other programs disturbed most "
                "samples; check again when they are done"
            )
        if faults := self._faults():
            return (
                f"the table no longer holds: {' and '.join(faults)}; delete it and run "
                "`nas profile` again"
            )
        found = _within(self.entries, "sub-blocks")
        if self.networks:
            found += f" and {_within(self.networks, 'whole networks')}"
        return f"the table still holds: {found} of what it says"


def _within(ratios: Ratios, what: str) -> str:
    return f"{ratios.near_pct:.0f} % of {ratios.num} {what} are within {ratios.tolerance_pct:.0f} %"


def check_table(
    table: LatencyTable,
    *,
    num_entries: int = NUM_ENTRIES,
    num_networks: int = NUM_NETWORKS,
    time_budget_s: float = TIME_BUDGET_S,
    seed: int = 0,
    realtime: bool = False,
    progress: Progress | None = None,
) -> TableCheck:
    """Time a sample of a table's sub-blocks, and a few whole networks, again.

    Args:
        table: of this device, prepared as for profiling.
        num_entries: sub-blocks, spread evenly over the ranks of latency, of all workloads together.
        num_networks: random networks of its first search space, spread likewise; each is timed
            under every workload whose correction was fitted.
        time_budget_s: time at most, but for a few rounds; on a quiet machine it takes less.
        seed: of weights, inputs and the timing order.
        realtime: use real-time scheduling.
        progress: called with the share that is done (0 to 1) and a text.

    Raises:
        UserError: when the table is of another device, or does not say for which search space it
            is, so that nothing can be built.
        TooBusyError: when the machine is too busy to time anything.
    """
    if not table.spaces:
        raise UserError(
            "the latency table does not say for which search space it is, so none of its "
            "sub-blocks can be built; run `nas profile` with the space to complete it"
        )
    backend = get_backend(table.device.backend)
    report = progress or (lambda done, text: None)
    speed = measured_sentinel(backend, realtime).reference_us / table.sentinel_us
    blocks = Retimed(table, backend, seed, realtime)
    chosen = sampled_entries(table, num_entries)
    for index, (workload, specs) in enumerate(chosen.items()):
        blocks.time(workload, specs, SUB_BLOCK_SHARE * time_budget_s / len(chosen))
        report(SUB_BLOCK_SHARE * (index + 1) / len(chosen), "sub-blocks")
    networks = network_ratios(
        table, num_networks, seed, realtime, (1 - SUB_BLOCK_SHARE) * time_budget_s,
        lambda done, text: report(SUB_BLOCK_SHARE + (1 - SUB_BLOCK_SHARE) * done, "networks"),
    )  # fmt: skip
    return TableCheck(
        entries=Ratios.of(blocks.ratios.values()),
        networks=Ratios.of(networks, _network_tolerance_pct(table)) if networks else None,
        sentinel=speed,
        worst=blocks.worst(5),
        reliable=blocks.num_reliable >= MIN_RELIABLE_SHARE * len(blocks.ratios),
    )


def _network_tolerance_pct(table: LatencyTable) -> float:
    stated = [fit.mape for fit in table.corrections.values() if not math.isnan(fit.mape)]
    return max(NEAR_PCT, TOLERATED_ERRORS * max(stated, default=0.0))


def busy_here(backend: Backend) -> str:
    """Return `busy_sentence` for this machine now; takes 0.2 s."""
    with torch.inference_mode():
        call = backend.sentinel()
        call()  # worker threads exist only from now on
        with backend.clock() as clock:
            return busy_sentence(clock, call)


def busy_sentence(clock: Clock, call: Call, probe_ns: int = PROBE_NS) -> str:
    """Say whether other programs use the processors; empty where they do not.

    Args:
        clock: of the call's backend.
        call: something short that uses every thread, such as the sentinel.
        probe_ns: for how long to try.

    Source: Linux documentation, scheduler/sched-stats (run delay).
    """
    began, delay = clock.now_ns(), clock.run_delay_ns()
    elapsed_ns = 0
    while elapsed_ns < probe_ns:
        clock.elapsed_ns(call, 1)
        elapsed_ns = clock.now_ns() - began
    share = (clock.run_delay_ns() - delay) / elapsed_ns
    if share < BUSY_SHARE:
        return ""
    return (
        f"other programs use the processors: threads waited for one during {min(share, 1):.0%} of "
        f"a {elapsed_ns / 1e9:.1f} s probe, so timing takes longer and is less exact; stop them, "
        "or use --realtime where that is allowed"
    )
