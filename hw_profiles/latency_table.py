"""`LatencyTable`: measured sub-block latencies of one device, and what networks made of them cost.

A network's latency is the scaled sum of its sub-blocks' entries, plus a constant for each, plus an
intercept, plus a price for the weights that exceed the caches near the cores: a sub-block timed
alone keeps its weights there, a large network cannot. The few constants are fitted on whole
networks that are timed together with the table.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from hw_profiles.device import Device
from hw_profiles.workload import Workload
from searchspace.arch import Arch
from searchspace.cost import CostTable, arch_cost, weight_bytes
from searchspace.errors import UserError
from searchspace.files import read_json, write_json
from searchspace.space import SearchSpace
from searchspace.specs import SubBlockSpec

FloatArray = NDArray[np.float64]

FORMAT = "hwnas-latency-table"
VERSION = 2
WHAT = "latency table"
MIB = 2**20
MEASURED, INTERPOLATED = "measured", "interpolated"
_FFN_KEY = re.compile(r"(?P<head>ffn/.*/f)(?P<width>\d+)(?P<tail>/.*)")


@dataclass(frozen=True)
class Entry:
    """The latency of one sub-block under one workload.

    Args:
        ratio: to the sentinel, median over rounds.
        latency_us: `ratio` times the table's sentinel time.
        spread: median absolute deviation / median.
        num_samples: rounds that count.
        kept_fraction: share of samples that ran undisturbed.
        reliable: False when too few did.
        implementation: the class that was timed.
        measured_at: ISO 8601 time, UTC.
        source: ``"measured"`` or ``"interpolated"``.
    """

    ratio: float
    latency_us: float
    spread: float
    num_samples: int
    kept_fraction: float
    reliable: bool
    implementation: str
    measured_at: str
    source: str = MEASURED


@dataclass(frozen=True)
class Correction:
    """What turns a sum of entries into a network's latency, for one workload.

    Args:
        scale: factor of every entry.
        per_sub_block_us: added for every sub-block, the ends included.
        us_per_spilled_mib: added for every MiB of weights beyond `cache_mib`.
        cache_mib: weights that stay near the cores from one pass to the next.
        intercept_us: added once; may be below 0.
        mape: mean absolute error in percent of networks left out of the fit one by one; NaN when
            nothing was fitted.
        num_networks: whole networks in the fit; 0 means none.
    """

    scale: float = 1.0
    per_sub_block_us: float = 0.0
    us_per_spilled_mib: float = 0.0
    cache_mib: float = 0.0
    intercept_us: float = 0.0
    mape: float = math.nan
    num_networks: int = 0

    def network_us(self, weight_bytes: FloatArray) -> FloatArray:
        """Return what is added once for a network of this many bytes of weights."""
        spilled_mib = np.maximum(weight_bytes / MIB - self.cache_mib, 0.0)
        return self.intercept_us + self.us_per_spilled_mib * spilled_mib


class LatencyCosts(CostTable):
    """Latencies of many genotypes of a space at once.

    Args:
        space: the search space.
        sub_block_us: corrected latency of a sub-block.
        correction: of the workload.
    """

    def __init__(
        self,
        space: SearchSpace,
        sub_block_us: Callable[[SubBlockSpec], float],
        correction: Correction,
    ) -> None:
        super().__init__(space, sub_block_us)
        self._weights = CostTable(space, weight_bytes)
        self._correction = correction

    def of(self, genotypes: NDArray[np.int64]) -> FloatArray:
        """Return the latency in ms of each row of canonical `genotypes` (n, genes), shape (n,)."""
        network_us = self._correction.network_us(self._weights.of(genotypes))
        return np.asarray((super().of(genotypes) + network_us) / 1e3)


@dataclass
class LatencyTable:
    """Latencies of sub-blocks on one device.

    Args:
        device: where they were measured.
        workloads: what was timed.
        sentinel_us: what the sentinel takes on the device; latencies are stated for that speed.
        entries: by (workload name, sub-block key).
        corrections: by workload name.
    """

    device: Device
    workloads: tuple[Workload, ...]
    sentinel_us: float
    entries: dict[tuple[str, str], Entry] = field(default_factory=dict)
    corrections: dict[str, Correction] = field(default_factory=dict)
    _by_width: dict[tuple[str, str, str], dict[int, Entry]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _indexed: int = field(default=0, init=False, repr=False, compare=False)

    def entry(self, workload: Workload, key: str) -> Entry:
        """Return a sub-block's entry, interpolated along the FFN width where it must be.

        Raises:
            UserError: naming the key when it was not measured and lies between no two widths that
                were.
        """
        found = self.entries.get((workload.name, key))
        found = found or self._interpolated(workload.name, key)
        if found is None:
            raise UserError(
                f"the latency table has no entry {key!r} for workload {workload.name}; run "
                "`nas profile` with the same search space and workloads to add it"
            )
        return found

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
        return _between(measured[below], measured[above], (width - below) / (above - below))

    def _widths(self) -> dict[tuple[str, str, str], dict[int, Entry]]:
        """Return FFN entries by what they have in common, then by width."""
        if self._indexed != len(self.entries):
            self._by_width.clear()
            for (workload, key), entry in self.entries.items():
                if match := _FFN_KEY.fullmatch(key):
                    family = self._by_width.setdefault((workload, match["head"], match["tail"]), {})
                    family[int(match["width"])] = entry
            self._indexed = len(self.entries)
        return self._by_width

    def correction(self, workload: Workload) -> Correction:
        """Return the affine correction; the identity where none was fitted."""
        return self.corrections.get(workload.name, Correction())

    def sub_block_us(self, workload: Workload, keys: Iterable[str]) -> FloatArray:
        """Return the corrected latency of each key.

        A network's latency is their sum and `Correction.network_us`.

        Raises:
            UserError: naming a key that was not measured.
        """
        fit = self.correction(workload)
        measured_us = [self.entry(workload, key).latency_us for key in keys]
        return fit.scale * np.array(measured_us, dtype=np.float64) + fit.per_sub_block_us

    def costs_ms(self, space: SearchSpace, workload: Workload) -> LatencyCosts:
        """Return the latency of every choice of a space, to price many genotypes at once.

        Raises:
            UserError: naming a key that was not measured.
        """
        return LatencyCosts(
            space,
            lambda spec: float(self.sub_block_us(workload, [spec.key])[0]),
            self.correction(workload),
        )

    def breakdown(self, arch: Arch, workload: Workload) -> list[tuple[str, float]]:
        """Return (key, corrected latency in ms) of every sub-block, and what is added once, last.

        Raises:
            UserError: naming a key that was not measured.
        """
        keys = [spec.key for spec in arch.sub_blocks()]
        parts_ms = self.sub_block_us(workload, keys) / 1e3
        weights = np.array(arch_cost(arch, weight_bytes))
        once_ms = float(self.correction(workload).network_us(weights)) / 1e3
        return [*zip(keys, parts_ms.tolist(), strict=True), ("whole network", once_ms)]

    def latency_ms(self, arch: Arch, workload: Workload) -> float:
        """Return the predicted latency of a whole network.

        Raises:
            UserError: naming a key that was not measured.
        """
        return math.fsum(part_ms for _, part_ms in self.breakdown(arch, workload))

    def save(self, path: Path) -> None:
        """Write the table; whoever reads meanwhile sees the old one or the new one.

        Raises:
            UserError: when the folder cannot be written to.
        """
        by_workload: dict[str, dict[str, Any]] = {item.name: {} for item in self.workloads}
        for (workload, key), entry in self.entries.items():
            by_workload.setdefault(workload, {})[key] = asdict(entry)
        corrections = {name: asdict(fit) for name, fit in self.corrections.items()}
        for values in corrections.values():
            values["mape"] = None if math.isnan(values["mape"]) else values["mape"]
        write_json(
            path,
            {
                "format": FORMAT,
                "version": VERSION,
                "device": self.device.to_dict(),
                "device_id": self.device.id,
                "sentinel_us": self.sentinel_us,
                "workloads": [item.name for item in self.workloads],
                "corrections": corrections,
                "entries": by_workload,
            },
        )

    @classmethod
    def load(cls, path: Path) -> LatencyTable:
        """Read a table.

        Raises:
            UserError: when the file is absent, truncated, foreign, or of another version.
        """
        values = read_json(path, WHAT)
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise UserError(f"{path} is no {WHAT}: it is of another kind; run `nas profile`")
        if values.get("version") != VERSION:
            raise UserError(
                f"{path} is a {WHAT} of version {values.get('version')}, this program reads "
                f"version {VERSION}; delete it and run `nas profile`"
            )
        try:
            return cls._from_dict(values)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{path} is a damaged {WHAT} ({type(error).__name__}: {error}); delete it and run "
                "`nas profile`"
            ) from None

    @classmethod
    def _from_dict(cls, values: Mapping[str, Any]) -> LatencyTable:
        entries = {
            (workload, key): _positive(_build(Entry, entry), "latency_us", "ratio")
            for workload, by_key in values["entries"].items()
            for key, entry in by_key.items()
        }
        corrections = {}
        for name, fit in values["corrections"].items():
            given = {**fit, "mape": math.nan if fit["mape"] is None else fit["mape"]}
            corrections[name] = _positive(_build(Correction, given), "scale")
        sentinel_us = values["sentinel_us"]
        if not isinstance(sentinel_us, float) or not 0 < sentinel_us < math.inf:
            raise ValueError(f"sentinel_us={sentinel_us!r}")
        return cls(
            device=Device.from_dict(values["device"]),
            workloads=tuple(Workload.parse(name) for name in values["workloads"]),
            sentinel_us=sentinel_us,
            entries=entries,
            corrections=corrections,
        )


_Record = TypeVar("_Record", Entry, Correction)
_KINDS: dict[str, tuple[type, ...]] = {
    "float": (int, float),
    "int": (int,),
    "bool": (bool,),
    "str": (str,),
}


def _build(kind: type[_Record], values: Mapping[str, Any]) -> _Record:
    """Build a record whose fields all have their types."""
    for item in fields(kind):
        value = values[item.name]
        if not isinstance(value, _KINDS[str(item.type)]):
            raise ValueError(f"{item.name}={value!r} is no {item.type}")
    return kind(**values)


def _positive(record: _Record, *names: str) -> _Record:
    for name in names:
        value = getattr(record, name)
        if not 0 < value < math.inf:
            raise ValueError(f"{name}={value!r}")
    return record


def _between(low: Entry, high: Entry, share: float) -> Entry:
    def mix(name: str) -> float:
        return float((1 - share) * getattr(low, name) + share * getattr(high, name))

    return Entry(
        ratio=mix("ratio"),
        latency_us=mix("latency_us"),
        spread=max(low.spread, high.spread),
        num_samples=min(low.num_samples, high.num_samples),
        kept_fraction=min(low.kept_fraction, high.kept_fraction),
        reliable=low.reliable and high.reliable,
        implementation=low.implementation,
        measured_at=min(low.measured_at, high.measured_at),
        source=INTERPOLATED,
    )
