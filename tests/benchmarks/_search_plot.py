"""Share of the best-known hypervolume against evaluations, drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from nas.report.figures import COLOURS, STYLE
from tests.benchmarks._search_problems import FloatArray

Curves = Mapping[str, Sequence[FloatArray]]
_OURS = "predictor"


def draw_curves(path: Path, problems: Mapping[str, Curves]) -> None:
    """Write one panel per problem: median over seeds as a line, range shaded for ours.

    Args:
        path: a PNG file.
        problems: name -> method -> curves of its seeds, each of shape (E,).
    """
    with mpl.rc_context({**STYLE, "figure.facecolor": "white"}):
        columns = min(2, len(problems))
        rows = -(-len(problems) // columns)
        figure = Figure(figsize=(5.2 * columns + 1.9, 3.6 * rows), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes, (name, curves) in zip(panels, problems.items(), strict=False):
            _paint(axes, name, curves)
        for axes in panels[len(problems) :]:
            axes.set_visible(False)
        lines, labels = panels[0].get_legend_handles_labels()
        figure.legend(lines, labels, loc="outside right upper")
        figure.savefig(path, dpi=160)


def _paint(axes: Axes, name: str, curves: Curves) -> None:
    colours = [mpl.colormaps["tab20"](number) for number in range(20)]
    starts = []
    for number, (method, runs) in enumerate(curves.items()):
        length = min(len(run) for run in runs)
        table = np.array([run[:length] for run in runs])
        x, median = np.arange(1, length + 1), np.median(table, axis=0)
        if method == _OURS:
            axes.plot(x, median, color=COLOURS["front"], lw=2.6, label=method, zorder=3)
            low, high = table.min(axis=0), table.max(axis=0)
            axes.fill_between(x, low, high, color=COLOURS["front"], alpha=0.2)
        else:
            dashes = "--" if method.endswith("+design") or method == "uniform_grid" else "-"
            axes.plot(x, median, dashes, color=colours[(2 * number + 2) % 19], lw=1.3,
                      label=method)  # fmt: skip
        starts.append(median[min(length, 20) - 1])
    axes.set(title=name, xscale="log", xlim=(5, None), ylim=(max(0.0, min(starts) - 0.02), 1.003))
    axes.set_xticks([10, 20, 50, 100, 200, 500], ["10", "20", "50", "100", "200", "500"])
    axes.minorticks_off()
    axes.set_xlim(5, 1.05 * max(len(run) for runs in curves.values() for run in runs))
    axes.set_xlabel("different networks evaluated")
    axes.set_ylabel("share of the best-known hypervolume")
