"""Drawing with matplotlib for a page: style, scales, and figures as inline SVG."""

from __future__ import annotations

import io
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.axis import XAxis, YAxis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from nas.report.markup import Markup

COLOURS = {"front": "#1d5fbf", "random": "#7b8494", "uniform": "#c2570c"}
MARKERS = {"front": "o", "random": "X", "uniform": "s"}
NAMES = {"front": "front", "random": "random archs", "uniform": "uniform networks"}
INK, MUTED, GRID = "#1c2430", "#5b6675", "#e4e8ee"

# Figures are drawn narrow, so that their text is still readable at the width of a phone.
WIDTH_IN, HEIGHT_IN = 5.0, 3.7
LOG_SCALE_FROM = 5.0

STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": "#9aa4b2",
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "svg.fonttype": "path",
    "svg.hashsalt": "report",
}


def draw(
    name: str,
    description: str,
    paint: Callable[[Figure, Axes], Mapping[str, str] | None],
    height_in: float = HEIGHT_IN,
) -> Markup:
    """Return a figure as inline SVG.

    Args:
        name: prefix of every id inside, unique on the page.
        description: what the figure shows, for those who cannot see it.
        paint: draws on the axes; may return texts to show when the mouse is over the artist with
            that gid.
        height_in: height, where the width is `WIDTH_IN`.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_IN, height_in), layout="constrained")
        FigureCanvasAgg(figure)
        tips = paint(figure, figure.add_subplot()) or {}
        buffer = io.StringIO()
        no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=no_metadata)
    return _inline(buffer.getvalue(), name, description, tips)


def _inline(svg: str, name: str, description: str, tips: Mapping[str, str]) -> Markup:
    """Make a stand-alone SVG fit to stand in a page: no namespaces, no URLs, ids of its own."""
    root = ET.fromstring(svg)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        attributes = {key.rpartition("}")[2]: text for key, text in element.attrib.items()}
        element.attrib.clear()
        for key, text in attributes.items():
            text = text.replace("url(#", f"url(#{name}-")
            if key == "href":
                text = f"#{name}-{text.lstrip('#')}"
            elif key == "id":
                _add_tip(element, tips.get(text))
                text = f"{name}-{text}"
            element.set(key, text)
    for parent in list(root.iter()):
        for child in [item for item in parent if item.tag in ("metadata", "style")]:
            parent.remove(child)
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.attrib.update({"role": "img", "aria-label": description})
    return Markup(ET.tostring(root, encoding="unicode"))


def _add_tip(element: ET.Element, tip: str | None) -> None:
    if tip is not None:
        title = ET.Element("title")
        title.text = tip
        element.insert(0, title)


def scale_axis(
    axis: XAxis | YAxis, values: Sequence[float], margin: float = 0.07, linear: bool = False
) -> None:
    """Choose a linear or (for a wide range of positive values) a logarithmic scale with few ticks.

    Args:
        axis: `ax.xaxis` or `ax.yaxis`.
        values: what is drawn along it.
        margin: room at both ends, as a share of the range.
        linear: never take a logarithmic scale.
    """
    low, high = min(values), max(values)
    set_scale = axis.axes.set_xscale if isinstance(axis, XAxis) else axis.axes.set_yscale
    set_limits = axis.axes.set_xlim if isinstance(axis, XAxis) else axis.axes.set_ylim
    if not linear and low > 0 and high / low >= LOG_SCALE_FROM:
        set_scale("log")
        axis.set_major_locator(FixedLocator(_log_ticks(low, high)))
        axis.set_minor_locator(NullLocator())
        ratio = (high / low) ** margin
        set_limits(low / ratio, high * ratio)
    else:
        axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
        room = margin * (high - low) or 0.1 * abs(high) or 1.0
        set_limits(low - room, high + room)
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))


def _log_ticks(low: float, high: float) -> list[float]:
    decades = [10.0**exponent for exponent in range(-12, 13)]
    fine = (1, 2, 5) if high / low < 200 else (1,)
    ticks = [step * decade for decade in decades for step in fine]
    return [tick for tick in ticks if low / 1.3 <= tick <= high * 1.3]


def legend_above(ax: Axes, handles: Sequence[Any], columns: int = 3) -> None:
    """Put a legend above the axes, where it can hide nothing."""
    ax.legend(
        handles=list(handles),
        loc="lower left",
        bbox_to_anchor=(0.0, 1.01),
        ncols=columns,
        borderaxespad=0.0,
        handletextpad=0.4,
        columnspacing=1.4,
    )
