"""Tasks: what a network learns, prepared once per run.

A task is one entry of `TASKS`. This module imports neither torch nor numpy, so a command line can
read the registry and build a `TaskConfig` at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nas.tasks.config import TaskConfig
from nas.tasks.sources import SourceFile, stdlib_files, user_files

if TYPE_CHECKING:
    from nas.tasks.language_model import LanguageModelTask

__all__ = ["TASKS", "TaskConfig", "TaskKind", "prepare_task"]

Progress = Callable[[str], None]


@dataclass(frozen=True)
class TaskKind:
    """One way to get a text.

    Args:
        summary: one line for ``--help``.
        find_files: takes ``TaskConfig.data`` and returns the files that match.
    """

    summary: str
    find_files: Callable[[str | None], list[SourceFile]]


TASKS: dict[str, TaskKind] = {
    "stdlib": TaskKind("the Python standard library's own sources (no download)", stdlib_files),
    "text": TaskKind("your UTF-8 files: data=FILE, FOLDER or 'GLOB'", user_files),
    "tokens": TaskKind("your .bin files of uint16 tokens: data and vocab_size", user_files),
}


def prepare_task(
    config: TaskConfig, folder: Path | str, progress: Progress | None = None
) -> LanguageModelTask:
    """Open the prepared task in a folder, or read the files and prepare it there.

    A folder that holds a whole task of the same config is opened as it is, even where the files
    have changed since: the tokens that training began with stay the tokens of the run. A
    half-written one is built again. Nothing is written before everything is checked.

    Args:
        config: what to learn from and how to cut it.
        folder: a run folder's ``task`` folder; made if need be.
        progress: is told in words what is being done.

    Raises:
        UserError: no usable or too little text, tokens outside the vocabulary, a folder that
            cannot be written or that holds a task of another config.
    """
    from nas.tasks.preparation import prepare

    return prepare(config, Path(folder), progress or (lambda message: None))
