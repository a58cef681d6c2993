"""`Basis`: what is known about a device before anything is measured on it, from another's table.

Letters: N measured networks, S sub-blocks and once more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from hw_profiles.latency_table import Entry, LatencyTable
from hw_profiles.latency_table.correction import MIB, Correction, traits, working_set_bytes
from hw_profiles.transfer.features import Floats, transfer_features
from hw_profiles.transfer.fit import TransferModel
from hw_profiles.workload import Workload
from searchspace.arch import Arch
from searchspace.cost import arch_cost
from searchspace.errors import UserError
from searchspace.space import SearchSpace
from searchspace.specs import SubBlockSpec

MIN_SHARE_OF_ENTRY = 0.05
"""A source correction takes no more from an entry than leaves this share of it."""


@dataclass(frozen=True)
class Basis:
    """What a latency table says about one workload of a search space.

    Args:
        specs: every sub-block of the space.
        entries: of each.
        correction: what the source adds to networks that are made of corrected entries.
        model: latencies on the target as a function of what is to be found out.
        workload: what it is about.
    """

    specs: tuple[SubBlockSpec, ...]
    entries: tuple[Entry, ...]
    correction: Correction
    model: TransferModel
    workload: Workload

    @classmethod
    def of(cls, source: LatencyTable, space: SearchSpace, workload: Workload) -> Basis:
        """Read it from a table.

        Raises:
            UserError: when the table lacks the workload or a sub-block.
        """
        if workload not in source.workloads:
            raise UserError(
                f"the table to transfer from holds no workload {workload.name}, only "
                f"{', '.join(item.name for item in source.workloads)}; choose one of these"
            )
        specs = tuple(space.sub_blocks())
        entries = tuple(_source_entry(source, workload, spec.key) for spec in specs)
        fit = source.correction(workload)
        source_us = np.array(
            [
                max(fit.sub_block_us(spec, entry.latency_us), MIN_SHARE_OF_ENTRY * entry.latency_us)
                for spec, entry in zip(specs, entries, strict=True)
            ]
        )
        model = TransferModel(
            np.append(source_us, 1.0), transfer_features(specs, source_us, workload)
        )
        # Spills scale plain entries; here they scale what the correction made of them.
        share = sum(entry.latency_us for entry in entries) / float(source_us.sum())
        spills = tuple(replace(spill, scale=share * spill.scale) for spill in fit.spills)
        once = replace(fit, scale=1.0, per_sub_block_us=0.0, scales={}, spills=spills)
        return cls(specs, entries, once, model, workload)

    def amounts(self, targets: Sequence[Arch | SubBlockSpec]) -> Floats:
        """Return how often each target has every sub-block, and last what it pays once on the
        source in microseconds, shape (N, S).

        What a spill adds to every entry counts as more of each. A sub-block alone is as much of
        itself as its entry is of the corrected one.
        """
        column = {spec.key: index for index, spec in enumerate(self.specs)}
        amounts_NS = np.zeros((len(targets), len(column) + 1))
        for row_S, target in zip(amounts_NS, targets, strict=True):
            if not isinstance(target, Arch):
                here = column[target.key]
                row_S[here] = self.entries[here].latency_us / self.model.source_us[here]
                continue
            for spec in target.sub_blocks():
                row_S[column[spec.key]] += 1
            working_set = arch_cost(target, partial(working_set_bytes, workload=self.workload))
            mib, none = np.array([working_set / MIB]), np.zeros(1)
            row_S[-1] = once_us = float(self.correction.network_us(none, mib)[0])
            row_S[:-1] *= 1.0 + float(self.correction.network_us(none + 1.0, mib)[0]) - once_us
            row_S[-1] += self.correction.traits_us(
                trait for spec in target.sub_blocks() for trait in traits(spec)
            )
        return amounts_NS


def _source_entry(source: LatencyTable, workload: Workload, key: str) -> Entry:
    try:
        return source.entry(workload, key)
    except UserError:
        raise UserError(
            f"the table to transfer from has no entry {key!r} for workload {workload.name}; "
            "complete it with `nas profile` on its own device, or choose a table of the same "
            "search space"
        ) from None
