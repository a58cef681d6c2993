"""Progress on stderr: a bar with figures and the time left, or nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.progress import Progress as _Bars


class Progress(Protocol):
    """One long piece of work."""

    def update(self, done: float, text: str = "") -> None:
        """Show that `done` (0 to 1) of the work is done."""
        ...


class _Silent:
    def update(self, done: float, text: str = "") -> None:
        """Show nothing."""


class Reporter:
    """Says what is going on, on stderr.

    Args:
        quiet: say nothing at all.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self._bars: _Bars | None = None

    def say(self, text: str) -> None:
        """Print one line."""
        if not self.quiet:
            from rich.console import Console

            Console(stderr=True, highlight=False).print(text, soft_wrap=True, markup=False)

    @contextmanager
    def bar(self, title: str) -> Iterator[Progress]:
        """Show a progress bar while the block runs, below that of a block around it."""
        if self.quiet:
            yield _Silent()
            return
        if self._bars is not None:
            bar = _Bar(self._bars, title)
            try:
                yield bar
            finally:
                bar.remove()
            return
        from rich import progress as rich_progress
        from rich.console import Console

        console = Console(stderr=True, highlight=False)
        columns = (
            rich_progress.TextColumn("{task.description}"),
            rich_progress.BarColumn(bar_width=24),
            rich_progress.TaskProgressColumn(),
            rich_progress.TimeRemainingColumn(compact=True),
            rich_progress.TextColumn("{task.fields[text]}"),
        )
        with rich_progress.Progress(*columns, console=console, refresh_per_second=2) as bars:
            self._bars = bars
            try:
                yield _Bar(bars, title)
            finally:
                self._bars = None


class _Bar:
    def __init__(self, bars: _Bars, title: str) -> None:
        self._bars = bars
        self._task = bars.add_task(title, total=1.0, text="")

    def update(self, done: float, text: str = "") -> None:
        """Move the bar."""
        self._bars.update(self._task, completed=min(done, 1.0), text=text)

    def remove(self) -> None:
        """Take the bar off the screen."""
        self._bars.remove_task(self._task)
