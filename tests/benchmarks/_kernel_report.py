"""The benchmark's results as text: device and roofs, targets, a table for each family."""

from __future__ import annotations

from typing import Any

from tests.benchmarks._kernel_targets import OURS, Record, Roofs, Verdict, fastest, microseconds

Lines = list[dict[str, Any]]
HEADINGS = ["case", "ours", "bytes, FLOPs", "roof", "RMS", "host", "others: their time over ours"]


def split(lines: Lines) -> tuple[dict[str, Any], list[Record], Lines]:
    """Return what the start line says, the records of cases, and the profiles."""
    nothing: dict[str, Any] = {"facts": {}, "roofs": {}}
    start = next((line for line in lines if line["kind"] == "start"), nothing)
    records = [line for line in lines if line["kind"] == "case"]
    return start, records, [line for line in lines if line["kind"] == "profile"]


def report_text(lines: Lines, verdicts: list[Verdict]) -> str:
    """Return everything for a reader."""
    start, records, profiles = split(lines)
    parts = [_device_text(start, lines), _verdicts_text(verdicts)]
    for family in dict.fromkeys(record["family"] for record in records):
        chosen = [record for record in records if record["family"] == family]
        rows = [HEADINGS, *(_row(record, start["roofs"]) for record in chosen)]
        parts.append(f"## {family}\n\n{_table(rows)}")
    parts += [f"## profile of {line['id']}\n\n```\n{line['text']}\n```" for line in profiles]
    return "\n\n".join(parts) + "\n"


def progress_text(record: Record, roofs: Roofs) -> str:
    """Return one line on a case."""
    name, ours, rates, roof, rms, _, others = _row(record, roofs)
    return f"{record['family']}: {name}: {ours} {rates} {roof} rms {rms} | {others}"


def _device_text(start: dict[str, Any], lines: Lines) -> str:
    facts, roofs = start["facts"], start["roofs"]
    names = ("device", "driver", "cuda", "torch", "triton", "python", "date")
    first = ", ".join(f"{name} {facts[name]}" for name in names if facts.get(name))
    measured = ", ".join(f"{name} {value:.1f}" for name, value in roofs.items())
    text = f"# Kernels\n\n{first}\n\nMeasured roofs: {measured}."
    end = next((line for line in lines if line["kind"] == "end"), None)
    if end is not None:
        drift = ", ".join(
            f"{name} {end['roofs'][name] / value - 1:+.1%}"
            for name, value in roofs.items()
            if value and name in end["roofs"]
        )
        text += f" At the end: {drift}."
    clocks = [record["sm_mhz"] for record in lines if record.get("sm_mhz")]
    if clocks:
        text += f" SM clock from {min(clocks)} to {max(clocks)} MHz."
    ran = sum(line["kind"] == "case" for line in lines)
    text += f" {ran} of {start.get('num_cases', '?')} cases ran."
    crashes = [line for line in lines if line["kind"] == "crash"]
    for line in crashes:
        text += f"\n\nA worker ended in {line['id']}, at {line['contender']}: {line['note']}."
    return text + (
        "\n\nTimes are of the GPU's work, with launches queued ahead: medians, and half of the "
        "range from the 10th to the 90th percentile. `host` is what a call keeps Python busy for. "
        "Bytes are the fewest that must move; `roof` is the share of the measured copy bandwidth "
        "or product rate, whichever leaves less time."
    )


def _verdicts_text(verdicts: list[Verdict]) -> str:
    rows = [["target", "", "measured"]]
    rows += [[verdict.name, verdict.status, verdict.detail] for verdict in verdicts]
    return f"## Targets\n\n{_table(rows)}"


def _row(record: Record, roofs: Roofs) -> list[str]:
    ours = record["contenders"].get(OURS, {})
    us = microseconds(record, OURS)
    if us is None:
        status = ours.get("status", "failed").upper()
        note = ours.get("note") or record.get("note", "")
        return [record["name"], f"{status} {note}"[:120], "", "", _rms(ours), "", _others(record)]
    spread = (ours["high_us"] - ours["low_us"]) / 2
    gb_s, tflop_s = record["min_bytes"] / us * 1e-3, record["flops"] / us * 1e-6
    rates = f"{gb_s:.0f} GB/s" + (f", {tflop_s:.1f} TFLOP/s" if record["flops"] else "")
    floor = floor_us(record, roofs)
    roof = f"{floor[0] / us:.0%} of {floor[1]}" if floor else "-"
    return [
        record["name"], f"{us:.1f} ± {spread:.1f} us", rates, roof, _rms(ours),
        f"{ours['host_us']:.0f} us", _others(record),
    ]  # fmt: skip


def floor_us(record: Record, roofs: Roofs) -> tuple[float, str] | None:
    """Return the least time that the measured roofs allow, and which one that is."""
    floors = []
    if roofs.get("copy_gb_s"):
        floors.append((record["min_bytes"] / roofs["copy_gb_s"] * 1e-3, "copy"))
    peak = roofs.get(f"{record['unit']}_tflop_s")
    if peak:
        floors.append((record["flops"] / peak * 1e-6, record["unit"]))
    return max(floors) if floors else None


def _rms(result: dict[str, Any]) -> str:
    rms = result.get("rms")
    if rms is None:
        return "-"
    return rms if isinstance(rms, str) else f"{rms:.1e}"


def _others(record: Record) -> str:
    """Return how long the others take, in our time where there is one; the fastest is starred."""
    us, best = microseconds(record, OURS), fastest(record)
    parts = []
    for name, result in record["contenders"].items():
        if name == OURS:
            continue
        other = microseconds(record, name)
        if other is None:
            note = result.get("note", "")
            what = "WRONG" if result["status"] == "wrong" else result["status"]
            parts.append(f"{name}: {what} ({note[:60]})")
            continue
        star = "*" if best is not None and best[0] == name else ""
        value = f"{other / us:.2f}x" if us else f"{other:.1f} us"
        apart = " (another function)" if result.get("rms") is None else ""
        parts.append(f"{name}{star} {value}{apart}")
    return "; ".join(parts)


def _table(rows: list[list[str]]) -> str:
    rows = [[cell.replace("|", "/") for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]

    def line(row: list[str]) -> str:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        return f"| {' | '.join([*cells, row[-1]])} |"

    rule = ["-" * width for width in widths] + ["-"]
    return "\n".join([line(rows[0]), line(rule), *(line(row) for row in rows[1:])])
