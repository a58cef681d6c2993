"""Writing files so that nothing is ever left half-written."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from searchspace.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


def write_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a binary file under a temporary name, then rename it into place.

    Args:
        path: where the file shall be; its folder is made.
        write: is given the open temporary file.

    Raises:
        UserError: when the folder cannot be written to or is full.
    """

    def write_and_sync(temporary: Path) -> None:
        with temporary.open("wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())

    _replace(path, write_and_sync)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file under a temporary name, then rename it into place.

    Raises:
        UserError: when the folder cannot be written to or is full.
    """
    write_file(path, lambda stream: stream.write(text.encode("utf-8")))


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file under a temporary name, then rename it into place.

    Raises:
        UserError: when the folder cannot be written to or is full.
    """
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_toml(path: Path, what: str) -> dict[str, Any]:
    """Read a TOML file.

    Args:
        path: the file.
        what: it is called so when it is absent.

    Raises:
        UserError: when it is absent or no TOML.
    """
    if not path.is_file():
        raise UserError(f"there is no {what} {str(path)!r}")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid TOML: {error}") from None


def read_json(path: Path, what: str) -> Any:
    """Read a JSON file.

    Args:
        path: the file.
        what: what it should be, for the error message.

    Raises:
        UserError: when it is absent or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"there is no {what} at {path}") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise UserError(f"{path} is not a {what}: it is truncated or of another kind") from None


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file under a temporary name, then rename it into place.

    Raises:
        UserError: when the folder cannot be written to or is full.
    """
    from safetensors.torch import save_file

    _replace(path, lambda temporary: save_file(dict(tensors), temporary))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        UserError: when it is absent, truncated or of another kind.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"there is no weights file {path}") from None
    except SafetensorError as error:
        raise UserError(
            f"{path} is not a whole safetensors file ({error}); copy or export it again"
        ) from None


def temporary_name(path: Path) -> Path:
    """Return the name under which this process prepares `path`, beside it."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes were preparing in a folder; living ones are left alone."""
    for path in folder.rglob(".*.tmp"):
        process = path.suffixes[-2].removeprefix(".") if len(path.suffixes) > 1 else ""
        if process.isdigit() and not _is_running(int(process)):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                remove(path)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    temporary = temporary_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; choose another folder or make room"
        ) from None
    finally:
        remove(temporary)


def remove(path: Path) -> None:
    """Remove a file if it is there and can be removed."""
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
