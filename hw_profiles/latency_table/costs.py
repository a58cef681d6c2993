"""`LatencyCosts`: the latencies of many genotypes at once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from hw_profiles.latency_table.correction import (
    MIB,
    Correction,
    FloatArray,
    traits,
    working_set_bytes,
)
from hw_profiles.workload import Workload
from searchspace.cost import CostTable, Rows, rows_of
from searchspace.space import SearchSpace
from searchspace.specs import SubBlockSpec


class LatencyCosts:
    """Latencies of many genotypes of a space at once.

    Args:
        space: the search space.
        entry_us: entry of a sub-block.
        correction: of the workload.
        workload: what is priced.
    """

    def __init__(
        self,
        space: SearchSpace,
        entry_us: Callable[[SubBlockSpec], float],
        correction: Correction,
        workload: Workload,
    ) -> None:
        def parts(spec: SubBlockSpec) -> tuple[float, float, float]:
            plain_us = entry_us(spec)
            mib = working_set_bytes(spec, workload) / MIB
            return correction.sub_block_us(spec, plain_us), plain_us, mib

        def bits(spec: SubBlockSpec) -> int:
            return sum(1 << self._traits.index(t) for t in traits(spec) if t in self._traits)

        self._correction = correction
        self._traits = list(correction.once_us)
        self._parts = CostTable(space, parts)
        self._present = CostTable(space, bits, combine=np.bitwise_or)

    def of(self, genotypes: NDArray[np.int64]) -> FloatArray:
        """Return the latency in ms of each row of canonical `genotypes` (n, genes), shape (n,)."""
        chunks = [self.total(rows) for rows in rows_of(self._parts.space, genotypes)]
        return np.concatenate([np.empty(0), *chunks])

    def total(self, rows: Rows) -> FloatArray:
        """Return the latency in ms of each row, shape (n,)."""
        parts = self._parts.total(rows)
        latency_us = parts[:, 0] + self._correction.network_us(parts[:, 1], parts[:, 2])
        if self._traits:
            latency_us += self._once_us(self._present.total(rows))
        return np.asarray(latency_us / 1e3)

    def _once_us(self, present: NDArray[np.int64]) -> FloatArray:
        """Return what traits add once, for sets of traits as bits."""
        total = np.zeros(len(present))
        for bit, us in enumerate(self._correction.once_us.values()):
            total += us * (present >> bit & 1)
        return total
