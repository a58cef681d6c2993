"""Configurations of kernels that were measured on this device, for launchers that ask.

A launcher lists what it could run with, its default first, and how to run it::

    tiles = candidates[0]
    if wanted():
        key = rounded(tokens, rows, columns, x.dtype)
        tiles = choose("int4_linear", key, candidates, partial(launch, x, weight))
    return launch(x, weight, tiles)

Nothing is measured unless the environment variable `NAS_KERNELS_TUNING` names a file. Then what the
file does not hold yet is measured once, when it is first asked for, and written to it; the file has
a table for each device and version of Triton, so one file may serve many. Without the variable, on
a CPU, in a graph that is being captured or traced, and for what cannot be measured, it is the
default.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import statistics
import tempfile
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

import torch

from nas_kernels.dispatch import interpreting, triton_available
from nas_kernels.launching import power_of_two

logger = logging.getLogger("nas_kernels")

VARIABLE: Final = "NAS_KERNELS_TUNING"
"""Environment variable: path of the file with what was measured."""
SAMPLES = 7
FLUSHED_BYTES = 1 << 28
"""Overwritten before every sample, so that no candidate finds its inputs in the cache."""
FLUSHES = 4
"""How often: an operation of several kernels takes as long to launch as the device is busy."""

Config = TypeVar("Config")
Key = tuple[int | str | bool, ...]
"""What a choice depends on."""
Table = dict[str, dict[str, Any]]
_tables: dict[Path, dict[str, Table]] = {}
_chosen: dict[tuple[Hashable, ...], int] = {}


@functools.cache
def wanted() -> bool:
    """Whether to ask `choose` at all; the environment is read once, launches are many."""
    return bool(os.environ.get(VARIABLE))


def rounded(*values: int | str | bool | torch.dtype) -> Key:
    """Return a key: numbers become powers of two, so that nearby sizes share a choice."""
    return tuple(
        str(x).removeprefix("torch.") if isinstance(x, torch.dtype)
        else power_of_two(x) if isinstance(x, int) and not isinstance(x, bool)
        else x
        for x in values
    )  # fmt: skip


def choose(
    operation: str,
    key: Key,
    candidates: Sequence[Config],
    run: Callable[[Config], object],
) -> Config:
    """Return the candidate that was fastest on the current CUDA device, or the first one.

    Args:
        operation: its name.
        key: what the choice depends on: sizes, rounded where nearby ones may share a choice, and
            dtypes by name.
        candidates: configurations, NamedTuples of numbers; the default first.
        run: launches the kernel with a candidate; is called many times, so it may write only what
            it does not read. It may raise where the device has too few registers or too little
            shared memory.

    Raises:
        ValueError: when there are no candidates, or the file is no tuning file.
    """
    if not candidates:
        raise ValueError(f"{operation} has no configuration to choose from; give one at least")
    path, candidates = os.environ.get(VARIABLE), list(dict.fromkeys(candidates))
    if not path or len(candidates) == 1 or not torch.cuda.is_available() or interpreting():
        return candidates[0]
    device = torch.cuda.current_device()
    name = " ".join(map(str, key))
    place = (path, device, operation, name)
    index = _chosen.get(place)
    if index is not None and index < len(candidates):
        return candidates[index]
    if torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
        return candidates[0]
    table = _table(Path(path)).setdefault(_device_name(device), {}).setdefault(operation, {})
    index = _index(candidates, table.get(name))
    if index is None:
        index = _fastest(operation, name, candidates, run)
        table[name] = _as_json(candidates[index])
        _write(Path(path))
    _chosen[place] = index
    return candidates[index]


def forget() -> None:
    """Read the environment and files again, and measure again what they do not hold."""
    wanted.cache_clear()
    _tables.clear()
    _chosen.clear()


def _fastest(
    operation: str, name: str, candidates: Sequence[Config], run: Callable[[Config], object]
) -> int:
    """Return the number of the fastest candidate; the first where none can be run."""
    times: dict[int, float] = {}
    flushed = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device="cuda")
    for index, candidate in enumerate(candidates):
        try:
            times[index] = _milliseconds(candidate, run, flushed)
        except Exception as error:
            triton_own = type(error).__module__.split(".")[0] == "triton"
            if not triton_own and not isinstance(error, RuntimeError | ValueError):
                raise
            logger.debug("%s cannot run with %s: %s", operation, candidate, error)
    best = min(times, key=lambda index: times[index], default=0)
    if times:
        logger.info("%s %s is fastest with %s: %.4f ms, against %.4f by default", operation, name,
                    candidates[best], times[best], times.get(0, float("nan")))  # fmt: skip
    return best


def _milliseconds(
    candidate: Config, run: Callable[[Config], object], flushed: torch.Tensor
) -> float:
    for _ in range(2):  # the first one compiles
        run(candidate)
    samples = []
    for _ in range(SAMPLES):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # Long enough for the launches behind it to be queued before it ends.
        for _ in range(FLUSHES):
            flushed.zero_()
        start.record()
        run(candidate)
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end))
    return statistics.median(samples)


def _as_json(candidate: Any) -> Any:
    return json.loads(json.dumps(candidate._asdict()))


def _index(candidates: Sequence[Any], stored: Any) -> int | None:
    """Return which candidate was stored; None where it is none any more."""
    if stored is None:
        return None
    for index, candidate in enumerate(candidates):
        if _as_json(candidate) == stored:
            return index
    return None


def _device_name(device: int) -> str:
    properties, version = torch.cuda.get_device_properties(device), "none"
    if triton_available():
        import triton

        version = triton.__version__
    return f"{properties.name}, compute {properties.major}.{properties.minor}, triton {version}"


def _table(path: Path) -> dict[str, Table]:
    if path not in _tables:
        _tables[path] = _read(path)
    return _tables[path]


def _read(path: Path) -> dict[str, Table]:
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{VARIABLE}={path} is no tuning file: {error}") from error
    tables = isinstance(found, dict) and all(
        isinstance(table, dict) and all(isinstance(keys, dict) for keys in table.values())
        for table in found.values()
    )
    if not tables:
        raise ValueError(f"{VARIABLE}={path} is no tuning file; name another or delete it")
    return found


def _write(path: Path) -> None:
    """Write the file whole, with what other processes have added to it since."""
    merged = _read(path)
    for device, operations in _tables[path].items():
        for operation, keys in operations.items():
            merged.setdefault(device, {}).setdefault(operation, {}).update(keys)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, prefix=path.name, delete=False, encoding="utf-8"
        ) as file:
            json.dump(merged, file, indent=1, sort_keys=True)
        os.replace(file.name, path)
    except OSError as error:
        logger.warning("what was tuned is not kept: %s", error)
