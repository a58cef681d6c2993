"""Reading a file or a stretch of it as text or as token ids, and saying why it cannot be."""

from __future__ import annotations

import codecs
from typing import Protocol

import numpy as np

from nas.tasks.sources import SourceFile
from searchspace.errors import UserError

_SNIFF_BYTES = 8192
_ALIGN_BYTES = 4096


class NotReadable(Exception):
    """A file that is not what the task reads; the message goes behind its path."""


class Reader(Protocol):
    """How the bytes of one kind of file are checked and cut; ``kind`` says which, for messages."""

    kind: str

    def sniff(self, file: SourceFile) -> None:
        """Look at the beginning of a file; raises NotReadable where it is of another kind."""

    def read(self, file: SourceFile, start: int = 0, stop: int | None = None) -> bytes:
        """Return bytes ``start`` to ``stop``; raises NotReadable where they do not hold up."""

    def align(self, file: SourceFile, offset: int) -> int:
        """Return the nearest offset at or after the given one where the file may be cut."""


class TextReader:
    """UTF-8 text, cut behind a line end or at least never inside a character."""

    kind = "UTF-8 text"

    def sniff(self, file: SourceFile) -> None:
        """See `Reader.sniff`."""
        _check_text(_read_bytes(file, 0, _SNIFF_BYTES), final=file.num_bytes <= _SNIFF_BYTES)

    def read(self, file: SourceFile, start: int = 0, stop: int | None = None) -> bytes:
        """See `Reader.read`."""
        text = _read_bytes(file, start, stop)
        _check_text(text, final=True, start=start)
        return text

    def align(self, file: SourceFile, offset: int) -> int:
        """See `Reader.align`."""
        if offset <= 0 or offset >= file.num_bytes:
            return min(max(offset, 0), file.num_bytes)
        # From one byte earlier, so that an offset right behind a line end stays where it is.
        ahead = _read_bytes(file, offset - 1, offset + _ALIGN_BYTES)
        line_end = ahead.find(b"\n")
        if line_end >= 0:
            return offset + line_end
        is_start = (np.frombuffer(ahead[1:], np.uint8) & 0xC0) != 0x80
        return offset + int(np.argmax(is_start))


class TokenReader:
    """Little-endian uint16 token ids below a vocabulary size."""

    kind = ".bin token files"

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def sniff(self, file: SourceFile) -> None:
        """See `Reader.sniff`; a token file that is wrong is an error even among good ones."""
        if file.path.suffix != ".bin":
            raise UserError(
                f"{file.path} is not a .bin file; task=tokens reads only .bin files of uint16 "
                "token ids, task=text reads text"
            )
        if file.num_bytes % 2:
            raise UserError(
                f"{file.path} has an odd length of {file.num_bytes} bytes; a .bin file holds "
                "uint16 token ids, two bytes each"
            )

    def read(self, file: SourceFile, start: int = 0, stop: int | None = None) -> bytes:
        """See `Reader.read`."""
        content = _read_bytes(file, start, stop)
        tokens = np.frombuffer(content, "<u2")
        if tokens.size and int(tokens.max()) >= self.vocab_size:
            index = int(np.argmax(tokens >= self.vocab_size))
            raise UserError(
                f"{file.path} holds token {int(tokens[index])} at position {start // 2 + index}, "
                f"not below vocab_size={self.vocab_size}; set vocab_size to that of the tokenizer "
                "that wrote it"
            )
        return content

    def align(self, file: SourceFile, offset: int) -> int:
        """See `Reader.align`."""
        return min(max(offset + offset % 2, 0), file.num_bytes)


def _read_bytes(file: SourceFile, start: int, stop: int | None) -> bytes:
    try:
        with file.path.open("rb") as stream:
            stream.seek(start)
            return stream.read() if stop is None else stream.read(max(stop - start, 0))
    except OSError as error:
        raise NotReadable(f"cannot be read ({error.strerror})") from error


def _check_text(content: bytes, final: bool, start: int = 0) -> None:
    nul = content.find(b"\0")
    if nul >= 0:
        raise NotReadable(f"is not text (NUL byte at offset {start + nul})")
    try:
        codecs.getincrementaldecoder("utf-8")().decode(content, final)
    except UnicodeDecodeError as error:
        where = start + error.start
        raise NotReadable(
            f"is not UTF-8 text (byte 0x{content[error.start]:02x} at offset {where})"
        ) from None
