"""What `nas profile` prints for people, line by line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

NO_TABLES = "no latency table is shipped or in ./runs; run `nas profile` to measure this device"
MAX_DISTURBED = 10
HEADER = ("name", "device", "backend", "threads", "space", "entries", "measured")


def list_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a table of tables; what cannot be used is said below it."""
    if not rows:
        return [NO_TABLES]
    usable = [row for row in rows if not row["problem"]]
    cells = [
        (
            row["name"] + (" (shipped)" if row["shipped"] else ""),
            row["device"],
            row["backend"],
            str(row["num_threads"]),
            ", ".join(row["spaces"]) or "-",
            str(row["num_entries"]),
            row["measured_at"][:10] or "-",
        )
        for row in usable
    ]
    problems = [f"unusable: {row['problem']}" for row in rows if row["problem"]]
    return [*(aligned([HEADER, *cells]) if cells else []), *problems]


def show_lines(facts: Mapping[str, Any]) -> list[str]:
    """Return everything about one table; `facts` are those of `describe`."""
    device = facts["device"]
    spaces = [f"{item['name']} (vocabulary {item['vocab_size']})" for item in facts["spaces"]]
    rows = [
        ("table", facts["path"]),
        ("device", f"{facts['device_id']}: {facts['measured_on']}"),
        ("instructions", ", ".join(device["isa"]) or "none known"),
        ("settings", ", ".join(_settings(device))),
        ("spaces", ", ".join(spaces) or "not said"),
        ("measured", f"{facts['first_measured_at']} to {facts['measured_at']}"),
        ("sentinel", f"{facts['sentinel_us']:.1f} us"),
    ]
    lines = aligned(rows)
    for name, workload in facts["workloads"].items():
        lines += ["", *_workload_lines(name, workload)]
    return lines


def _settings(device: Mapping[str, Any]) -> list[str]:
    return [
        f"{device['dtype']} activations",
        f"fp32 products {device['matmul_precision']}",
        f"allocator {'tuned' if device['allocator_tuned'] else 'as it is'}",
        f"denormals {'flushed' if device['flush_denormals'] else 'kept'}",
    ]


def _workload_lines(name: str, facts: Mapping[str, Any]) -> list[str]:
    sources = ", ".join(f"{num} {source}" for source, num in facts["sources"].items())
    lines = [f"{name}: {facts['num_entries']} entries ({sources or 'none'})"]
    fit = facts["correction"]
    if fit is None:
        lines.append("  not corrected: no whole network was timed")
    else:
        error = "unknown" if fit["mape"] is None else f"{fit['mape']:.1f} %"
        lines.append(
            f"  whole networks predicted with an error of {error} ({fit['num_networks']} networks, "
            "each left out once)"
        )
        lines.append(f"  correction: {', '.join(_terms(fit))}")
    lines += [f"  {item['latency_us']:10.1f} us  {item['key']}" for item in facts["largest"]]
    return [*lines, *_disturbed_lines(facts["unreliable"])]


def _terms(fit: Mapping[str, Any]) -> list[str]:
    """Return the terms of a correction that do something."""
    terms = [f"entries x {fit['scale']:.3f}"]
    terms += [f"{trait} {scale:+.3f}" for trait, scale in fit["scales"].items()]
    if fit["per_sub_block_us"]:
        terms.append(f"{fit['per_sub_block_us']:+.1f} us for each sub-block")
    if fit["intercept_us"]:
        terms.append(f"{fit['intercept_us']:+.1f} us for each network")
    terms += [
        f"{spill['us_per_mib']:+.1f} us/MiB of working sets beyond {spill['begin_mib']:g} MiB"
        for spill in fit["spills"]
    ]
    return terms


def _disturbed_lines(items: Sequence[Mapping[str, Any]]) -> list[str]:
    if not items:
        return []
    lines = [
        f"  {item['latency_us']:10.1f} us  {item['key']} ({item['kept_fraction']:.0%} of its "
        "samples ran undisturbed)"
        for item in items[:MAX_DISTURBED]
    ]
    more = len(items) - len(lines)
    return [
        f"  {len(items)} entries were disturbed while being timed, and are less exact:",
        *lines,
        *([f"  and {more} more (--json has all)"] if more else []),
    ]


def diff_lines(facts: Mapping[str, Any]) -> list[str]:
    """Return what differs between two tables; `facts` are those of a `Comparison`."""
    lines = aligned([("first", facts["first"]), ("second", facts["second"])])
    lines += [f"device: {sentence}" for sentence in facts["differences"]]
    if not facts["differences"]:
        lines.append("device: the same")
    lines += [f"{name}: second takes {_ratios(item)}" for name, item in facts["ratios"].items()]
    lines.append(f"only in one: {facts['only_first']} entries first, {facts['only_second']} second")
    lines.append("furthest from the median:")
    rows = [
        (f"  {second / first:.2f}x", f"{first:.1f} us", f"{second:.1f} us", workload, key)
        for workload, key, first, second in facts["furthest"]
    ]
    return [*lines, *aligned(rows)]


def check_lines(facts: Mapping[str, Any]) -> list[str]:
    """Return what timing a table again has shown; `facts` as of `TableCheck.to_dict`."""
    lines = [f"sub-blocks now take {_ratios(facts['entries'])}"]
    if facts["networks"]:
        lines.append(f"whole networks take {_ratios(facts['networks'])} (against predictions)")
    lines.append(f"the clock now runs at {1 / facts['sentinel']:.2f} times the table's speed")
    lines += aligned(
        [(f"  {ratio:.2f}x", workload, key) for workload, key, ratio in facts["worst"]]
    )
    return [*lines, facts["verdict"]]


def _ratios(item: Mapping[str, Any]) -> str:
    return (
        f"{item['median']:.3f} times as long (median of {item['num']}, spread "
        f"{100 * item['spread']:.1f} %, {item['near_pct']:.0f} % within "
        f"{item['tolerance_pct']:.0f} %)"
    )


def aligned(rows: Iterable[Sequence[str]]) -> list[str]:
    """Return rows as lines with their columns below each other."""
    cells = list(rows)
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]
