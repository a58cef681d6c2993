"""`TASKS`: every task there is; imports neither torch nor numpy, so a command line has it at once.

Adding a task is one module with a function ``prepare(config, folder, progress) -> Task`` (see
`nas.tasks.base.Task`), and one entry here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class TaskKind:
    """One entry of `TASKS`.

    Args:
        summary: one line for ``--help``.
        module: where ``prepare`` is; imported when the task is prepared.
        uses: fields of `TaskConfig`, of those that have the same default for every task, that
            mean something here.
        defaults: the task's defaults of the other fields that mean something here; None stands for
            what the field's description says.
    """

    summary: str
    module: str
    uses: tuple[str, ...] = ()
    defaults: Mapping[str, int | None] = field(default_factory=dict)


_FILES = ("seq_len", "max_train_bytes", "validation_fraction", "test_fraction", "seed")
_TEXT = ("tokenizer", "vocab_size", *_FILES)
_LISTOPS = {
    "num_examples": 96_000, "min_length": 100, "max_length": 500, "max_depth": 10, "max_args": 10,
}  # fmt: skip
_COPY = {"num_items": 32, "evaluation_items": None, "num_symbols": 26}
_LOOKUP = {"num_items": 16, "evaluation_items": None, "num_symbols": 64}

TASKS: dict[str, TaskKind] = {
    "stdlib": TaskKind(
        "the Python standard library's own sources (no download)", "nas.tasks.preparation", _TEXT
    ),
    "text": TaskKind(
        "your UTF-8 files: data=FILE, FOLDER or 'GLOB'", "nas.tasks.preparation", ("data", *_TEXT)
    ),
    "tokens": TaskKind(
        "your .bin files of uint16 tokens: data and vocab_size",
        "nas.tasks.preparation",
        ("data", *_TEXT),
    ),
    "text_classification": TaskKind(
        "classes of text, byte by byte: data=FOLDER with one sub-folder of UTF-8 files per class",
        "nas.tasks.text_classification",
        ("data", *_FILES),
    ),
    "listops": TaskKind(
        "ListOps: the value of nested MIN, MAX, MED and SM (generated)",
        "nas.tasks.listops",
        ("seed",),
        _LISTOPS,
    ),
    "digits": TaskKind("1797 handwritten digits of 8x8 pixels (no download)", "nas.tasks.digits"),
    "copy": TaskKind("probe: repeat a random string (generated)", "nas.tasks.copying", (), _COPY),
    "context_lookup": TaskKind(
        "probe: look up values by their keys (generated)", "nas.tasks.context_lookup", (), _LOOKUP
    ),
}
