"""Writing a file so that it is there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from searchspace.errors import UserError


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text; see `write_file`."""
    write_file(path, lambda stream: stream.write(text.encode("utf-8")))


def write_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file under a temporary name and rename it.

    Args:
        path: where the file shall be; its folder is made.
        write: is given the open temporary file.

    Raises:
        UserError: the folder cannot be written (read-only, full, or a file is in the way).
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        remove(temporary)
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; choose a folder that can be written "
            "and has room"
        ) from error


def remove(path: Path) -> None:
    """Remove a file if it is there and can be removed."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return
