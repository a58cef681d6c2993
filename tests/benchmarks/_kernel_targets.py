"""What issue 9 asks of an H200, judged from records: met, not met or not measured.

Nothing here imports torch: the parent process judges while workers run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Record = dict[str, Any]
Roofs = dict[str, float]
OURS = "ours"
MET, NOT_MET, NOT_MEASURED = "met", "not met", "not measured"
NOISE = 1.02
"""No slower allows for what two timings of one kernel differ by."""


@dataclass(frozen=True)
class Verdict:
    """One target.

    Attributes:
        name: what is asked for.
        status: `MET`, `NOT_MET` or `NOT_MEASURED`.
        detail: of how many cases, and the worst.
        short: ids of the cases that were timed and fall short, the worst first.
    """

    name: str
    status: str
    detail: str
    short: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Target:
    """A target: a number for each case, larger is better, and the least that will do."""

    name: str
    label: str
    value: Callable[[Record, Roofs], float | None]
    least: float
    unit: str = "x"


def microseconds(record: Record, name: str) -> float | None:
    """Return the median time of a contender whose results agree with the reference."""
    found = record["contenders"].get(name, {})
    return found.get("us") if found.get("status") == "ok" else None


def fastest(record: Record, prefix: str = "") -> tuple[str, float] | None:
    """Return the fastest other contender of the same function, of those with a prefix."""
    names = [name for name in record["contenders"] if name.startswith(prefix)]
    times = {
        name: us
        for name in names
        if name not in (OURS, "kernel")
        and record["contenders"][name].get("rms") is not None
        and (us := microseconds(record, name)) is not None
    }
    return min(times.items(), key=lambda item: item[1]) if times else None


def share_of_copy(record: Record, roofs: Roofs) -> float | None:
    """Return achieved bytes over the measured copy bandwidth."""
    us = microseconds(record, OURS)
    if us is None or not roofs.get("copy_gb_s"):
        return None
    return record["min_bytes"] / us * 1e-3 / roofs["copy_gb_s"]


def _ratio_to(prefix: str) -> Callable[[Record, Roofs], float | None]:
    def ratio(record: Record, roofs: Roofs) -> float | None:
        ours, other = microseconds(record, OURS), fastest(record, prefix)
        return None if ours is None or other is None else other[1] / ours

    return ratio


TARGETS = (
    Target("memory-bound kernels reach 85% of the copy bandwidth", "memory", share_of_copy, 0.85,
           ""),
    Target("elastic linear within 5% of cuBLAS on the contiguous shape", "elastic",
           _ratio_to("cuBLAS, contiguous"), 1 / 1.05),
    Target("chunked linear, gla, deltanet no slower than fla at 2k-16k tokens", "fla",
           _ratio_to("fla"), 1 / NOISE),
    Target("int4 decode 3x faster than bf16 cuBLAS at batch 1, from 4096x4096 on", "int4",
           _ratio_to("cuBLAS bf16"), 3.0),
    Target("split-KV decode no slower than SDPA (the fastest of its kernels)", "decode",
           _ratio_to("sdpa"), 1 / NOISE),
    Target("split-KV decode 2x faster than SDPA at batch 1, 64k context, MQA", "decode 64k",
           _ratio_to("sdpa"), 2.0),
)  # fmt: skip


def judged(records: list[Record], start: dict[str, Any]) -> list[Verdict]:
    """Return a verdict on every target; a wrong or failed kernel falls short.

    Args:
        records: of cases.
        start: the line with device and roofs. Small shapes, or no GPU, say nothing.
    """
    if start.get("quick") or not start["facts"].get("capability"):
        why = "small shapes" if start.get("quick") else "no GPU"
        return [Verdict(target.name, NOT_MEASURED, why) for target in TARGETS]
    return [_judge(target, records, start["roofs"]) for target in TARGETS]


def _judge(target: Target, records: list[Record], roofs: Roofs) -> Verdict:
    chosen = [record for record in records if target.label in record["targets"]]
    values = {record["id"]: target.value(record, roofs) for record in chosen}
    known = {name: value for name, value in values.items() if value is not None}
    bad = [
        record["id"]
        for record in chosen
        if record["contenders"].get(OURS, {}).get("status") in ("wrong", "failed")
    ]
    short = sorted((n for n, v in known.items() if v < target.least), key=lambda n: known[n])
    if not known and not bad:
        why = "no such case ran" if not chosen else "nothing to compare with"
        return Verdict(target.name, NOT_MEASURED, why)
    status = NOT_MET if short or bad else MET
    met = len(known) - len(short)
    detail = f"{met} of {len(known)} cases measured"
    if len(chosen) > len(known) + len(bad):
        detail += f", {len(chosen) - len(known) - len(bad)} not"
    if bad:
        detail += f"; wrong or failed: {', '.join(bad)}"
    if known:
        worst = min(known, key=lambda name: known[name])
        value = known[worst]
        shown = f"{value:.2f}x" if target.unit else f"{value:.0%}"
        detail += f"; lowest {shown} ({worst})"
    return Verdict(target.name, status, detail, short)
