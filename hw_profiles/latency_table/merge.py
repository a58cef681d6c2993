"""Merging what two profilers measured for one table."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from hw_profiles.latency_table.entry import MEASURED, Entry
from searchspace.space import SearchSpace

if TYPE_CHECKING:
    from hw_profiles.latency_table import LatencyTable


def merge(mine: LatencyTable, theirs: LatencyTable) -> None:
    """Add to a table what another of the same device holds and it lacks.

    Of two entries of a sub-block the measured one is kept, else the newer one. A correction that is
    not there yet is only taken where both state their latencies for the same speed of the sentinel.
    """
    speed = mine.sentinel_us / theirs.sentinel_us
    for key, entry in theirs.entries.items():
        if key not in mine.entries or _rank(entry) > _rank(mine.entries[key]):
            mine.entries[key] = replace(entry, latency_us=entry.latency_us * speed)
    if speed == 1.0:
        mine.corrections = {**theirs.corrections, **mine.corrections}
    mine.roofline = mine.roofline or theirs.roofline
    mine.workloads = tuple(dict.fromkeys([*mine.workloads, *theirs.workloads]))
    mine.spaces = joined(theirs.spaces, *mine.spaces)


def _rank(entry: Entry) -> tuple[bool, str]:
    return entry.source == MEASURED, entry.measured_at


def joined(spaces: tuple[SearchSpace, ...], *more: SearchSpace) -> tuple[SearchSpace, ...]:
    """Return spaces without repeats; of two with the same name and vocabulary the later."""
    return tuple({(space.name, space.vocab_size): space for space in (*spaces, *more)}.values())
