"""What is run on a device of a cluster, alone there: profiling it, and timing networks.

Only JSON goes in and out, so a device may have other versions of libraries than the head: its
table says which.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hw_profiles.latency_table import LatencyTable
from hw_profiles.process import prepare_process
from hw_profiles.profiler import profile
from hw_profiles.subnets import measure_subnets
from hw_profiles.targets import random_subnets
from hw_profiles.workload import Workload
from searchspace.arch import Arch
from searchspace.space import SearchSpace


class Probe:
    """Times things on the machine that it runs on."""

    def ready(self) -> bool:
        """Return once this runs."""
        return True

    def profile(
        self,
        space: Mapping[str, Any],
        vocab_size: int,
        workloads: Sequence[str],
        table: str,
        options: Mapping[str, Any],
    ) -> str:
        """Measure a latency table, or go on with one; returns its file's content.

        Args:
            space: `SearchSpace.to_dict`.
            vocab_size: of the space.
            workloads: their names.
            table: content of a table of this device to go on with; empty for none.
            options: of `hw_profiles.profiler.profile`.

        Raises:
            UserError: as `profile` does.
        """
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "latency_table.json"
            if table:
                path.write_text(table, encoding="utf-8")
            profile(
                SearchSpace.from_dict(dict(space), vocab_size),
                [Workload.parse(name) for name in workloads],
                path,
                **options,
            )
            return path.read_text(encoding="utf-8")

    def time(
        self, archs: Sequence[Mapping[str, Any]], table: str, num_threads: int | None, seed: int
    ) -> dict[str, dict[str, float]]:
        """Return latencies in ms of networks by arch id and workload, timed interleaved.

        Args:
            archs: in their JSON form; their weights are random, as latencies do not depend on them.
            table: content of this device's table, which says what is timed and how.
            num_threads: threads of one operator.
            seed: of the weights and the timing order.

        Raises:
            UserError: when the table is of another device.
        """
        prepare_process(num_threads)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "latency_table.json"
            path.write_text(table, encoding="utf-8")
            known = LatencyTable.load(path)
        timings = measure_subnets(
            random_subnets([Arch.from_dict(dict(arch)) for arch in archs], seed),
            known.workloads,
            backend=known.device.backend,
            reference_us=known.sentinel_us,
            seed=seed,
        )
        return {
            arch_id: {name: timing.latency_us / 1e3 for name, timing in by_workload.items()}
            for arch_id, by_workload in timings.items()
        }
