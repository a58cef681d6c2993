"""Which implementation of an operation runs: the Triton kernel or plain PyTorch.

A package of an operation decides per call, and imports its kernels only then::

    if use_triton("norms", x, weight, implementation=implementation):
        from nas_kernels.norms.triton_kernel import rms_norm

        return rms_norm(x, weight, eps)
    return rms_norm_ref(x, weight, eps)
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import os
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Final

import torch
from torch import Tensor
from torch.utils._python_dispatch import (
    _get_current_dispatch_mode_stack,
    is_in_torch_dispatch_mode,
)

logger = logging.getLogger("nas_kernels")

AUTO, REFERENCE, TRITON = "auto", "reference", "triton"
CHOICES: Final = (AUTO, REFERENCE, TRITON)
VARIABLE: Final = "NAS_KERNELS"
"""Environment variable with one of `CHOICES`; an argument other than ``"auto"`` comes first.

Unlike the argument, ``"triton"`` in it is a wish: what has no kernel still runs.
"""
OLDEST_CHIP: Final = (8, 0)
"""Compute capability from which Triton's compiler is supported."""

PLAIN: Final = (Tensor, torch.nn.Parameter)
"""Types of tensors with memory of their own; others stand for something."""

_installed = importlib.util.find_spec("triton") is not None
_logged: set[tuple[str, str, str]] = set()
_without_kernels: set[str] = set()
_only_reference: ContextVar[bool] = ContextVar("only_reference", default=False)


@contextlib.contextmanager
def reference_only() -> Iterator[None]:
    """Run PyTorch's operations within, whatever is asked for.

    What they compute can be differentiated again, and is itself the measure of what kernels do.
    """
    token = _only_reference.set(True)
    try:
        yield
    finally:
        _only_reference.reset(token)


def triton_available() -> bool:
    """Whether triton is installed; it is not imported for the answer."""
    return _installed


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter: on the CPU, with numpy.

    Triton reads the variable when a kernel is defined, so it has to be set before any is imported.
    There, bf16 has to be cast to fp32 right after the load; launchers hand this value to a kernel
    as a constexpr.
    """
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


_INTERPRETABLE = _installed and interpreting()


def may_have_kernels(x: Tensor) -> bool:
    """Whether it is worth asking `use_triton` about tensors like this one: a matter of nothing.

    It is where kernels are compiled, and where they may be interpreted.
    """
    return x.is_cuda or _INTERPRETABLE


def use_triton(
    operation: str,
    *tensors: Tensor | None,
    implementation: str = AUTO,
    unsupported: str | None = None,
    prefer_reference: str | None = None,
) -> bool:
    """Return whether the kernel is to run; the choice is logged once for each operation.

    On ``"auto"`` kernels run for tensors on a CUDA device, where triton is installed and nothing
    speaks against them. The interpreter is used only where ``"triton"`` asks for it. No kernel runs
    where operations are recorded, counted or transformed: nobody would see what it computes.

    Args:
        operation: its name, for the log and for errors.
        tensors: what it is given; the first one's device decides. None is skipped.
        implementation: ``"auto"``, ``"reference"`` or ``"triton"``; ``"auto"`` leaves it to the
            environment variable `NAS_KERNELS`, and so to ``"auto"`` where that is not set.
        unsupported: why the kernel cannot take these arguments; None where it can.
        prefer_reference: why ``"auto"`` takes PyTorch though the kernel could; None where not.

    Raises:
        ValueError: when the choice is unknown.
        RuntimeError: when the argument asks for ``"triton"`` and it cannot be had.
    """
    if implementation == AUTO and tensors[0] is not None and not may_have_kernels(tensors[0]):
        # Kept short: on the CPU it is called for every operation of every token.
        if operation not in _without_kernels and not torch.compiler.is_compiling():
            _choice(implementation)
            _log(operation, "PyTorch", f"its tensors are on {tensors[0].device.type}")
            _without_kernels.add(operation)
        return False
    if implementation != TRITON and torch.compiler.is_compiling():
        return False
    choice = _choice(implementation)
    if choice == REFERENCE or _only_reference.get():
        _log(operation, "PyTorch", "asked for")
        return False
    given = [tensor for tensor in tensors if tensor is not None]
    obstacle = _obstacle(given, asked=choice == TRITON) or unsupported
    if choice == AUTO:
        obstacle = obstacle or prefer_reference
    if obstacle is None:
        where = "in the interpreter" if interpreting() else f"on {given[0].device.type}"
        _log(operation, "a Triton kernel", where)
        return True
    if implementation == TRITON:
        raise RuntimeError(f"{operation} cannot run as a Triton kernel: {obstacle}")
    _log(operation, "PyTorch", obstacle)
    return False


def _choice(implementation: str) -> str:
    source, choice = "implementation", implementation
    if implementation == AUTO:
        source, choice = VARIABLE, os.environ.get(VARIABLE, AUTO)
    if choice not in CHOICES:
        raise ValueError(f"{source}={choice!r} is unknown; choose one of {', '.join(CHOICES)}")
    return choice


def _obstacle(tensors: list[Tensor], asked: bool) -> str | None:
    """Return why no kernel can run on these tensors, whatever the operation."""
    watched = _watched(tensors)
    if watched is not None:
        return watched
    device = tensors[0].device
    elsewhere = next((tensor.device for tensor in tensors if tensor.device != device), None)
    if elsewhere is not None:
        return f"its tensors are on {device} and on {elsewhere}"
    if device.type != ("cpu" if asked and interpreting() else "cuda"):
        return f"its tensors are on {device.type}"
    if not triton_available():
        return "triton is not installed"
    if interpreting() and not asked:
        return "TRITON_INTERPRET is set"
    if any(tensor.dtype == torch.float64 for tensor in tensors):
        return "kernels compute in fp32 and were given float64"
    if device.type == "cuda" and _capability(device) < OLDEST_CHIP:
        return f"the GPU's compute capability is below {OLDEST_CHIP[0]}.{OLDEST_CHIP[1]}"
    return None


def _watched(tensors: list[Tensor]) -> str | None:
    """Return what follows operations here, to which a kernel would be invisible."""
    tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined]
    if tracing or torch.compiler.is_compiling():
        return "a graph is being captured"
    if torch._C._are_functorch_transforms_active():
        return "its function is being transformed"
    strange = next((type(tensor) for tensor in tensors if type(tensor) not in PLAIN), None)
    if strange is not None:
        return f"one of its tensors is a {strange.__name__}"
    return "operations are being intercepted" if _intercepted() else None


def _intercepted() -> bool:
    """Whether a mode follows operations; one with a true `lets_kernels_run` need not see them."""
    return is_in_torch_dispatch_mode() and not all(
        getattr(mode, "lets_kernels_run", False) for mode in _get_current_dispatch_mode_stack()
    )


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether a result of these tensors is to have a gradient."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def launching_on(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Return the context to launch kernels in: Triton launches on the current device only."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def num_multiprocessors(device: torch.device) -> int:
    """Return how many programs run at a time; a small number where kernels are interpreted."""
    if device.type != "cuda":
        return 4
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _log(operation: str, what: str, why: str) -> None:
    entry = operation, what, why
    # A graph that is being captured must not depend on what was logged before.
    if not torch.compiler.is_compiling() and entry not in _logged:
        _logged.add(entry)
        logger.info("%s runs as %s: %s", *entry)
