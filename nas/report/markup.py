"""HTML that cannot be injected into, and how numbers are written.

`tag` escapes every child that is not `Markup`, so a name from a file can only ever be text.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence

MISSING = "–"  # noqa: RUF001 - an en dash is what a table shows for "no value"
VOID_TAGS = ("meta", "br", "hr")


class Markup(str):
    """Text that already is HTML."""


def escape(value: object) -> Markup:
    """Return a value as HTML text; `Markup` stays as it is."""
    return value if isinstance(value, Markup) else Markup(html.escape(str(value)))


def join(children: Iterable[object], between: str = "") -> Markup:
    """Return children in a row, escaped; None is left out."""
    parts = [escape(child) for child in children if child is not None]
    return Markup(escape(between).join(parts))


def tag(name: str, /, *children: object, **attributes: object) -> Markup:
    """Return an element.

    Args:
        name: the tag.
        children: text (escaped), `Markup`, or None (left out).
        attributes: ``class_`` stands for class and ``_`` for ``-``; None is left out, True is a
            bare attribute.
    """
    written = ""
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        label = key.rstrip("_").replace("_", "-")
        written += f" {label}" if value is True else f' {label}="{html.escape(str(value))}"'
    if name in VOID_TAGS:
        return Markup(f"<{name}{written}>")
    return Markup(f"<{name}{written}>{join(children)}</{name}>")


def table(
    header: Sequence[object],
    rows: Iterable[Sequence[object]],
    text_columns: int = 1,
    caption: str | None = None,
) -> Markup:
    """Return a table that scrolls sideways when it is too wide.

    Args:
        header: one cell per column.
        rows: cells; text is escaped.
        text_columns: how many columns from the left are text (the others are aligned as numbers).
        caption: a sentence above the table.
    """

    def cells(kind: str, values: Sequence[object]) -> Markup:
        return join(
            tag(kind, value, class_=None if index < text_columns else "number")
            for index, value in enumerate(values)
        )

    body = tag("tbody", join(tag("tr", cells("td", row)) for row in rows))
    head = tag("thead", tag("tr", cells("th", header)))
    title = tag("caption", caption) if caption else None
    return tag("div", tag("table", title, head, body), class_="scroll", tabindex="0")


def number(value: float | None, digits: int = 3) -> str:
    """Return a number with `digits` significant digits, or a dash."""
    if value is None or not math.isfinite(value):
        return MISSING
    if value == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(value)))
    if magnitude >= 9 or magnitude < -4:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(0, digits - 1 - magnitude)}f}"


def fixed(value: float | None, decimals: int = 3) -> str:
    """Return a number with `decimals` decimals, or a dash."""
    return MISSING if value is None or not math.isfinite(value) else f"{value:,.{decimals}f}"


def percent(share: float | None) -> str:
    """Return a share of 1 in percent with one decimal, without the sign, or a dash."""
    return fixed(None if share is None else 100.0 * share, 1)


def megabytes(size_bytes: float | None) -> str:
    """Return bytes as MB (10^6 bytes) without the unit, or a dash."""
    return MISSING if size_bytes is None else number(size_bytes / 1e6)


def millions(count: float | None) -> str:
    """Return a count in millions without the unit, or a dash."""
    return MISSING if count is None else number(count / 1e6)
