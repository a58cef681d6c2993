"""What a person may say about a task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from searchspace.errors import UserError, unknown

TASK_NAMES = ("stdlib", "text", "tokens")
TOKENIZER_NAMES = ("bpe", "bytes")
MIN_BPE_VOCAB_SIZE = 257
MAX_VOCAB_SIZE = 65536


@dataclass(frozen=True)
class TaskConfig:
    """What is learnt, from which files, cut up how.

    Args:
        name: ``"stdlib"`` (the Python standard library's own sources), ``"text"`` (UTF-8 files of
            the user) or ``"tokens"`` (``.bin`` files of little-endian uint16 token ids).
            ``"text"`` becomes ``"tokens"`` when every file that ``data`` matches ends in ``.bin``.
        data: a file, a folder (searched recursively, hidden entries left out) or a glob with
            ``**``; only for ``"text"`` and ``"tokens"``.
        tokenizer: ``"bpe"`` (byte-level byte pairs) or ``"bytes"``; not used by token files.
        vocab_size: tokens the byte-pair tokenizer may have, end-of-text included; for token files
            the vocabulary that they were written with. ``"bytes"`` always has 257.
        seq_len: tokens in one window.
        max_train_bytes: training files are drawn in an order that depends on ``seed`` up to here.
        validation_fraction: share of the bytes held out for the search.
        test_fraction: share of the bytes held out for the final figures.
        seed: chooses the training files where there are more than ``max_train_bytes``; the
            held-out files do not depend on it, so losses of different seeds are comparable.

    Raises:
        UserError: a name is unknown, or a value is out of range or does not go with another one.
    """

    name: str = "stdlib"
    data: str | None = None
    tokenizer: Literal["bpe", "bytes"] = "bpe"
    vocab_size: int = 1024
    seq_len: int = 256
    max_train_bytes: int = 24_000_000
    validation_fraction: float = 0.03
    test_fraction: float = 0.03
    seed: int = 0

    def __post_init__(self) -> None:
        if self.name not in TASK_NAMES:
            raise unknown("task", self.name, TASK_NAMES)
        if self.tokenizer not in TOKENIZER_NAMES:
            raise unknown("tokenizer", self.tokenizer, TOKENIZER_NAMES)
        self._check_data()
        self._check_vocab_size()
        self._check_sizes()

    def _check_data(self) -> None:
        if self.name == "stdlib" and self.data is not None:
            raise UserError(
                f"data={self.data!r} was given with task=stdlib, which reads Python's own "
                "sources; add task=text to learn from your files"
            )
        if self.name != "stdlib" and not self.data:
            raise UserError(
                f"task={self.name} needs data; give a file, a folder or a quoted glob such as "
                "--data 'notes/**/*.txt'"
            )

    def _check_vocab_size(self) -> None:
        if self.tokenizer == "bytes" and self.name != "tokens":
            return
        low = 2 if self.name == "tokens" else MIN_BPE_VOCAB_SIZE
        if not low <= self.vocab_size <= MAX_VOCAB_SIZE:
            raise UserError(
                f"vocab_size={self.vocab_size} is out of range for task={self.name}; choose "
                f"{low} to {MAX_VOCAB_SIZE}"
            )

    def _check_sizes(self) -> None:
        if self.seq_len < 1:
            raise UserError(f"seq_len={self.seq_len} is too small; choose 1 or more")
        if self.max_train_bytes < 1:
            raise UserError(
                f"max_train_bytes={self.max_train_bytes} is too small; choose 1 or more"
            )
        for field in ("validation_fraction", "test_fraction"):
            value = getattr(self, field)
            if not 0.0 < value <= 0.4:
                raise UserError(f"{field}={value} is out of range; choose more than 0, at most 0.4")
