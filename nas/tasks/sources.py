"""Which files a task reads."""

from __future__ import annotations

import glob
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from searchspace.errors import UserError

NOT_STDLIB = frozenset({"site-packages", "dist-packages", "__pycache__"})


@dataclass(frozen=True)
class SourceFile:
    """One file that a task may read.

    Args:
        path: where it is on this machine.
        name: its path below the folder or glob that was given, with forward slashes; the same on
            every machine, so splits are made from it.
        num_bytes: its size.
    """

    path: Path
    name: str
    num_bytes: int


def stdlib_files(data: str | None = None) -> list[SourceFile]:
    """Return the sources of the running Python's standard library, sorted by name.

    Args:
        data: not used; every task's finder takes it.

    Raises:
        UserError: this Python keeps no sources on disk (an embedded or zipped one).
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = (path for path in _walk(root) if path.suffix == ".py")
    files = _source_files(paths, root)
    if not files:
        raise UserError(
            f"task=stdlib found no Python sources in {root}; use task=text with data=PATH"
        )
    return files


def user_files(data: str | None) -> list[SourceFile]:
    """Return the non-empty files that a path, folder or glob of the user names, sorted by name.

    Hidden entries of a folder and packages installed in it are left out.

    Args:
        data: a file, a folder or a glob (``**`` goes through folders, ``~`` is the home folder).

    Raises:
        UserError: nothing matches, all that matches is empty, or the path cannot be looked up.
    """
    try:
        files = _matching_files(os.path.expanduser(data or ""))
    except (OSError, ValueError) as error:
        raise UserError(f"data={data!r} cannot be looked up ({error}); give another path") from None
    if not files:
        raise UserError(
            f"no file matches data={data!r}; give a file, a folder or a quoted glob such as "
            "'notes/**/*.txt'"
        )
    full = [file for file in files if file.num_bytes > 0]
    if not full:
        what = f"{files[0].path} is" if len(files) == 1 else f"all {len(files)} files are"
        raise UserError(f"{what} empty (data={data!r}); give files that hold text")
    return full


FINDERS: dict[str, Callable[[str | None], list[SourceFile]]] = {
    "stdlib": stdlib_files,
    "text": user_files,
    "tokens": user_files,
}
"""How each language modelling task finds its files, given ``TaskConfig.data``."""


def files_below(folder: Path) -> list[SourceFile]:
    """Return the non-empty files of a folder, hidden entries left out, sorted by name."""
    return [file for file in _source_files(_walk(folder), folder) if file.num_bytes > 0]


def _matching_files(pattern: str) -> list[SourceFile]:
    path = Path(pattern)
    if path.is_dir():
        return _source_files(_walk(path), path)
    if path.exists():
        return _source_files([path], path.parent)
    return _source_files(_expand(pattern), _fixed_part(pattern))


def _source_files(paths: Iterable[Path], root: Path) -> list[SourceFile]:
    files = {
        path: SourceFile(path, path.relative_to(root).as_posix(), path.stat().st_size)
        for path in paths
        if path.is_file()
    }
    return sorted(files.values(), key=lambda file: file.name)


def _walk(root: Path) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [n for n in subfolders if n not in NOT_STDLIB and not n.startswith(".")]
        yield from (Path(folder, name) for name in names if not name.startswith("."))


def _expand(pattern: str) -> Iterator[Path]:
    """Files that match; a folder that matches stands for what is in it."""
    for match in glob.iglob(pattern, recursive=True):
        path = Path(match)
        if path.is_dir() and "**" not in pattern:
            yield from _walk(path)
        else:
            yield path


def _fixed_part(pattern: str) -> Path:
    """Return the leading folders of a glob that hold no wildcard."""
    parts = Path(pattern).parts[:-1]
    magic = [index for index, part in enumerate(parts) if glob.has_magic(part)]
    return Path(*parts[: magic[0]] if magic else parts)
