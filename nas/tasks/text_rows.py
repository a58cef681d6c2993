"""Texts as rows of token ids of one length: byte by byte, or with a checkpoint's tokenizer.

Legend: N texts, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nas.tasks.checkpoint_tokenizer import (
    CheckpointTokenizer,
    read_checkpoint_tokenizer,
    token_dtype,
)
from nas.tasks.config import TaskConfig
from nas.tasks.input_forms import PAD_NAME, RowTokenizer, byte_backend
from searchspace.errors import UserError

PAD = 256
"""Token id behind the end of a short file; the others are the bytes themselves."""
PAD_NAMES = ("[PAD]", "<pad>", "<|pad|>")
MAX_BYTES_PER_TOKEN = 16
"""Bytes of a file that are read per token wanted; words are shorter."""


class TextRows(Protocol):
    """How texts become rows."""

    vocab_size: int
    pad: int
    num_bytes: int
    """Bytes of a file that are read, at most."""

    def rows(self, texts: Sequence[bytes]) -> NDArray[Any]:
        """Return the token ids (N, T), padded at the end."""

    def tokenizer(self) -> RowTokenizer:
        """Return what gives the same ids without this package."""


class ByteRows:
    """One token per byte.

    Args:
        seq_len: T.
    """

    vocab_size, pad = PAD + 1, PAD

    def __init__(self, seq_len: int) -> None:
        self.num_bytes = seq_len

    def rows(self, texts: Sequence[bytes]) -> NDArray[Any]:
        """See `TextRows.rows`."""
        rows = np.full((len(texts), self.num_bytes), PAD, np.uint16)
        for row, text in zip(rows, texts, strict=True):
            row[: len(text)] = np.frombuffer(text, np.uint8)
        return rows

    def tokenizer(self) -> RowTokenizer:
        """See `TextRows.tokenizer`."""
        return RowTokenizer(byte_backend(PAD_NAME), PAD)


class TokenRows:
    """Tokens of a checkpoint, the one that ends a text behind them; long texts are cut.

    Args:
        tokenizer: of the checkpoint.
        seq_len: T.

    Raises:
        UserError: when it has no token for padding.
    """

    def __init__(self, tokenizer: CheckpointTokenizer, seq_len: int) -> None:
        found = (tokenizer.token_id(name) for name in PAD_NAMES)
        pad = next((index for index in found if index is not None), None)
        if pad is None:
            raise UserError(
                f"the tokenizer has no token for padding; one of {', '.join(PAD_NAMES)} is needed"
            )
        self._tokenizer, self._seq_len, self.pad = tokenizer, seq_len, pad
        self.vocab_size = tokenizer.vocab_size
        self.num_bytes = MAX_BYTES_PER_TOKEN * seq_len

    def rows(self, texts: Sequence[bytes]) -> NDArray[Any]:
        """See `TextRows.rows`."""
        rows = np.full((len(texts), self._seq_len), self.pad, token_dtype(self.vocab_size))
        for row, text in zip(rows, texts, strict=True):
            # The last character may have been cut in two.
            ids = self._tokenizer.encode(text.decode("utf-8", "ignore"))[: self._seq_len - 1]
            row[: len(ids) + 1] = [*ids, self._tokenizer.end_of_text]
        return rows

    def tokenizer(self) -> RowTokenizer:
        """See `TextRows.tokenizer`."""
        return RowTokenizer(self._tokenizer.with_end(), self.pad)


def text_rows(config: TaskConfig) -> TextRows:
    """Return how a task's texts become rows.

    Raises:
        UserError: when its tokenizer cannot be used.
    """
    if not config.has_own_tokenizer:
        return ByteRows(config.seq_len)
    path = Path(config.tokenizer)
    tokenizer = read_checkpoint_tokenizer(path.parent, path.name, config.vocab_size)
    return TokenRows(tokenizer, config.seq_len)
