"""Classification tasks in a run's task folder, written the way of `nas.tasks.storage`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np

from nas.tasks.config import TaskConfig
from nas.tasks.input_forms import RowTokenizer
from nas.tasks.labelled import Array, Examples, LabelledFacts, LabelledTask
from nas.tasks.splits import SPLITS, SplitName
from nas.tasks.storage import TASK_FILE
from nas.tasks.tokenizers import TOKENIZER_FILE
from searchspace.errors import UserError
from searchspace.files import remove, write_file, write_text

_FORMAT = 1
_PARTS = ("inputs", "labels")


def save_labelled(folder: Path, config: TaskConfig, task: LabelledTask) -> None:
    """Write a prepared task; an interrupted call leaves a folder that `open_labelled` ignores.

    Raises:
        UserError: the folder cannot be written.
    """
    sizes = {split: len(task.examples[split].labels) for split in SPLITS}
    facts = {"facts": asdict(task.facts), "num_examples": sizes}
    content = {"format": _FORMAT, "config": asdict(config), **facts}
    try:
        remove(folder / TASK_FILE)
        for split in SPLITS:
            _write(_path(folder, split, "inputs"), task.examples[split].inputs)
            _write(_path(folder, split, "labels"), task.examples[split].labels)
        if isinstance(task.input_form, RowTokenizer):
            task.input_form.save(folder / TOKENIZER_FILE)
        write_text(folder / TASK_FILE, json.dumps(content, indent=2) + "\n")
    except UserError:
        remove(folder / TOKENIZER_FILE)
        for split in SPLITS:
            for part in _PARTS:
                remove(_path(folder, split, part))
        raise


def open_labelled(folder: Path) -> LabelledTask | None:
    """Return the classification task that a folder holds, its inputs memory-mapped.

    Returns:
        None if the folder holds no such task, or not a whole one.
    """
    try:
        content = json.loads((folder / TASK_FILE).read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            return None
        facts = LabelledFacts(**content["facts"])
        facts = LabelledFacts(**{**asdict(facts), "labels": tuple(facts.labels)})
        examples = {split: _open(folder, split, content["num_examples"][split]) for split in SPLITS}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    pad = facts.family_facts.get("pad_token")
    form = None if pad is None else RowTokenizer.read(folder / TOKENIZER_FILE, pad)
    return LabelledTask(facts, examples, form)


def _open(folder: Path, split: SplitName, number: int) -> Examples:
    inputs = np.load(_path(folder, split, "inputs"), mmap_mode="r", allow_pickle=False)
    labels = np.load(_path(folder, split, "labels"), allow_pickle=False)
    if len(inputs) != number or labels.shape != (number,) or labels.dtype != np.int64:
        raise ValueError(f"{split} examples are not those of {TASK_FILE}")
    return Examples(inputs, labels)


def _write(path: Path, array: Array) -> None:
    write_file(path, lambda stream: np.save(stream, array, allow_pickle=False))


def _path(folder: Path, split: SplitName, part: str) -> Path:
    return folder / f"{split}_{part}.npy"
