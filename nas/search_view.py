"""The search as it goes: front and hypervolume on stderr, replaced in place on a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nas.study.archive import Snapshot

REFRESH_S = 0.5
LINE_S = 10.0
LINE_SHARE = 0.1
MAX_ROWS = 12


class SearchView:
    """Shows nothing; the base of those that show something."""

    def update(self, share: float, look: Callable[[], Snapshot]) -> None:
        """Show where the search stands.

        Args:
            share: of the search that is done, 0 to 1.
            look: returns where it stands; called only when something is drawn.
        """

    def close(self, look: Callable[[], Snapshot] | None) -> None:
        """Show the last state."""


@contextmanager
def search_view(quiet: bool = False) -> Iterator[SearchView]:
    """Show a search while the block runs: a table on a terminal, else a line now and then.

    Args:
        quiet: show nothing.
    """
    if quiet:
        yield SearchView()
        return
    view = _Table() if sys.stderr.isatty() else _Lines()
    try:
        yield view
    finally:
        view.close(None)


class _Drawn(SearchView):
    """Draws the first state, then those that are due, and the last one again at the end."""

    def __init__(self) -> None:
        self._last: tuple[float, Callable[[], Snapshot]] | None = None
        self._drawn_share, self._drawn_at = -1.0, float("-inf")

    def update(self, share: float, look: Callable[[], Snapshot]) -> None:
        """Draw if it is due."""
        self._last = (share, look)
        now = time.monotonic()
        if self._is_due(share - self._drawn_share, now - self._drawn_at):
            self._drawn_share, self._drawn_at = share, now
            self._draw(min(share, 1.0), look())

    def close(self, look: Callable[[], Snapshot] | None) -> None:
        """Draw the last state unless it was drawn."""
        if self._last is not None and self._last[0] != self._drawn_share:
            self._draw(min(self._last[0], 1.0), self._last[1]())

    def _is_due(self, share: float, seconds: float) -> bool:
        raise NotImplementedError

    def _draw(self, share: float, state: Snapshot) -> None:
        raise NotImplementedError


class _Lines(_Drawn):
    def _is_due(self, share: float, seconds: float) -> bool:
        return share >= LINE_SHARE or (share > 0 and seconds >= LINE_S)

    def _draw(self, share: float, state: Snapshot) -> None:
        print(f"search: {share:4.0%}, {headline(state)}", file=sys.stderr, flush=True)


class _Table(_Drawn):
    def __init__(self) -> None:
        super().__init__()
        from rich.console import Console
        from rich.live import Live

        console = Console(stderr=True, highlight=False)
        self._live = Live(console=console, auto_refresh=False)
        self._live.start()

    def close(self, look: Callable[[], Snapshot] | None) -> None:
        """Draw the last state, which then stays on the screen."""
        try:
            super().close(look)
        finally:
            self._live.stop()

    def _is_due(self, share: float, seconds: float) -> bool:
        return seconds >= REFRESH_S

    def _draw(self, share: float, state: Snapshot) -> None:
        from rich.console import Group

        line = f"search {share:.0%}: {headline(state)}"
        self._live.update(Group(line, front_table(state)), refresh=True)


def headline(state: Snapshot) -> str:
    """Return a search's state in one line."""
    failed = f", {state.num_failed} failed" if state.num_failed else ""
    if not state.front:
        return f"{state.num_evaluated} evaluated{failed}, none keeps every constraint so far"
    return (
        f"{state.num_evaluated} evaluated{failed}, front {len(state.front)}, hypervolume "
        f"{state.hypervolume:.4f}, best {state.names[0]} {state.best:.4g}"
    )


def front_table(state: Snapshot) -> Any:
    """Return the front as a table of at most `MAX_ROWS` networks, spread over it."""
    from rich.table import Table

    table = Table()
    for name in ("arch", *state.names):
        table.add_column(name, justify="left" if name == "arch" else "right")
    front = state.front
    shown = min(len(front), MAX_ROWS)
    for index in range(shown):
        arch_id, values = front[index * (len(front) - 1) // max(shown - 1, 1)]
        table.add_row(arch_id, *(f"{value:,.4g}" for value in values))
    if len(front) > shown:
        table.caption = f"{shown} of {len(front)} networks of the front"
    return table
