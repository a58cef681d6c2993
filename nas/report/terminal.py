"""The front as a table for the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nas.report.markup import fixed, megabytes, number, percent
from nas.report.networks import Network
from nas.report.run_data import RunData, from_parts
from nas.report.statistics import bits
from nas.report.summary import verdict

if TYPE_CHECKING:
    from rich.table import Table


def front_table(front: Mapping[str, Any]) -> Table:
    """Return the front and the uniform networks it competes with, each fastest first.

    Args:
        front: the content of `front.json`.
    """
    from rich import box
    from rich.table import Table

    data = from_parts(front)
    columns = ["network", f"nats\n/{data.unit}"]
    columns.append("accu-\nracy %" if data.has_accuracy else f"bits\n/{data.unit}")
    columns += [f"{workload.partition('_')[0]}\nms" for workload in data.workloads]
    # Compact, and only names may wrap, so that a terminal of 80 columns holds every number.
    table = Table(
        title="Measured Pareto front",
        caption=_caption(data),
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for index, column in enumerate([*columns, "MB", "MiB", "lay-\ners", "d_\nmodel"]):
        table.add_column(column, justify="right" if index else "left", no_wrap=index > 0)
    main = data.workloads[0] if data.workloads else ""
    for group in ("front", "uniform"):
        members = sorted(data.groups[group], key=lambda n: n.latency_ms.get(main, math.inf))
        for network in members:
            table.add_row(*_cells(network, data), style="dim" if group == "uniform" else None)
        table.add_section()
    return table


def _cells(network: Network, data: RunData) -> list[Any]:
    from rich.text import Text

    tags = data.tags.get(network.arch_id, []) if network.group == "front" else []
    return [
        Text(" ".join([network.label, *tags])),
        fixed(network.loss),
        percent(network.accuracy) if data.has_accuracy else fixed(bits(network.loss)),
        *(number(network.latency_ms.get(workload)) for workload in data.workloads),
        megabytes(network.weight_bytes),
        number(network.peak_mib),
        str(network.depth),
        str(network.arch.get("d_model", "")),
    ]


def _caption(data: RunData) -> Any:
    from rich.text import Text

    quality = "losses, accuracies" if data.has_accuracy else "losses"
    counted = f"{quality}, latencies and MiB (peak memory) measured; MB (weights) counted"
    sentence = verdict(data)
    return Text(
        f"{counted}; {sentence}" + ("; dim: uniform networks" if data.groups["uniform"] else "")
    )
