"""Settings of the process that change how fast tensors are computed; apply before anything runs.

Two defaults make a network up to a third (memory) or two hundred times (denormals) slower, and
unequally for different operators, so that a search would rank operators by them:

- glibc hands freed activations back to the system, and every forward pass faults them in again;
- products of tiny numbers are computed by microcode. Worker threads inherit the flush-to-zero flag
  when they are started, so it must be set before the first parallel region.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from searchspace.errors import UserError

# mallopt(3): parameter, value. Values that a glibc version refuses are tried at its documented cap.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
MMAP_THRESHOLD_BYTES = 1 << 30
MMAP_THRESHOLD_CAP_BYTES = 32 << 20
TRIM_THRESHOLD_BYTES = (1 << 31) - 1
TOP_PAD_BYTES = 256 << 20

# More elements than one thread takes, so that every worker thread answers the denormal check.
DENORMAL_PROBE_ELEMENTS = 1 << 20
DENORMAL = 1e-39


@dataclass(frozen=True)
class ProcessSettings:
    """What `prepare_process` found it could apply.

    Args:
        num_threads: threads of one operator.
        allocator_tuned: freed memory stays in the process.
        flush_denormals: denormal numbers are flushed to zero in every thread.
        notes: one sentence for each setting that could not be applied.
    """

    num_threads: int
    allocator_tuned: bool
    flush_denormals: bool
    notes: tuple[str, ...] = ()


_applied: ProcessSettings | None = None


def prepare_process(num_threads: int | None = None) -> ProcessSettings:
    """Tune this process for inference; call it before the first tensor is computed.

    Calling it again is harmless: it only sets the number of threads anew, if one is given.

    Args:
        num_threads: threads of one operator; None keeps the number set before, or takes every
            processor this process may use.

    Raises:
        UserError: for a number of threads the machine does not have.
    """
    global _applied
    usable = usable_processors()
    if num_threads is not None and not 1 <= num_threads <= usable:
        raise UserError(
            f"num_threads={num_threads} is not between 1 and {usable}, the number of processors "
            "this process may use; choose a number in that range"
        )
    notes: list[str] = []
    allocator = _applied.allocator_tuned if _applied else tune_allocator()
    if not allocator:
        notes.append("the memory allocator is not glibc's, its trimming was left as it is")
    wanted = num_threads or (_applied.num_threads if _applied else usable)
    supported = torch.set_flush_denormal(True)
    if torch.get_num_threads() != wanted:
        torch.set_num_threads(wanted)
    flushed = supported and denormals_are_flushed()
    if not flushed:
        reason = "worker threads had already started" if supported else "the processor cannot"
        notes.append(f"denormal numbers are not flushed to zero: {reason}")
    _applied = ProcessSettings(wanted, allocator, flushed, tuple(notes))
    return _applied


def current_settings() -> ProcessSettings:
    """Return what was applied; without `prepare_process`, what an untouched process has."""
    if _applied is not None:
        return _applied
    return ProcessSettings(torch.get_num_threads(), False, False, ("prepare_process not called",))


@contextlib.contextmanager
def single_threaded() -> Iterator[None]:
    """Use one thread inside the block: on a busy machine small operators wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def usable_processors() -> int:
    """Return how many processors this process is allowed to run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def child_environment() -> dict[str, str]:
    """Return an environment in which a new Python process finds the packages that this one has."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def tune_allocator() -> bool:
    """Make glibc keep freed memory; returns whether it could be done."""
    foreign = any(name in os.environ.get("LD_PRELOAD", "") for name in ("jemalloc", "tcmalloc"))
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc" or foreign:
        return False
    mallopt = ctypes.CDLL(None).mallopt
    mapped = mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES) or mallopt(
        M_MMAP_THRESHOLD, MMAP_THRESHOLD_CAP_BYTES
    )
    trimmed = mallopt(M_TRIM_THRESHOLD, TRIM_THRESHOLD_BYTES)
    padded = mallopt(M_TOP_PAD, TOP_PAD_BYTES)
    return bool(mapped and trimmed and padded)


def denormals_are_flushed() -> bool:
    """Return whether every thread of a parallel operator flushes denormals to zero."""
    tiny = torch.full((DENORMAL_PROBE_ELEMENTS,), DENORMAL)
    return not bool((tiny * 0.5).view(torch.int32).any())
