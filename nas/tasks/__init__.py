"""Tasks: what a network learns, prepared once per run.

A task is one entry of `TASKS`. This module imports neither torch nor numpy, so a command line can
read the registry and build a `TaskConfig` at once.
"""

from __future__ import annotations

import importlib
from pathlib import Path

from nas.tasks.base import IGNORED, Progress, Task
from nas.tasks.config import TaskConfig
from nas.tasks.registry import TASKS, TaskKind

__all__ = ["IGNORED", "TASKS", "Task", "TaskConfig", "TaskKind", "prepare_task"]


def prepare_task(config: TaskConfig, folder: Path | str, progress: Progress | None = None) -> Task:
    """Open the prepared task in a folder, or read or generate what it needs and prepare it there.

    A folder that holds a whole task of the same config is opened as it is, even where the files
    have changed since: the tokens that training began with stay the tokens of the run. A
    half-written one is built again. Nothing is written before everything is checked. Tasks that
    are generated in less than a second write nothing.

    Args:
        config: what to learn from and how to cut it.
        folder: a run folder's ``task`` folder; made if need be.
        progress: is told in words what is being done.

    Raises:
        UserError: no usable or too little data, tokens outside the vocabulary, a folder that
            cannot be written or that holds a task of another config.
    """
    from nas.tasks.storage import check_same_config, stored_config

    folder = Path(folder)
    found = stored_config(folder)
    if found is not None:
        check_same_config(found, config, folder)
    module = importlib.import_module(TASKS[config.name].module)
    task: Task = module.prepare(config, folder, progress or (lambda message: None))
    return task
