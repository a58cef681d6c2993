"""Compiles kernels for a GPU that need not be there, and reads what they would use of it.

Run as a program, in a process of its own without TRITON_INTERPRET::

    python tests/kernels/aot.py FAMILIES CAPABILITY PACE

It calls the operations of `tests.kernels.aot_cases` on CPU tensors, forward and backward. Every
launch becomes a compilation for that compute capability, so nothing is computed: outputs hold
whatever memory held. Every kernel compiled is written to stdout as one line of JSON.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MULTIPROCESSORS = 132
"""Of the GPU that is assumed: launchers cut work into parts for so many."""


@dataclass(frozen=True)
class Kernel:
    """What one compiled variant of a kernel needs.

    Attributes:
        case: of `aot_cases` that launched it.
        name: of the module's folder and the function.
        shared_bytes: shared memory of a block.
        registers: of a thread.
        spilled_bytes: of a thread's stack: registers that did not fit.
        num_warps: of a block.
    """

    case: str
    name: str
    shared_bytes: int
    registers: int
    spilled_bytes: int
    num_warps: int


def obstacle() -> str | None:
    """Return why nothing can be compiled here; None where it can."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return "triton is not installed"
    for tool in ("ptxas", "cuobjdump"):
        try:
            command = [_tool(spec.origin, tool), "--version"]
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            return f"triton's own {tool} does not run: {error}"
    return None


def _tool(triton: str, name: str) -> Path:
    return Path(triton).parent / "backends" / "nvidia" / "bin" / name


@functools.cache
def compiled(families: str, capability: int, pace: str) -> list[Kernel]:
    """Compile the cases of some families in a new process.

    Args:
        families: keys of `aot_cases.FAMILIES` with commas, or ``"all"``.
        capability: 90 for compute capability 9.0.
        pace: of the cases, see there; or ``"all"``. ``"candidates"`` compiles whatever
            launchers would choose from, else only what is the default.
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_", "NAS_"))}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    cache = os.environ.get("TRITON_CACHE_DIR")
    if cache is not None:
        environment["TRITON_CACHE_DIR"] = cache
    # The modules above come first, then those of the process that asks.
    paths = (str(ROOT), str(ROOT / "kernels"), *sys.path)
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    command = [sys.executable, __file__, families, str(capability), pace]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}")
    return [Kernel(**json.loads(line)) for line in done.stdout.splitlines()]


class _Driver:
    """What Triton asks of a GPU's driver before it launches anything."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def map_python_to_cpp_type(self, name: str) -> str:
        return name


def _main(families: str, capability: int, pace: str) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from nas_kernels import dispatch, tuning

    driver.set_active(_Driver(GPUTarget("cuda", capability, 32)))
    # Before any operation is imported, as they take these by name.
    dispatch._INTERPRETABLE = True
    dispatch._obstacle = lambda tensors, asked: None  # type: ignore[assignment]
    dispatch.num_multiprocessors = lambda device: MULTIPROCESSORS  # type: ignore[assignment]
    if pace == "candidates":
        tuning.wanted = lambda: True  # type: ignore[assignment]
        tuning.choose = _all_of_them
    from tests.kernels.aot_cases import FAMILIES

    names = FAMILIES if families == "all" else families.split(",")
    run, seen, found = JITFunction.run, set(), []

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        name = f"{self.fn.__module__.split('.')[1]}.{self.fn.__name__}"
        if (name, kernel.hash) not in seen:
            seen.add((name, kernel.hash))
            found.append((name, kernel))
        return kernel

    JITFunction.run = compile_only
    for case in (case for name in names for case in FAMILIES[name]):
        if pace == "all" or pace in case.paces:
            case.run()
        for name, kernel in found:
            tool = _tool(triton.__file__, "cuobjdump")
            print(json.dumps(asdict(_measured(tool, case.name, name, kernel))), flush=True)
        found.clear()


def _all_of_them(operation: str, key: Any, candidates: Sequence[Any], run: Any) -> Any:
    for candidate in candidates:
        run(candidate)
    return candidates[0]


def _measured(tool: Path, case: str, name: str, kernel: Any) -> Kernel:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    numbers = dict(_numbers(usage))
    return Kernel(
        case,
        name,
        kernel.metadata.shared,
        numbers["REG"],
        numbers["STACK"] + numbers["LOCAL"],
        kernel.metadata.num_warps,
    )


def _numbers(usage: str) -> Iterator[tuple[str, int]]:
    for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage):
        yield name, int(number)


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
