"""What a predictor listens to, drawn."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from nas.report.figures import COLOURS, STYLE, WIDTH_IN
from searchspace.errors import UserError
from searchspace.files import write_file

FORMATS = ("png", "svg")
MAX_BARS = 20
DPI = 200


def check_figure_path(path: Path) -> str:
    """Return the format of a figure file.

    Raises:
        UserError: when it is none that can be drawn.
    """
    ending = path.suffix.removeprefix(".").lower()
    if ending not in FORMATS:
        raise UserError(f"--importance {path} must end in .{' or .'.join(FORMATS)}")
    return ending


def draw_importance(path: Path, importance: Mapping[str, float], target: str) -> None:
    """Write a bar chart of the features that matter most.

    Args:
        path: ends in .png or .svg.
        importance: by feature, in the target's unit, the largest first.
        target: what is predicted.

    Raises:
        UserError: when the file cannot be written.
    """
    ending = check_figure_path(path)
    shown = [(name, value) for name, value in importance.items() if value > 0][:MAX_BARS]
    with mpl.rc_context(STYLE):
        height = 0.9 + 0.19 * max(len(shown), 1)
        figure = Figure(figsize=(1.3 * WIDTH_IN, height), layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.barh(
            [name for name, _ in shown], [value for _, value in shown], color=COLOURS["front"]
        )
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(f"change of the predicted {target} when the feature is shuffled (RMS)")
        if not shown:
            axes.set_title("the prediction does not depend on any feature")
        buffer = io.BytesIO()
        figure.savefig(
            buffer, format=ending, dpi=DPI, metadata={"Date": None} if ending == "svg" else None
        )
    write_file(path, lambda stream: stream.write(buffer.getvalue()))
