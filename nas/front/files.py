"""The front as files."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from searchspace.arch import Arch
from searchspace.files import write_json, write_text

GROUPS = ("front", "random", "uniform")


def write_front(folder: Path, front: Mapping[str, Any]) -> None:
    """Write `front.json` and `front.csv`; an accuracy that is not measured is an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    workloads = front["workloads"]
    writer.writerow(
        ["arch_id", "group", "name"]
        + ["measured_loss_nats", "measured_accuracy", "search_loss_nats"]
        + [f"measured_{name}_ms" for name in workloads]
        + [f"predicted_{name}_ms" for name in workloads]
        + ["weight_bytes", "params", "peak_mib", "d_model", "depth"]
    )
    for group in GROUPS:
        for r in front["groups"].get(group, []):
            arch = Arch.from_dict(r["arch"])
            writer.writerow(
                [r["arch_id"], group, r["name"] or ""]
                + [r["measured"]["loss"], r["measured"].get("accuracy"), r["search_loss"]]
                + [r["measured"]["latency_ms"][name] for name in workloads]
                + [r["predicted"]["latency_ms"][name] for name in workloads]
                + [r["weight_bytes"], r["params"], r["measured"]["peak_mib"]]
                + [arch.d_model, arch.depth]
            )
    write_text(folder / "front.csv", text.getvalue())
    write_json(folder / "front.json", front)
