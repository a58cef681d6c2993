"""What turns the entries of a network's sub-blocks into the network's latency.

A sub-block timed alone, again and again, finds its weights and its code in the caches near the
cores. In a network it follows others: more so the larger the network is, and not to the same
degree for every kind of operator. So the sum of the entries is scaled, by kind where that was worth
it, and a working set that exceeds the near caches has a price.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hw_profiles.workload import Workload
from searchspace.cost import state_bytes, weight_bytes
from searchspace.specs import EndsSpec, FFNSpec, MixerSpec, SubBlockSpec
from searchspace.sub_blocks import build_sub_block

FloatArray = NDArray[np.float64]
MIB = 2**20


@dataclass(frozen=True)
class Spill:
    """The price of a working set beyond a cache.

    It applies in full from `end_mib` on, not at all below `begin_mib`, and in proportion between.

    Args:
        begin_mib: largest working set that still fits.
        end_mib: working set of which nothing is found in the cache any more.
        us_per_mib: added for every MiB of the whole working set.
        scale: added to the factor of every entry.
    """

    begin_mib: float
    end_mib: float
    us_per_mib: float
    scale: float

    def share(self, working_set_mib: FloatArray) -> FloatArray:
        """Return the part of the price that applies, 0 to 1."""
        width_mib = self.end_mib - self.begin_mib
        return np.clip((working_set_mib - self.begin_mib) / width_mib, 0.0, 1.0)


@dataclass(frozen=True)
class Correction:
    """What turns a sum of entries into a network's latency, for one workload.

    Args:
        scale: factor of every entry.
        per_sub_block_us: added for every sub-block, the ends included.
        intercept_us: added once; may be below 0.
        scales: added to `scale` for sub-blocks that have a trait, see `traits`.
        once_us: added once to networks with sub-blocks that have a trait: the first operator of a
            kind finds neither its code nor its tables in the caches.
        spills: prices of large working sets.
        mape: mean absolute error in percent of networks left out of the fit one by one; NaN when
            nothing was fitted.
        error_90: nine in ten networks left out were predicted to within this factor minus 1; NaN
            when nothing was fitted.
        num_networks: whole networks in the fit; 0 means none.
        arch_ids: which they were.
    """

    scale: float = 1.0
    per_sub_block_us: float = 0.0
    intercept_us: float = 0.0
    scales: Mapping[str, float] = field(default_factory=dict)
    once_us: Mapping[str, float] = field(default_factory=dict)
    spills: tuple[Spill, ...] = ()
    mape: float = math.nan
    error_90: float = math.nan
    num_networks: int = 0
    arch_ids: tuple[str, ...] = ()

    def sub_block_us(self, spec: SubBlockSpec, entry_us: float) -> float:
        """Return what a sub-block adds to every network it is in."""
        scale = self.scale + sum(self.scales.get(trait, 0.0) for trait in traits(spec))
        return scale * entry_us + self.per_sub_block_us

    def traits_us(self, present: Iterable[str]) -> float:
        """Return what is added once for the traits that a network's sub-blocks have."""
        return sum(self.once_us.get(trait, 0.0) for trait in set(present))

    def network_us(self, entries_us: FloatArray, working_set_mib: FloatArray) -> FloatArray:
        """Return what else is added once, for sums of entries and working sets."""
        total = np.full_like(entries_us, self.intercept_us)
        for spill in self.spills:
            price = spill.us_per_mib * working_set_mib + spill.scale * entries_us
            total += spill.share(working_set_mib) * price
        return total

    def interval(self, latency_ms: float) -> tuple[float, float]:
        """Return the bounds that nine in ten networks predicted at `latency_ms` are within."""
        return latency_ms / (1.0 + self.error_90), latency_ms * (1.0 + self.error_90)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON-ready form."""
        values = {**asdict(self), "arch_ids": list(self.arch_ids)}
        values |= {"scales": dict(self.scales), "once_us": dict(self.once_us)}
        for name in ("mape", "error_90"):
            values[name] = None if math.isnan(values[name]) else values[name]
        return {**values, "spills": [asdict(spill) for spill in self.spills]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Correction:
        """Build from `to_dict`'s form.

        Raises:
            ValueError: for a field of the wrong type or range.
        """
        floats = ("scale", "per_sub_block_us", "intercept_us")
        numbers = {name: _number(name, values[name]) for name in floats}
        errors = {
            name: math.nan if values[name] is None else _number(name, values[name])
            for name in ("mape", "error_90")
        }
        spills = tuple(
            Spill(**{name: _number(name, item[name]) for name in Spill.__dataclass_fields__})
            for item in values["spills"]
        )
        if any(spill.end_mib <= spill.begin_mib for spill in spills):
            raise ValueError("a spill ends before it begins")
        if numbers["scale"] <= 0:
            raise ValueError(f"scale={numbers['scale']!r}")
        if not isinstance(values["num_networks"], int):
            raise ValueError(f"num_networks={values['num_networks']!r} is no int")
        by_trait = {
            name: {str(trait): _number(trait, value) for trait, value in values[name].items()}
            for name in ("scales", "once_us")
        }
        return cls(
            scale=numbers["scale"],
            per_sub_block_us=numbers["per_sub_block_us"],
            intercept_us=numbers["intercept_us"],
            scales=by_trait["scales"],
            once_us=by_trait["once_us"],
            spills=spills,
            mape=errors["mape"],
            error_90=errors["error_90"],
            num_networks=values["num_networks"],
            arch_ids=tuple(map(str, values["arch_ids"])),
        )


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name}={value!r} is no finite number")
    return float(value)


def traits(spec: SubBlockSpec) -> tuple[str, ...]:
    """Return what sub-blocks may have in common that makes them cost more or less in a network."""
    if isinstance(spec, EndsSpec):
        return ("ends",)
    if isinstance(spec, FFNSpec):
        return (f"ffn {spec.ffn}", spec.precision, spec.norm)
    return (f"mixer {spec.mixer}", spec.precision, spec.norm, spec.position)


@functools.cache
def working_set_bytes(spec: SubBlockSpec, workload: Workload) -> int:
    """Return the bytes of weights and state that one pass of a workload reads.

    Of an embedding only the rows of the tokens count.
    """
    if isinstance(spec, EndsSpec):
        with torch.device("meta"):
            ends = build_sub_block(spec)
        unread = 0
        for name, parameter in ends.named_parameters():
            if name == "embedding":
                rows = min(len(parameter), workload.batch * workload.new_tokens)
                unread = parameter[rows:].numel() * parameter.element_size()
        return weight_bytes(spec) - unread
    total = weight_bytes(spec)
    if workload.phase == "decode" and isinstance(spec, MixerSpec) and not spec.kv_shared:
        total += state_bytes(spec, workload.batch, workload.max_tokens)
    return total
