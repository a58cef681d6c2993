"""How the search, the predictions and the training went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

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
from nas.report.markup import Markup, fixed
from nas.report.networks import Network
from nas.report.run_data import GROUPS, RunData

CURVE_COLOURS = {"largest": "#1d5fbf", "random": "#7b8494", "smallest": "#c2570c"}
OTHER_CURVE_COLOURS = ("#15857c", "#b7791f", "#8b4bb0", "#b03a5b", "#4d6b2f")
CURVE_POINTS = 240


def hypervolume_curve(values: Sequence[float]) -> Markup:
    """Draw the hypervolume of everything evaluated so far against evaluations."""

    def paint(figure: Figure, ax: Axes) -> None:
        ax.step(
            range(1, len(values) + 1), values, where="post", color=COLOURS["front"], linewidth=1.8
        )
        ax.plot([len(values)], [values[-1]], "o", color=COLOURS["front"], markersize=4)
        ax.annotate(
            fixed(values[-1]),
            (len(values), values[-1]),
            xytext=(0, 6),
            ha="right",
            textcoords="offset points",
            fontweight="bold",
            color=COLOURS["front"],
        )
        ax.xaxis.set_major_locator(MaxNLocator(7, integer=True))
        ax.margins(y=0.12)
        ax.set_xlabel("evaluations (complete and feasible)")
        ax.set_ylabel("hypervolume (search values)")

    return draw("hv-curve", "Hypervolume over evaluations", paint, 3.2)


def bars(
    name: str,
    description: str,
    values: Mapping[str, float],
    x_label: str,
    colours: Mapping[str, str],
    lowest: float = 0.0,
) -> Markup:
    """Draw horizontal bars with their values.

    Args:
        name: prefix of ids.
        description: for those who cannot see it.
        values: by label, the first on top.
        x_label: of the value axis.
        colours: by label.
        lowest: left end of the axis at most.
    """

    def paint(figure: Figure, ax: Axes) -> None:
        labels = list(values)
        ax.barh(
            range(len(labels)),
            list(values.values()),
            height=0.6,
            color=[colours.get(label, COLOURS["front"]) for label in labels],
        )
        for row, value in enumerate(values.values()):
            ax.annotate(
                fixed(value),
                (max(value, 0.0), row),
                va="center",
                color=INK,
                fontweight="bold",
                textcoords="offset points",
                xytext=(4, 0),
            )
        ax.set_yticks(range(len(labels)), labels)
        ax.tick_params(axis="y", length=0)
        ax.invert_yaxis()
        ax.grid(axis="y", visible=False)
        ax.axvline(0.0, color=MUTED, linewidth=0.8)
        ends = [lowest, *values.values(), 0.0]
        ax.set_xlim(min(ends) * 1.2, max([*ends, 1e-9]) * 1.2)
        ax.set_xlabel(x_label)

    return draw(name, description, paint, 1.0 + 0.42 * len(values))


def agreement(
    name: str,
    points: Mapping[str, Sequence[tuple[float, float, str]]],
    x_label: str,
    y_label: str,
    band: float,
) -> Markup:
    """Draw one quantity against another that should be equal.

    Args:
        name: prefix of ids.
        points: (x, y, text under the mouse) by group.
        x_label: of the expected value.
        y_label: of the measured value.
        band: relative width of the shaded band around equality.
    """
    values = [value for group in points.values() for x, y, _ in group for value in (x, y)]

    def paint(figure: Figure, ax: Axes) -> dict[str, str]:
        scale_axis(ax.xaxis, values)
        scale_axis(ax.yaxis, values)
        ends = np.linspace(*ax.get_xlim(), 50)
        ax.fill_between(
            ends, ends * (1 - band), ends * (1 + band), color="#dfe8f5", zorder=0, linewidth=0
        )
        ax.plot(ends, ends, color=MUTED, linewidth=1.0, zorder=1)
        tips: dict[str, str] = {}
        for group, rows in points.items():
            for x, y, tip in rows:
                gid = f"{group}{len(tips)}"
                tips[gid] = tip
                ax.scatter(
                    [x],
                    [y],
                    s=26,
                    marker=MARKERS[group],
                    color=COLOURS[group],
                    edgecolors="white",
                    linewidths=0.4,
                    alpha=0.9,
                    gid=gid,
                    zorder=3,
                )
        ax.set_ylim(ax.get_xlim())
        ax.set_xlabel(x_label)
        ax.set_ylabel(y_label)
        legend_above(
            ax,
            [
                Line2D(
                    [],
                    [],
                    linestyle="none",
                    marker=MARKERS[g],
                    color=COLOURS[g],
                    markeredgecolor="white",
                    markersize=6,
                    label=NAMES[g],
                )
                for g in GROUPS
                if points.get(g)
            ],
        )
        return tips

    return draw(name, f"{y_label} against {x_label}", paint, 4.0)


def latency_agreement(data: RunData, workload: str, name: str) -> Markup | None:
    """Draw measured against predicted latency of one workload."""
    points = {
        group: [
            (n.predicted_ms[workload], n.latency_ms[workload], _tip(n))
            for n in data.groups[group]
            if workload in n.predicted_ms and workload in n.latency_ms
        ]
        for group in GROUPS
    }
    if not any(points.values()):
        return None
    return agreement(
        name, points, f"predicted latency, ms ({workload})", "measured latency, ms", band=0.1
    )


def loss_agreement_figure(data: RunData) -> Markup | None:
    """Draw the loss on the test split against the one the search saw."""
    points = {
        group: [
            (n.search_loss, n.loss, _tip(n))
            for n in data.groups[group]
            if n.search_loss is not None and n.loss is not None
        ]
        for group in GROUPS
    }
    if not any(points.values()):
        return None
    unit = f"nats/{data.unit}"
    return agreement(
        "losses",
        points,
        f"search loss, {unit} (measured on the validation split)",
        f"test loss, {unit} (measured)",
        band=0.0,
    )


def _tip(network: Network) -> str:
    return f"{network.label} ({NAMES[network.group]})"


def training_curves(data: RunData) -> Markup | None:
    """Draw the training losses of every role against steps, each point the mean of some steps."""
    curves = {role: _binned(data.training, role) for role in data.roles}
    if not curves:
        return None
    others = iter(OTHER_CURVE_COLOURS * len(curves))

    def paint(figure: Figure, ax: Axes) -> None:
        handles = []
        for role, curve in curves.items():
            (line,) = ax.plot(
                curve[:, 0],
                curve[:, 1],
                color=CURVE_COLOURS.get(role) or next(others),
                linewidth=1.5,
                label=f"{role} {curve[-1, 1]:.2f}",
            )
            handles.append(line)
        if data.first_stage_end is not None:
            ax.axvline(data.first_stage_end, color=MUTED, linewidth=1.0, linestyle=(0, (1, 2)))
        scale_axis(ax.yaxis, [value for curve in curves.values() for value in curve[:, 1]])
        ax.set_xlabel("step")
        ax.set_ylabel(f"training loss, nats/{data.target} (measured)")
        legend_above(ax, handles)

    return draw("training", f"Training loss of these networks: {', '.join(curves)}", paint, 3.4)


def _binned(rows: Sequence[Mapping[str, float]], name: str) -> np.ndarray:
    """Return (step, mean loss) of at most `CURVE_POINTS` groups of steps, shape (points, 2)."""
    values = np.array([(row["step"], row[name]) for row in rows if name in row])
    if len(values) == 0:
        return np.empty((0, 2))
    parts = np.array_split(values, min(CURVE_POINTS, len(values)))
    return np.array([part.mean(axis=0) for part in parts])
