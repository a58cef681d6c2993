"""The measured front: loss against latency and size, accuracy against latency."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from nas.pareto import non_dominated
from nas.report.figures import (
    COLOURS,
    INK,
    MARKERS,
    MUTED,
    NAMES,
    draw,
    legend_above,
    scale_axis,
)
from nas.report.labels import place_labels
from nas.report.markup import Markup, megabytes, number
from nas.report.networks import Network, numbers
from nas.report.run_data import GROUPS, RunData
from nas.report.summary import loss_text

LARGEST_AREA_PT2, SMALLEST_AREA_PT2 = 110.0, 9.0
# A baseline further above the networks than this share of their range is named, not drawn.
BASELINE_ROOM = 0.2
BASELINE_GAP = 0.085
BASELINE_LETTERS = 16
# Room at the ends of the axes for labels.
MARGIN = 0.1


@dataclass(frozen=True)
class _Quality:
    """What is drawn upwards.

    Args:
        of: reads it from a network; None where it was not measured.
        name: in words.
        label: of the axis.
        baselines: what is reached without a network, by name.
        rises: whether more is better.
    """

    of: Callable[[Network], float | None]
    name: str
    label: str
    baselines: Mapping[str, float]
    rises: bool = False


def loss_against_latency(data: RunData, workload: str, name: str) -> Markup | None:
    """Draw loss against measured latency; the area of a point is its weight bytes."""
    return _latency_figure(data, workload, name, _loss(data))


def accuracy_against_latency(data: RunData, workload: str, name: str) -> Markup | None:
    """Draw accuracy against measured latency; None where it was not measured."""
    baselines = numbers(data.front.get("accuracy_baselines"))
    quality = _Quality(
        lambda network: None if network.accuracy is None else 100.0 * network.accuracy,
        "accuracy",
        "measured test accuracy, %",
        {key: 100.0 * value for key, value in baselines.items()},
        rises=True,
    )
    return _latency_figure(data, workload, name, quality)


def loss_against_bytes(data: RunData, name: str) -> Markup | None:
    """Draw loss against weight bytes."""
    return _front_figure(
        data,
        name,
        lambda n: None if n.weight_bytes is None else n.weight_bytes / 1e6,
        "weight bytes, MB (counted)",
        _loss(data),
        sized=False,
    )


def _loss(data: RunData) -> _Quality:
    label = f"measured test loss, nats/{data.unit}"
    baselines = numbers(data.front.get("baselines"))
    return _Quality(lambda network: network.loss, "loss", label, baselines)


def _latency_figure(data: RunData, workload: str, name: str, quality: _Quality) -> Markup | None:
    label = f"measured latency, ms ({workload})"
    return _front_figure(
        data, name, lambda network: network.latency_ms.get(workload), label, quality, sized=True
    )


Drawn = list[tuple[Network, float, float]]


def _front_figure(
    data: RunData,
    name: str,
    x_of: Callable[[Network], float | None],
    x_label: str,
    quality: _Quality,
    sized: bool,
) -> Markup | None:
    drawn: Drawn = [
        (network, x, y)
        for network in data.networks
        if (x := x_of(network)) is not None and (y := quality.of(network)) is not None
    ]
    if not drawn:
        return None

    def paint(figure: Figure, ax: Axes) -> dict[str, str]:
        lines_y = _set_axes(ax, quality, drawn, x_label)
        of_front = [(x, y) for network, x, y in drawn if network.group == "front"]
        _draw_staircase(ax, of_front, quality.rises)
        tips = _draw_points(ax, data, drawn, sized)
        legend_above(ax, _legend(drawn), columns=3)
        labels: dict[tuple[float, float], list[str]] = {}
        for network, x, y in drawn:
            if network.group == "front":
                labels.setdefault((x, y), []).extend(data.tags.get(network.arch_id, []))
        texts = {at: ", ".join(tags) for at, tags in labels.items() if tags}
        place_labels(ax, texts, [(x, y) for _, x, y in drawn], lines_y, INK)
        return tips

    description = f"Measured {quality.name} against {x_label} of all measured networks"
    return draw(name, description, paint, 4.0)


def _set_axes(ax: Axes, quality: _Quality, drawn: Drawn, x_label: str) -> list[float]:
    """Scale and name the axes, draw the baselines; return the heights of their lines."""
    heights = [y for *_, y in drawn]
    room = BASELINE_ROOM * (max(heights) - min(heights))
    low, high = min(heights) - room, max(heights) + room
    shown = {
        name: value
        for name, value in quality.baselines.items()
        if (value >= low if quality.rises else value <= high)
    }
    scale_axis(ax.xaxis, [x for _, x, _ in drawn], MARGIN)
    scale_axis(ax.yaxis, [*heights, *shown.values()], MARGIN, linear=quality.rises)
    to_axes = ax.transData + ax.transAxes.inverted()
    left = ax.get_xlim()[0]
    height_of_last = -np.inf
    for name, value in sorted(shown.items(), key=lambda item: item[1]):
        ax.axhline(value, color=MUTED, linewidth=1.0, linestyle=(0, (4, 3)), zorder=1)
        height = to_axes.transform((left, value))[1]
        height_of_last = max(height, height_of_last + BASELINE_GAP)
        ax.text(
            *(1.012, height_of_last, f"{name[:BASELINE_LETTERS]}\n{number(value)}"),
            transform=ax.transAxes,
            color=MUTED,
            va="center",
            fontsize=7.5,
        )
    ax.set_xlabel(x_label)
    ax.set_ylabel(quality.label)
    return list(shown.values())


def _draw_staircase(ax: Axes, points: Sequence[tuple[float, float]], rises: bool) -> None:
    """Join those front members that are also best in this pair of objectives."""
    if len(points) < 2:
        return
    values = np.array(points)
    steps = values[non_dominated(values * (1.0, -1.0 if rises else 1.0))]
    steps = steps[np.argsort(steps[:, 0])]
    ax.step(
        steps[:, 0],
        steps[:, 1],
        where="post",
        color=COLOURS["front"],
        alpha=0.45,
        linewidth=1.4,
        zorder=2,
    )


def _draw_points(ax: Axes, data: RunData, drawn: Drawn, sized: bool) -> dict[str, str]:
    most = max((network.weight_bytes or 0.0 for network, *_ in drawn), default=0.0) or 1.0
    tips: dict[str, str] = {}
    for index, (network, x, y) in enumerate(drawn):
        share = (network.weight_bytes or 0.0) / most
        area = max(SMALLEST_AREA_PT2, LARGEST_AREA_PT2 * share) if sized else 30.0
        chosen = network.group == "front" and network.arch_id in data.tags
        gid = f"network{index}"
        ax.scatter(
            *([x], [y]),
            s=area,
            marker=MARKERS[network.group],
            color=COLOURS[network.group],
            alpha=0.85,
            edgecolors=INK if chosen else "white",
            gid=gid,
            clip_on=False,
            linewidths=1.3 if chosen else 0.5,
            zorder=4 + (network.group == "front"),
        )
        tips[gid] = _tip(network, data)
    return tips


def _tip(network: Network, data: RunData) -> str:
    """Return what is shown when the mouse is over a point."""
    latencies = [f"{number(ms)} ms {name}" for name, ms in network.latency_ms.items()]
    title = " ".join([*data.tags.get(network.arch_id, []), network.label])
    return "\n".join(
        [
            f"{title} ({NAMES[network.group]})",
            f"measured: {loss_text(network, data.unit)}, {', '.join(latencies)}",
            f"counted: {megabytes(network.weight_bytes)} MB, {network.depth} layers",
        ]
    )


def _legend(drawn: Drawn) -> list[Line2D]:
    counts = {group: sum(n.group == group for n, *_ in drawn) for group in GROUPS}
    return [
        Line2D(
            [],
            [],
            linestyle="none",
            marker=MARKERS[group],
            color=COLOURS[group],
            markeredgecolor="white",
            markersize=7,
            label=f"{NAMES[group]} ({count})",
        )
        for group, count in counts.items()
        if count
    ]
