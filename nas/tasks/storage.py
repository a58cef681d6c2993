"""The task folder of a run: written once, opened in a moment, valid only with its ``task.json``.

``task.json`` is written last and names the size of every array, so a folder that was left half
written is told from a whole one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nas.tasks.checkpoint_tokenizer import token_dtype
from nas.tasks.config import TaskConfig
from nas.tasks.language_model import LanguageModelTask, SplitSize, TaskFacts
from nas.tasks.splits import SPLITS, SplitName
from nas.tasks.tokenizers import TOKENIZER_FILE, Tokenizer, load_tokenizer
from searchspace.errors import UserError
from searchspace.files import remove, write_file, write_text

TASK_FILE = "task.json"
_FORMAT = 1


def save_task(
    folder: Path,
    config: TaskConfig,
    facts: TaskFacts,
    tokens: Mapping[SplitName, NDArray[Any]],
    tokenizer: Tokenizer | None,
) -> None:
    """Write a prepared task; an interrupted call leaves a folder that `open_task` does not take.

    Raises:
        UserError: the folder cannot be written.
    """
    content = {"format": _FORMAT, "config": asdict(config), **asdict(facts)}
    try:
        (folder / TASK_FILE).unlink(missing_ok=True)
        for split in SPLITS:
            _write_tokens(folder, split, tokens[split])
        if tokenizer is not None:
            tokenizer.save(folder / TOKENIZER_FILE)
        write_text(folder / TASK_FILE, json.dumps(content, indent=2) + "\n")
    except OSError as error:
        raise UserError(
            f"cannot write into {folder}: {error.strerror}; choose another output folder"
        ) from error
    except UserError:
        for path in [folder / TOKENIZER_FILE, *(_token_path(folder, split) for split in SPLITS)]:
            remove(path)
        raise


def open_task(folder: Path) -> LanguageModelTask | None:
    """Return the task that a folder holds, its tokens memory-mapped.

    Args:
        folder: a folder that `save_task` wrote.

    Returns:
        None if the folder holds no task, or not a whole one.
    """
    try:
        content = json.loads((folder / TASK_FILE).read_text(encoding="utf-8"))
        if content.pop("format") != _FORMAT:
            return None
        config = TaskConfig(**content.pop("config"))
        facts = _facts(content)
        tokens = {split: _open_tokens(folder, split, facts) for split in SPLITS}
        tokenizer = load_tokenizer(folder) if facts.unit == "byte" else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    if tokenizer is not None and tokenizer.vocab_size != facts.vocab_size:
        return None
    return LanguageModelTask(config, facts, tokens, tokenizer)


def stored_config(folder: Path) -> TaskConfig | None:
    """Return the config of the task that a folder holds; None where there is none to be read."""
    try:
        content = json.loads((folder / TASK_FILE).read_text(encoding="utf-8"))
        return TaskConfig(**content["config"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def check_same_config(found: TaskConfig, wanted: TaskConfig, folder: Path) -> None:
    """Refuse a folder whose task was prepared from other settings.

    Raises:
        UserError: names the settings that differ.
    """
    old, new = asdict(found), asdict(wanted)
    differing = [name for name in new if old[name] != new[name]]
    if differing:
        had = ", ".join(f"{name}={old[name]!r}" for name in differing)
        asked = ", ".join(f"{name}={new[name]!r}" for name in differing)
        raise UserError(
            f"{folder} holds a task prepared with {had}, but {asked} was asked for; choose another "
            "output folder or the same settings"
        )


def _facts(content: dict[str, Any]) -> TaskFacts:
    sizes = {split: SplitSize(**content["sizes"][split]) for split in SPLITS}
    return TaskFacts(**{**content, "sizes": sizes})


def _write_tokens(folder: Path, split: SplitName, tokens: NDArray[Any]) -> None:
    write_file(
        _token_path(folder, split), lambda stream: np.save(stream, tokens, allow_pickle=False)
    )


def _open_tokens(folder: Path, split: SplitName, facts: TaskFacts) -> NDArray[Any]:
    dtype = token_dtype(facts.vocab_size)
    # Copy-on-write, because torch does not like to wrap memory that it must not write.
    tokens: NDArray[Any] = np.load(_token_path(folder, split), mmap_mode="c", allow_pickle=False)
    if tokens.dtype != dtype or tokens.shape != (facts.sizes[split].num_tokens,):
        raise ValueError(f"{split} tokens are not those of {TASK_FILE}")
    return tokens


def _token_path(folder: Path, split: SplitName) -> Path:
    return folder / f"{split}_tokens.npy"
