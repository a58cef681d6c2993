"""Text classification: which of several folders does a file belong to?

Texts are read byte by byte, or with the tokenizer of a checkpoint (see `nas.tasks.text_rows`).

Files of every class are ordered by the hash of their names and divided by number, so that every
split has every class. A file whose kept bytes were already seen is left out.

Source: Tay et al. 2020, "Long Range Arena", section 2.2.2 (byte-level text classification).
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from nas.tasks.base import Progress
from nas.tasks.config import TaskConfig
from nas.tasks.labelled import Examples, LabelledFacts, LabelledTask
from nas.tasks.labelled_storage import open_labelled, save_labelled
from nas.tasks.readers import NotReadable, TextReader
from nas.tasks.sources import SourceFile, files_below
from nas.tasks.splits import SPLITS, SplitName, name_digest
from nas.tasks.text_rows import TextRows, text_rows
from searchspace.errors import UserError

_MIN_FILES = len(SPLITS)

Texts = dict[str, bytes]


@dataclass
class _Skipped:
    """Files that are left out, and the first reason that one was not text."""

    not_text: list[str] = field(default_factory=list)
    num_duplicates: int = 0


def prepare(config: TaskConfig, folder: Path, progress: Progress) -> LabelledTask:
    """Open the texts that a folder holds, or read them; see `nas.tasks.prepare_task`."""
    found = open_labelled(folder)
    if found is not None:
        return found
    rows = text_rows(config)
    files = find_classes(config.data or "")
    num_files = sum(map(len, files.values()))
    progress(f"reading {num_files} files of {len(files)} classes")
    texts = read_classes(files, rows.num_bytes, progress)
    parts = split_classes(texts, config)
    facts = LabelledFacts(
        {
            "kind": "encoder",
            "num_classes": len(files),
            "max_tokens": config.seq_len,
            "pad_token": rows.pad,
        },
        vocab_size=rows.vocab_size,
        seq_len=config.seq_len,
        labels=tuple(files),
    )
    examples = {split: _examples(part, rows) for split, part in parts.items()}
    task = LabelledTask(facts, examples, rows.tokenizer())
    save_labelled(folder, config, task)
    return task


def find_classes(data: str) -> dict[str, list[SourceFile]]:
    """Return the non-empty files of every sub-folder, by its name, in order of names.

    Raises:
        UserError: not a folder, fewer than two sub-folders, or too few files in one.
    """
    root = Path(os.path.expanduser(data))
    try:
        if not root.is_dir():
            raise UserError(
                f"data={data!r} is not a folder; task=text_classification needs one that has a "
                "sub-folder of text files per class"
            )
        folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
        files = {folder.name: files_below(folder) for folder in folders}
    except OSError as error:
        raise UserError(f"data={data!r} cannot be looked up ({error}); give another path") from None
    if len(files) < 2:
        what = f"only one sub-folder, {folders[0].name}" if files else "no sub-folder"
        raise UserError(f"data={data!r} has {what}; give a folder with at least two, one per class")
    for name, found in files.items():
        if not found:
            raise UserError(
                f"class folder {root / name} holds no file with text in it; add at least "
                f"{_MIN_FILES} or remove the folder"
            )
    return files


def read_classes(
    files: dict[str, list[SourceFile]], num_bytes: int, progress: Progress
) -> dict[str, Texts]:
    """Return the first `num_bytes` bytes of every file, by class and name.

    Raises:
        UserError: when too few files of a class are different UTF-8 texts.
    """
    skipped, seen = _Skipped(), set[bytes]()
    texts = {
        name: _read_class(name, found, num_bytes, skipped, seen) for name, found in files.items()
    }
    if skipped.not_text:
        progress(f"skipped {len(skipped.not_text)} files that are not UTF-8 text")
    if skipped.num_duplicates:
        progress(
            f"left out {skipped.num_duplicates} files whose first {num_bytes} bytes are "
            "those of another file"
        )
    return texts


def _read_class(
    label: str, files: list[SourceFile], num_bytes: int, skipped: _Skipped, seen: set[bytes]
) -> Texts:
    reader = TextReader()
    texts: Texts = {}
    reasons = []
    for file in files:
        try:
            # Read to where a character ends for sure; a byte-level network may see half of one.
            content = reader.read(file, 0, reader.align(file, num_bytes))[:num_bytes]
        except NotReadable as reason:
            reasons.append(f"{file.path} {reason}")
            continue
        if content in seen:
            skipped.num_duplicates += 1
            continue
        seen.add(content)
        texts[file.name] = content
    skipped.not_text += reasons
    if len(texts) < _MIN_FILES:
        example = f" (for example, {reasons[0]})" if reasons else ""
        raise UserError(
            f"class {label!r} has {len(files)} files, of which {len(texts)} are different UTF-8 "
            f"texts{example}; at least {_MIN_FILES} are needed, one each for training, validation "
            "and test"
        )
    return texts


def split_classes(
    texts: dict[str, Texts], config: TaskConfig
) -> dict[SplitName, list[tuple[bytes, int]]]:
    """Divide every class and return (text, class id) of each split, classes mixed.

    Raises:
        UserError: when `config.max_train_bytes` leaves a class without a training text.
    """
    rows: dict[SplitName, list[tuple[bytes, bytes, int]]] = {name: [] for name in SPLITS}
    for class_id, (label, contents) in enumerate(texts.items()):
        names = sorted(contents, key=name_digest)
        num_test = max(1, round(config.test_fraction * len(names)))
        num_held_out = num_test + max(1, round(config.validation_fraction * len(names)))
        num_held_out = min(num_held_out, len(names) - 1)
        for place, name in enumerate(names):
            split: SplitName = "train"
            if place < num_held_out:
                split = "test" if place < num_test else "validation"
            full_name = f"{label}/{name}"
            order = name_digest(f"{config.seed}/{full_name}" if split == "train" else full_name)
            rows[split].append((order, contents[name], class_id))
    for part in rows.values():
        part.sort()
    parts = {split: [(text, label) for _, text, label in part] for split, part in rows.items()}
    parts["train"] = _up_to(parts["train"], config.max_train_bytes)
    kept = {label for _, label in parts["train"]}
    if len(kept) < len(texts):
        missing = next(name for index, name in enumerate(texts) if index not in kept)
        raise UserError(
            f"max_train_bytes={config.max_train_bytes} leaves no training file of class "
            f"{missing!r}; raise it"
        )
    return parts


def _up_to(part: list[tuple[bytes, int]], num_bytes: int) -> list[tuple[bytes, int]]:
    """Return the leading texts that have at most so many bytes."""
    totals = np.cumsum([len(text) for text, _ in part])
    return part[: int(np.searchsorted(totals, num_bytes, side="right"))]


def _examples(part: list[tuple[bytes, int]], rows: TextRows) -> Examples:
    inputs = rows.rows([text for text, _ in part])
    return Examples(inputs, np.array([label for _, label in part], np.int64))
