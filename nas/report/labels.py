"""Labels beside points that do not cover each other or the points."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox
from numpy.typing import NDArray

DIRECTIONS = ((1, 1), (1, -1), (-1, 1), (-1, -1), (0, 1), (0, -1), (1, 0), (-1, 0))
DISTANCES_PT = (9, 17, 27, 40)
POINT_RADIUS_PX = 7.0
LABEL_PADDING_PX = 1.5
OUTSIDE_COST = 50.0
# Among places that cover equally little, the nearest wins.
RANK_COST = 0.01


@dataclass(frozen=True)
class _Place:
    offset_pt: tuple[int, int]
    horizontal: str
    vertical: str
    box: Bbox


def place_labels(
    ax: Axes,
    labels: Mapping[tuple[float, float], str],
    points: Sequence[tuple[float, float]],
    lines_y: Sequence[float],
    colour: str,
) -> None:
    """Write each label beside its point, at the place where it covers least.

    Limits and scales of the axes must be final.

    Args:
        ax: the axes.
        labels: text by the (x, y) it belongs to.
        points: all points drawn, which labels should not cover.
        lines_y: heights of horizontal lines, which labels should not cross.
        colour: of text and leader line.
    """
    cast(Figure, ax.figure).draw_without_rendering()
    inside = ax.get_window_extent()
    taken = [_around(*ax.transData.transform(point)) for point in points]
    for y in lines_y:
        height = ax.transData.transform((ax.get_xlim()[0], y))[1]
        taken.append([inside.x0, height - 1, inside.x1, height + 1])
    for at, text in sorted(labels.items()):
        places = _places(ax.transData.transform(at), *_size_px(ax, text), ax.figure.get_dpi() / 72)
        costs = [
            _cost(place.box, taken, inside) + RANK_COST * rank for rank, place in enumerate(places)
        ]
        best = places[costs.index(min(costs))]
        taken.append(list(best.box.extents))
        _write(ax, text, at, best, colour)


def _size_px(ax: Axes, text: str) -> tuple[float, float]:
    probe = ax.text(0.5, 0.5, text, transform=ax.transAxes, fontweight="bold")
    box = probe.get_window_extent()
    probe.remove()
    return box.width, box.height


def _places(
    at_px: Sequence[float] | NDArray[np.float64],
    width_px: float,
    height_px: float,
    px_per_pt: float,
) -> list[_Place]:
    """Return the places a label may stand at, the nearest first."""

    def each() -> Iterator[_Place]:
        for distance in DISTANCES_PT:
            for right, up in DIRECTIONS:
                x = at_px[0] + right * distance * px_per_pt + width_px * (right - 1) / 2
                y = at_px[1] + up * distance * px_per_pt + height_px * (up - 1) / 2
                yield _Place(
                    (right * distance, up * distance),
                    {1: "left", 0: "center", -1: "right"}[right],
                    {1: "bottom", 0: "center", -1: "top"}[up],
                    Bbox.from_bounds(x, y, width_px, height_px).padded(LABEL_PADDING_PX),
                )

    return list(each())


def _write(ax: Axes, text: str, at: tuple[float, float], place: _Place, colour: str) -> None:
    ax.annotate(
        text,
        at,
        xytext=place.offset_pt,
        textcoords="offset points",
        horizontalalignment=place.horizontal,
        verticalalignment=place.vertical,
        color=colour,
        fontweight="bold",
        zorder=6,
        path_effects=[withStroke(linewidth=2.5, foreground="white")],
        arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.8, "shrinkB": 3},
    )


def _around(x: float, y: float) -> list[float]:
    radius = POINT_RADIUS_PX
    return [x - radius, y - radius, x + radius, y + radius]


def _cost(box: Bbox, taken: Sequence[Sequence[float]], inside: Bbox) -> float:
    """Return how many things (left, bottom, right, top) a box covers, and how much of itself."""
    left, bottom, right, top = np.asarray(taken).T
    width = np.minimum(right, box.x1) - np.maximum(left, box.x0)
    height = np.minimum(top, box.y1) - np.maximum(bottom, box.y0)
    hit = (width > 0) & (height > 0)
    covered = float((1.0 + width * height / (box.width * box.height))[hit].sum())
    out = box.x0 < inside.x0 or box.x1 > inside.x1 or box.y0 < inside.y0 or box.y1 > inside.y1
    return covered + (OUTSIDE_COST if out else 0.0)
