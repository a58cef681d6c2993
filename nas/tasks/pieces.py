"""Long documents in pieces, so that threads share them and little is held at a time."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

# At such a place the words of the byte-pair tokenizer always end, so a document that is cut there
# gets the same tokens as a whole one.
_SAFE_CUT = re.compile(r"(?<=[A-Za-z0-9])(?=\r?\n)")
_PIECE_CHARS = 1 << 16
_BATCH_CHARS = 1 << 20
_TRAIN_BYTES = 4_000_000


def pieces(document: bytes) -> Iterator[str]:
    """Cut a long document so that threads can share it and a batch stays small."""
    text = document.decode("utf-8")
    start = 0
    while len(text) - start > _PIECE_CHARS:
        low = start + _PIECE_CHARS
        cut = _SAFE_CUT.search(text, low, low + _PIECE_CHARS)
        stop = cut.start() if cut else low
        yield text[start:stop]
        start = stop
    yield text[start:]


def batches(documents: Iterable[bytes]) -> Iterator[list[tuple[str, bool]]]:
    """Yield lists of (piece, whether it ends its document) of about a million characters."""
    batch: list[tuple[str, bool]] = []
    num_chars = 0
    for document in documents:
        parts = list(pieces(document))
        for index, piece in enumerate(parts):
            batch.append((piece, index == len(parts) - 1))
            num_chars += len(piece)
            if num_chars >= _BATCH_CHARS:
                yield batch
                batch, num_chars = [], 0
    if batch:
        yield batch


def sample(documents: Sequence[bytes]) -> Iterator[str]:
    """Yield pieces spread evenly over the documents, about 4 MB of them."""
    stride = max(1.0, sum(map(len, documents)) / _TRAIN_BYTES)
    taken, seen = 0.0, 0
    for document in documents:
        for piece in pieces(document):
            seen += len(piece)
            if seen >= taken * stride:
                taken += len(piece)
                yield piece
