"""The whole report as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from nas.report.front_sections import front_section, layers_section, table_section
from nas.report.markup import Markup, join, tag
from nas.report.run_data import RunData, load_run
from nas.report.run_sections import (
    facts_section,
    metrics_section,
    prediction_section,
    search_section,
    training_section,
)
from nas.report.style import CSS
from nas.report.summary import cards, headline
from searchspace.files import write_text

SECTIONS: tuple[tuple[str, str, Callable[[RunData], Markup]], ...] = (
    ("front", "Pareto front", front_section),
    ("hypervolume", "Hypervolume", search_section),
    ("predictions", "Predicted against measured", prediction_section),
    ("layers", "Chosen networks", layers_section),
    ("training", "Supernet training", training_section),
    ("members", "All front members", table_section),
    ("metrics", "Training-free metrics", metrics_section),
    ("facts", "Verification, device and config", facts_section),
)


def write_report(folder: Path) -> Path:
    """Write `report.html` into a run folder; it opens offline and loads nothing.

    What the folder does not hold yet is left out, with a sentence that says so.

    Args:
        folder: the run folder.

    Returns:
        The path of the page.

    Raises:
        UserError: when the folder holds no run, a file in it is damaged, or it cannot be
            written to.
    """
    folder = Path(folder)
    page = render(load_run(folder))
    path = folder / "report.html"
    write_text(path, page)
    return path


def render(data: RunData) -> str:
    """Return the page of a run."""
    title = f"Architecture search: {data.front.get('task') or data.folder.name or 'run'}"
    links = [tag("a", name, href=f"#{key}") for key, name, _ in SECTIONS]
    sections = [
        tag("section", tag("h2", name), build(data), id=key) for key, name, build in SECTIONS
    ]
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Markup(CSS)),
    )
    body = tag(
        "main",
        tag("h1", title),
        tag("p", headline(data), class_="lead"),
        tag("p", _about(data), class_="note"),
        cards(data),
        tag("nav", *links),
        *sections,
    )
    document = tag("html", head, tag("body", body), lang="en")
    # The folder's path may hold bytes that are no UTF-8.
    return str(join([Markup("<!doctype html>\n"), document])).encode("utf-8", "replace").decode()


def _about(data: RunData) -> str:
    parts = [f"Run folder {data.folder}"]
    device = data.front.get("device")
    if isinstance(device, dict) and device.get("cpu"):
        hardware = device.get("accelerator") or device["cpu"]
        backend = device.get("backend", "eager")
        parts.append(f"{hardware}, {device.get('num_threads', '?')} threads, {backend}")
    if data.front.get("space"):
        size = _power_of_ten(str(data.front.get("space_size", "")))
        parts.append(f"space {data.front['space']}{size}")
    return " · ".join(parts) + (
        f". {'Losses, accuracies' if data.has_accuracy else 'Losses'}, latencies and memory are "
        "measured unless a label says predicted; bytes and "
        "parameters are counted."
    )


def _power_of_ten(digits: str) -> str:
    return f" ({float(digits):.1e} archs)" if digits.isdecimal() and len(digits) < 300 else ""
