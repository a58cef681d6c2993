"""PyTorch's compiler: a whole sub-block or network as one graph with fused kernels."""

from __future__ import annotations

import functools
import logging
import re
import subprocess
import sysconfig
import time
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor, nn

from hw_profiles.backends.base import Call, UnsupportedError
from hw_profiles.backends.compiled.graphs import capture
from hw_profiles.backends.eager import EagerBackend
from hw_profiles.clock import Clock
from hw_profiles.workload import Workload
from searchspace.errors import UserError

MANY_MODULES = 20
"""Compiled modules from which on the log says what they cost."""

log = logging.getLogger(__name__)


class CompiledBackend:
    """`torch.export` and Inductor with freezing and static shapes, on the CPU.

    The graph is captured by `torch.export` and compiled by `torch._inductor.compile`: the compiler
    behind `torch.compile`, which itself finds its code by guards at every call (50 us of 94 for a
    decode step of attention; a network pays that once, a sum over a table would for each layer) and
    from the ninth module of a class on silently runs eagerly. Here the graph is whole, or there is
    an error. AOTInductor takes twice as long to compile, the second time too, and its decode steps
    took 80 to 110 us where these take 45 to 50.

    A decode step is compiled for one context. It is run from the same state each time: caches are
    written in the same place, and what replaces a fixed-size state is dropped.

    PyTorch keeps compiled kernels on disk (``TORCHINDUCTOR_CACHE_DIR``): a sub-block takes one to
    ten seconds the first time and less than one after that.

    Source: Ansel et al. 2024, "PyTorch 2", section 4 (TorchInductor).
    """

    name = "compiled"
    summary = "PyTorch's compiler (Inductor), fused kernels"

    def __init__(self) -> None:
        self._num_compiled = 0
        self._compiling_s = 0.0

    def unavailable(self) -> str:
        """Return what is missing: a C++ compiler, or Python's headers, which the kernels need."""
        if not _compiler():
            return "there is no C++ compiler; install g++, or name one in the variable CXX"
        if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
            return "Python's C headers are missing; install python3-dev or its like"
        return ""

    def version(self) -> str:
        """Return the compilers and the mode; `Device.torch` says which Inductor it is."""
        return f"inductor, {_compiler()}, freezing"

    def accelerator(self) -> str:
        """Return an empty text: none is used."""
        return ""

    def prepare(self, module: nn.Module, inputs: Tensor, workload: Workload) -> Call:
        """Return a call; see `Backend.prepare`. Compiled for the present number of threads."""
        began = time.monotonic()
        try:
            call = _compile(module, inputs, workload)
        except UserError:
            raise
        # Tracing and generating code run through all of PyTorch; there is no common exception.
        except Exception as error:
            raise UnsupportedError(
                f"{_describe(module)} cannot be compiled ({_first_line(error)}); "
                "use the backend 'eager' for it, or leave it out of the space"
            ) from error
        self._report(time.monotonic() - began)
        return call

    def _report(self, seconds: float) -> None:
        self._num_compiled += 1
        self._compiling_s += seconds
        if self._num_compiled == MANY_MODULES:
            log.warning(
                "compiling %d modules took %.0f s, and there are more to come at %.1f s each; "
                "they are cached, so the next run is faster",
                *(MANY_MODULES, self._compiling_s, self._compiling_s / MANY_MODULES),
            )

    def sentinel(self) -> Call:
        """Return the matrix product of `EagerBackend`, which compiled graphs call, too."""
        return EagerBackend().sentinel()

    def clock(self) -> AbstractContextManager[Clock]:
        """Return the system's clock."""
        return EagerBackend().clock()


def _compile(module: nn.Module, inputs: Tensor, workload: Workload) -> Call:
    # Imported here: it takes a second. Freezing has no effect unless it is set while a graph is
    # traced; a pool of compiling processes would still be starting when the timing begins. The
    # threads are the present ones anyway, but this makes them a part of the cache's key.
    from torch._inductor import compile as inductor
    from torch._inductor import config

    graph, arguments = capture(module, inputs, workload)
    settings = {
        "freezing": True,
        "compile_threads": 1,
        "cpp.threads": torch.get_num_threads(),
    }
    with config.patch(settings), torch.inference_mode(False), torch.no_grad():
        compiled = inductor(graph, [*arguments])
        compiled(*arguments)
    return lambda: compiled(*arguments)[0]


def _describe(module: nn.Module) -> str:
    spec = getattr(module, "spec", None)
    return getattr(spec, "key", type(module).__name__)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


@functools.cache
def _compiler() -> str:
    """Return the name and version of the C++ compiler that kernels are built with; empty without.

    `version` is asked often, and finding it out runs the compiler.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        path = get_cpp_compiler()
        text = subprocess.run([path, "--version"], capture_output=True, text=True, check=True)
    except (InvalidCxxCompiler, OSError, subprocess.CalledProcessError):
        return ""
    found = re.search(r"\d+(\.\d+)+", text.stdout)
    return f"{Path(path).name} {found.group() if found else 'of unknown version'}"
