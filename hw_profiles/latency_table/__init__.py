"""`LatencyTable`: measured sub-block latencies of one device, and what networks made of them cost.

A network's latency is the sum of its sub-blocks' entries with a `Correction`, whose few constants
are fitted on whole networks that are timed together with the table.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from hw_profiles.device import Device
from hw_profiles.latency_table.correction import (
    MIB,
    Correction,
    FloatArray,
    traits,
    working_set_bytes,
)
from hw_profiles.latency_table.costs import LatencyCosts
from hw_profiles.latency_table.entry import (
    INTERPOLATED,
    MEASURED,
    PRIOR,
    TRANSFERRED,
    Entry,
    between,
)
from hw_profiles.latency_table.file import WHAT, file_state, is_intact, read_values, write_values
from hw_profiles.latency_table.locking import file_lock
from hw_profiles.latency_table.merge import merge
from hw_profiles.roofline import Roofline
from hw_profiles.workload import Workload
from searchspace.arch import Arch
from searchspace.errors import UserError
from searchspace.space import SearchSpace

__all__ = [
    "INTERPOLATED",
    "MEASURED",
    "PRIOR",
    "TRANSFERRED",
    "Entry",
    "LatencyCosts",
    "LatencyTable",
]

_FFN_KEY = re.compile(r"(?P<head>ffn/.*/f)(?P<width>\d+)(?P<tail>/.*)")


@dataclass
class LatencyTable:
    """Latencies of sub-blocks on one device.

    Args:
        device: where they were measured.
        workloads: what was timed.
        sentinel_us: what the sentinel takes on the device; latencies are stated for that speed.
        entries: by (workload name, sub-block key).
        corrections: by workload name.
        spaces: search spaces that it was measured for.
        roofline: the device's peak rates.
    """

    device: Device
    workloads: tuple[Workload, ...]
    sentinel_us: float
    entries: dict[tuple[str, str], Entry] = field(default_factory=dict)
    corrections: dict[str, Correction] = field(default_factory=dict)
    spaces: tuple[SearchSpace, ...] = ()
    roofline: Roofline | None = None
    _by_width: dict[tuple[str, str, str], dict[int, Entry]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _indexed: int = field(default=0, init=False, repr=False, compare=False)
    _written: tuple[int, ...] | None = field(default=None, init=False, repr=False, compare=False)

    def entry(self, workload: Workload, key: str) -> Entry:
        """Return a sub-block's entry, interpolated along the FFN width where it must be.

        Raises:
            UserError: naming the key when it was not measured and lies between no two widths that
                were.
        """
        found = self.entries.get((workload.name, key))
        if found is None or found.source == PRIOR:
            found = self._interpolated(workload.name, key) or found
        if found is None:
            raise UserError(
                f"the latency table has no entry {key!r} for workload {workload.name}; run "
                "`nas profile` with the same search space and workloads to add it"
            )
        return found

    def enter(self, workload: Workload, key: str, entry: Entry) -> None:
        """Add an entry, or put it in the place of an older one."""
        self.entries[workload.name, key] = entry
        self._indexed = -1

    def _interpolated(self, workload: str, key: str) -> Entry | None:
        match = _FFN_KEY.fullmatch(key)
        if match is None:
            return None
        width = int(match["width"])
        measured = self._widths().get((workload, match["head"], match["tail"]), {})
        below = max((w for w in measured if w < width), default=None)
        above = min((w for w in measured if w > width), default=None)
        if below is None or above is None:
            return None
        return between(measured[below], measured[above], (width - below) / (above - below))

    def _widths(self) -> dict[tuple[str, str, str], dict[int, Entry]]:
        """Return measured FFN entries by what they have in common, then by width."""
        if self._indexed != len(self.entries):
            self._by_width.clear()
            for (workload, key), entry in self.entries.items():
                if entry.source == MEASURED and (match := _FFN_KEY.fullmatch(key)):
                    family = self._by_width.setdefault((workload, match["head"], match["tail"]), {})
                    family[int(match["width"])] = entry
            self._indexed = len(self.entries)
        return self._by_width

    def correction(self, workload: Workload) -> Correction:
        """Return the correction; the identity where none was fitted."""
        return self.corrections.get(workload.name, Correction())

    def costs_ms(self, space: SearchSpace, workload: Workload) -> LatencyCosts:
        """Return the latency of every choice of a space, to price many genotypes at once.

        Raises:
            UserError: naming a key that was not measured.
        """
        return LatencyCosts(
            space,
            lambda spec: self.entry(workload, spec.key).latency_us,
            self.correction(workload),
            workload,
        )

    def breakdown(self, arch: Arch, workload: Workload) -> list[tuple[str, float]]:
        """Return (key, corrected latency in ms) of every sub-block, and what is added once, last.

        Raises:
            UserError: naming a key that was not measured.
        """
        fit, specs = self.correction(workload), arch.sub_blocks()
        entries_us = [self.entry(workload, spec.key).latency_us for spec in specs]
        parts = [
            (spec.key, fit.sub_block_us(spec, entry_us) / 1e3)
            for spec, entry_us in zip(specs, entries_us, strict=True)
        ]
        mib = sum(working_set_bytes(spec, workload) for spec in specs) / MIB
        once_us = fit.network_us(np.array([math.fsum(entries_us)]), np.array([mib]))
        once_us += fit.traits_us(trait for spec in specs for trait in traits(spec))
        return [*parts, ("whole network", float(once_us[0]) / 1e3)]

    @overload
    def latency_ms(self, network: Arch, workload: Workload) -> float: ...

    @overload
    def latency_ms(
        self, network: NDArray[np.int64], workload: Workload, space: SearchSpace | None = None
    ) -> FloatArray: ...

    def latency_ms(
        self,
        network: Arch | NDArray[np.int64],
        workload: Workload,
        space: SearchSpace | None = None,
    ) -> float | FloatArray:
        """Return the predicted latency of a whole network, or of many.

        Args:
            network: an arch, or canonical genotypes (n, genes).
            workload: what is run.
            space: of the genotypes; None is the only space the table was measured for. Who asks
                more than once keeps `costs_ms`.

        Returns:
            Milliseconds; of genotypes shape (n,).

        Raises:
            UserError: naming a key that was not measured, or when the space is not clear.
        """
        if isinstance(network, Arch):
            return math.fsum(part_ms for _, part_ms in self.breakdown(network, workload))
        if space is None and len(self.spaces) != 1:
            raise UserError(
                f"the latency table was measured for {len(self.spaces)} search spaces; give the "
                "space of the genotypes"
            )
        return self.costs_ms(space or self.spaces[0], workload).of(network)

    def interval_ms(self, arch: Arch, workload: Workload) -> tuple[float, float]:
        """Return bounds of a network's latency that hold for nine networks in ten.

        Raises:
            UserError: naming a key that was not measured, or when nothing was fitted.
        """
        fit = self.correction(workload)
        if math.isnan(fit.error_90):
            raise UserError(
                f"the latency table has no correction for workload {workload.name}, so nothing is "
                "known about its error; run `nas profile` to measure whole networks"
            )
        return fit.interval(self.latency_ms(arch, workload))

    @property
    def measured_on(self) -> str:
        """What it was measured on, in words."""
        device = self.device
        hardware = device.accelerator or device.cpu
        threads = f"{device.num_threads} thread{'s' if device.num_threads > 1 else ''}"
        return f"{hardware}, {threads}, {device.backend}, torch {device.torch}"

    @property
    def measured_at(self) -> str:
        """When its newest entry was measured, ISO 8601 in UTC; empty when there is none."""
        return max((entry.measured_at for entry in self.entries.values()), default="")

    def save(self, path: Path, *, keep_others: bool = True) -> None:
        """Write the table; whoever reads meanwhile sees the old one or the new one.

        Args:
            path: the file; gzipped when its name ends in ``.gz``.
            keep_others: add what another process has meanwhile measured on this device and written
                there, to the file and to this table: of two entries of a sub-block the newer is
                kept, and this table's corrections.

        Raises:
            UserError: when the folder cannot be written to.
        """
        with file_lock(path):
            # What we wrote ourselves need not be read again.
            if keep_others and file_state(path) not in (None, self._written):
                self._take_over(path)
            write_values(path, self.to_dict())
            self._written = file_state(path)

    def _take_over(self, path: Path) -> None:
        try:
            others = LatencyTable.load(path)
        except UserError:
            return
        if not others.device.difference(self.device):
            merge(self, others)
            self._indexed = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON-ready form that `save` writes."""
        by_workload: dict[str, dict[str, Any]] = {item.name: {} for item in self.workloads}
        for (workload, key), entry in self.entries.items():
            by_workload.setdefault(workload, {})[key] = asdict(entry)
        return {
            "measured_on": self.measured_on,
            "measured_at": self.measured_at,
            "device": self.device.to_dict(),
            "device_id": self.device.id,
            "spaces": [
                {"vocab_size": space.vocab_size, **space.to_dict()} for space in self.spaces
            ],
            "sentinel_us": self.sentinel_us,
            "roofline": None if self.roofline is None else self.roofline.to_dict(),
            "workloads": [item.name for item in self.workloads],
            "corrections": {name: fit.to_dict() for name, fit in self.corrections.items()},
            "entries": by_workload,
        }

    @classmethod
    def load(cls, path: Path) -> LatencyTable:
        """Read a table.

        Raises:
            UserError: when the file is absent, truncated, damaged, foreign, or of another version.
        """
        values = read_values(path)
        intact = is_intact(values)
        try:
            table = cls._from_dict(values)
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            state = "that this version cannot use" if intact else "that is damaged"
            reason = str(error) if isinstance(error, UserError) else repr(error)
            raise UserError(
                f"{path} is a {WHAT} {state} ({reason}); delete it and run `nas profile`"
            ) from None
        if not intact:
            raise UserError(
                f"{path} is a {WHAT} that is damaged (its checksum differs); delete it and run "
                "`nas profile`"
            )
        return table

    @classmethod
    def _from_dict(cls, values: Mapping[str, Any]) -> LatencyTable:
        entries = {
            (workload, key): Entry.from_dict(entry)
            for workload, by_key in values["entries"].items()
            for key, entry in by_key.items()
        }
        corrections = {
            name: Correction.from_dict(fit) for name, fit in values["corrections"].items()
        }
        sentinel_us = values["sentinel_us"]
        if not isinstance(sentinel_us, float) or not 0 < sentinel_us < math.inf:
            raise ValueError(f"sentinel_us={sentinel_us!r}")
        roofline = values["roofline"]
        return cls(
            device=Device.from_dict(values["device"]),
            workloads=tuple(Workload.parse(name) for name in values["workloads"]),
            sentinel_us=sentinel_us,
            entries=entries,
            corrections=corrections,
            spaces=tuple(
                SearchSpace.from_dict(
                    {k: v for k, v in item.items() if k != "vocab_size"}, item["vocab_size"]
                )
                for item in values["spaces"]
            ),
            roofline=None if roofline is None else Roofline.from_dict(roofline),
        )
