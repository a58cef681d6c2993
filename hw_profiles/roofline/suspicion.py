"""Entries of a latency table that the hardware does not explain."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import numpy as np

from hw_profiles.roofline.calibrated_prior import CalibratedPrior, Entries, kind_of, precision_of
from hw_profiles.roofline.operator_work import work
from hw_profiles.roofline.peaks import FP32
from hw_profiles.roofline.prior import Roofline
from hw_profiles.workload import Workload
from searchspace.specs import SubBlockSpec

SUSPICIOUS_FACTOR = 5.0
SLOWEST_KERNEL = 3.0
"""How many times as slow as fp32 products a low-bit kernel that is no reference may be."""
PSEUDO_ENTRIES = 3
"""The level of a workload is the median with so many entries exactly at the roofline: a few
entries alone cannot call themselves normal."""

Name = tuple[str, str]


def suspicious(entries: Entries, prior: CalibratedPrior) -> list[str]:
    """Return a sentence for each entry that is far from what the hardware and its workload explain.

    Kernels exist that are correct and a thousand times too slow; nothing but the time shows them.
    Expected is the roofline times the median deviation of the entries of the same workload. What
    `prior` has learnt about single kinds and precisions is not used: it was learnt from the very
    entries that are judged. For the same reason a low-bit kernel is expected to be no slower than
    `SLOWEST_KERNEL` times fp32, whatever was measured.

    Args:
        entries: what was measured; entries of sub-blocks that `prior` does not know are left out.
        prior: fitted on the search space's sub-blocks.

    Source: Williams et al. 2009, "Roofline", section 3.
    """
    deviations = _deviations(entries, prior)
    limit = math.log(SUSPICIOUS_FACTOR)
    off = {name: change for name, change in deviations.items() if abs(change) > limit}
    return [
        f"{key} in {workload} took {_amount(change)} its arithmetic and memory traffic explain: "
        + _cause((workload, key), off, deviations, prior.specs)
        for (workload, key), change in off.items()
    ]


def _amount(change: float) -> str:
    factor = math.exp(abs(change))
    return f"{factor:.0f} times the time that" if change > 0 else f"1/{factor:.0f} of the time that"


def _deviations(entries: Entries, prior: CalibratedPrior) -> dict[Name, float]:
    """Return the logarithm of measured / expected of every entry."""
    peaks = prior.roofline.peaks
    slowest = peaks.gflops[FP32] / SLOWEST_KERNEL
    gflops = {name: max(rate, slowest) for name, rate in peaks.gflops.items()}
    roofline = Roofline(replace(peaks, gflops=gflops))
    changes: dict[Name, float] = {}
    for (name, key), measured_us in entries.items():
        if key in prior.specs:
            expected_us = roofline.prior_us(work(prior.specs[key], Workload.parse(name)))
            changes[name, key] = math.log(measured_us / expected_us)
    level = {name: _level(v for (n, _), v in changes.items() if n == name) for name, _ in changes}
    return {(name, key): change - level[name] for (name, key), change in changes.items()}


def _level(changes: Iterable[float]) -> float:
    return float(np.median([*changes, *[0.0] * PSEUDO_ENTRIES]))


def _cause(
    name: Name,
    off: Mapping[Name, float],
    deviations: Mapping[Name, float],
    specs: Mapping[str, SubBlockSpec],
) -> str:
    """Say what the entry has in common with others that are off in the same direction."""
    if off[name] < 0:
        return "it is of another device, or was not run whole; delete it and profile again"
    spec = specs[name[1]]

    def shared(trait: Callable[[SubBlockSpec], str]) -> bool:
        alike = [n for n in deviations if n[0] == name[0] and trait(specs[n[1]]) == trait(spec)]
        return len(alike) > 1 and all(off.get(n, 0.0) > 0 for n in alike)

    if precision_of(spec) != FP32 and shared(precision_of):
        return (
            f"so did all {precision_of(spec)} entries, so a reference kernel seems to stand in for "
            "the fast one on this device"
        )
    if shared(kind_of):
        return f"so did all {kind_of(spec)} entries, so one of its operators lacks a fast kernel"
    return (
        "others like it did not, so the machine was busy or this shape has no fast kernel; delete "
        "it and profile again to see which"
    )
