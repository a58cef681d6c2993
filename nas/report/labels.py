"""Labels beside points that do not cover each other or the points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.patheffects import withStroke
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

DIRECTIONS = ((1, 1), (1, -1), (-1, 1), (-1, -1), (0, 1), (0, -1), (1, 0), (-1, 0))
DISTANCES_PT = (9, 17, 27, 40)
POINT_RADIUS_PX = 7.0
OUTSIDE_COST = 50.0


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
    canvas = cast(FigureCanvasAgg, ax.figure.canvas)
    canvas.draw()
    taken = [_around(*ax.transData.transform(point)) for point in points]
    inside = ax.get_window_extent()
    for y in lines_y:
        height = ax.transData.transform((1.0, y))[1]
        taken.append(Bbox.from_extents(inside.x0, height - 1, inside.x1, height + 1))
    for (x, y), text in sorted(labels.items()):
        best: tuple[float, Annotation | None, Bbox | None] = (float("inf"), None, None)
        for rank, (distance, direction) in enumerate(
            (distance, direction) for distance in DISTANCES_PT for direction in DIRECTIONS
        ):
            label = _annotate(ax, text, (x, y), direction, distance, colour)
            box = label.get_window_extent(canvas.get_renderer()).padded(1.5)
            cost = _cost(box, taken, inside) + 0.01 * rank
            keep, drop = (label, best[1]) if cost < best[0] else (best[1], label)
            if keep is label:
                best = (cost, label, box)
            if drop is not None:
                drop.remove()
        if best[2] is not None:
            taken.append(best[2])


def _annotate(
    ax: Axes,
    text: str,
    at: tuple[float, float],
    direction: tuple[int, int],
    distance_pt: int,
    colour: str,
) -> Annotation:
    right, up = direction
    return ax.annotate(
        text,
        at,
        xytext=(right * distance_pt, up * distance_pt),
        textcoords="offset points",
        ha={1: "left", 0: "center", -1: "right"}[right],
        va={1: "bottom", 0: "center", -1: "top"}[up],
        color=colour,
        fontweight="bold",
        zorder=6,
        path_effects=[withStroke(linewidth=2.5, foreground="white")],
        arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.8, "shrinkB": 3},
    )


def _around(x: float, y: float) -> Bbox:
    radius = POINT_RADIUS_PX
    return Bbox.from_extents(x - radius, y - radius, x + radius, y + radius)


def _cost(box: Bbox, taken: Sequence[Bbox], inside: Bbox) -> float:
    covered = 0.0
    for other in taken:
        common = Bbox.intersection(box, other)
        if common is not None:
            covered += 1.0 + common.width * common.height / (box.width * box.height)
    out = box.x0 < inside.x0 or box.x1 > inside.x1 or box.y0 < inside.y0 or box.y1 > inside.y1
    return covered + (OUTSIDE_COST if out else 0.0)
