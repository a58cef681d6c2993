"""The file of a latency table: JSON with a checksum, gzipped where its name ends in ``.gz``."""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from searchspace.errors import UserError
from searchspace.files import write_file

FORMAT = "hwnas-latency-table"
VERSION = 3
WHAT = "latency table"
CHECKSUM = "checksum"


def write_values(path: Path, values: Mapping[str, Any]) -> None:
    """Write a table's content; whoever reads meanwhile sees the old file or the new one.

    Raises:
        UserError: when the folder cannot be written to.
    """
    whole = {"format": FORMAT, "version": VERSION, **values}
    whole[CHECKSUM] = checksum(whole)
    data = (json.dumps(whole, indent=1) + "\n").encode("utf-8")
    if path.suffix == ".gz":
        # Without a time the same table makes the same file.
        data = gzip.compress(data, mtime=0)
    write_file(path, lambda stream: stream.write(data))


def read_values(path: Path) -> dict[str, Any]:
    """Read what `write_values` wrote; `checksum` is not compared yet.

    Raises:
        UserError: when the file is absent, unreadable, truncated, foreign, or of another version.
    """
    try:
        values = json.loads(_content(path).decode("utf-8"))
    except FileNotFoundError:
        raise UserError(f"there is no {WHAT} at {path}; run `nas profile` to measure one") from None
    except (EOFError, zlib.error, gzip.BadGzipFile, ValueError, RecursionError):
        raise UserError(
            f"{path} is not a {WHAT}: it is truncated or of another kind; delete it and run "
            "`nas profile`"
        ) from None
    except OSError as error:
        raise UserError(
            f"{path} is not a {WHAT} that can be read: {error.strerror or error}"
        ) from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise UserError(f"{path} is no {WHAT}: it is of another kind; run `nas profile`")
    if values.get("version") != VERSION:
        raise UserError(
            f"{path} is a {WHAT} of version {values.get('version')}, this program reads version "
            f"{VERSION}; delete it and run `nas profile`"
        )
    return values


def _content(path: Path) -> bytes:
    data = path.read_bytes()
    return gzip.decompress(data) if path.suffix == ".gz" else data


def file_state(path: Path) -> tuple[int, ...] | None:
    """Return what differs whenever a file was written anew; None when there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size


def is_intact(values: Mapping[str, Any]) -> bool:
    """Return whether a file's content is what was written."""
    return values.get(CHECKSUM) == checksum(values)


def checksum(values: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the content without its checksum, in a form without spaces."""
    content = {name: value for name, value in values.items() if name != CHECKSUM}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
