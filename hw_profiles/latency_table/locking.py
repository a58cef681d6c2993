"""Locks between processes: one writer of a file at a time, one profiler of a table at a time.

A lock is a hidden file beside what it guards, locked by the kernel, so that it is free again
however its process ends. On file systems that cannot lock, that a second file is there is the lock.
Both are removed when the lock is given back.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from searchspace.errors import UserError

WAIT_S = 30.0
"""How long a writer waits for others; writing a table takes a fraction of a second."""
POLL_S = 0.02
CANNOT_LOCK = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
"""What file systems without locks answer."""

_profiling: set[tuple[Path, int, int]] = set()


@contextlib.contextmanager
def file_lock(path: Path, wait_s: float = WAIT_S) -> Iterator[None]:
    """Be the only one who writes `path` inside the block; the lock does not nest.

    Args:
        path: the file, which need not exist; its folder is made.
        wait_s: how long to wait for another writer.

    Raises:
        UserError: when the folder cannot be written to, or another process keeps the lock.
    """
    lock = _beside(path, "lock")
    deadline = time.monotonic() + wait_s
    while (held := _acquired(lock)) is None:
        if time.monotonic() > deadline:
            raise UserError(
                f"another program{_holder(lock)} has been writing {path} for more than "
                f"{wait_s:g} s; end it, then run the same command again"
            )
        time.sleep(POLL_S)
    try:
        yield
    finally:
        held.release()


@contextlib.contextmanager
def one_profiler(path: Path) -> Iterator[None]:
    """Be the only one who measures the table at `path` inside the block; nests within a thread.

    Raises:
        UserError: at once, when another profiler is at it or the folder cannot be written to.
    """
    key = (path.resolve(), os.getpid(), threading.get_ident())
    if key in _profiling:
        yield
        return
    lock = _beside(path, "profiling")
    held = _acquired(lock)
    if held is None:
        raise UserError(
            f"another profiler{_holder(lock)} is measuring {path}; two at once would disturb each "
            "other's timings; wait for it, then run the same command again"
        )
    _profiling.add(key)
    try:
        yield
    finally:
        _profiling.discard(key)
        held.release()


def _beside(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{kind}")


def _holder(lock: Path) -> str:
    """Return `` (pid N)`` for the process that holds a lock, or nothing."""
    pid = _pid(lock) or _pid(_second_file(lock))
    return f" (pid {pid})" if pid else ""


def _pid(lock: Path) -> int:
    try:
        text = lock.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return 0
    return int(text) if text.isdigit() else 0


@dataclass(frozen=True)
class _Held:
    """A lock that is ours."""

    lock: Path
    descriptor: int

    def release(self) -> None:
        """Give it back; the file goes first, so that nobody locks a file that is about to go."""
        with contextlib.suppress(OSError):
            self.lock.unlink(missing_ok=True)
        # A child that was forked meanwhile shares the lock: closing alone would not give it back.
        with contextlib.suppress(OSError):
            fcntl.flock(self.descriptor, fcntl.LOCK_UN)
        os.close(self.descriptor)


def _acquired(lock: Path) -> _Held | None:
    """Return a lock, or None when it is another's.

    Raises:
        UserError: when its file cannot be made.
    """
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        held = _kernel_lock(lock)
        if held is not None:
            os.truncate(held.descriptor, 0)
            os.pwrite(held.descriptor, str(os.getpid()).encode(), 0)
        return held
    except OSError as error:
        raise UserError(
            f"cannot write {lock.parent}: {error.strerror or error}; choose another folder or make "
            "room"
        ) from None


def _kernel_lock(lock: Path) -> _Held | None:
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Whoever had it may have removed the file between our opening and our locking it.
        if os.path.samestat(os.fstat(descriptor), os.stat(lock)):
            return _Held(lock, descriptor)
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError as error:
        os.close(descriptor)
        if error.errno not in CANNOT_LOCK:
            raise
        lock.unlink(missing_ok=True)
        return _only_maker(_second_file(lock))
    os.close(descriptor)
    return None


def _second_file(lock: Path) -> Path:
    return lock.with_name(f"{lock.name}.pid")


def _only_maker(lock: Path) -> _Held | None:
    """Lock by being the one who makes the file; what a killed process left behind is removed."""
    try:
        return _Held(lock, os.open(lock, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644))
    except FileExistsError:
        pid = _pid(lock)
        if pid and not _is_running(pid):
            lock.unlink(missing_ok=True)
        return None


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
