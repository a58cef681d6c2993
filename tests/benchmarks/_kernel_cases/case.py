"""What is measured: an operation on one shape, and everything that can compute it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nas_kernels.dispatch import AUTO, TRITON

Inputs = dict[str, Any]
Results = Sequence[Tensor]
Build = Callable[[Inputs], Callable[[], Results]]
OURS = "ours"
GRADIENT = "dy"
"""Name of the input that is the gradient of the first result."""


@dataclass(frozen=True)
class Contender:
    """One way to compute a case.

    Attributes:
        name: in tables; `OURS` is the project's.
        build: takes inputs and returns what is timed; preparing weights happens here.
        missing: why it cannot run here; None where it can.
        same: whether it computes the same function. What does not is context, never compared.
        wanted: inputs it has gradients for, where they are not the case's.
        bound: RMS ratio to the reference that it may have, where it is not the case's.
        compiled: whether `torch.compile` is in it.
    """

    name: str
    build: Build
    missing: str | None = None
    same: bool = True
    wanted: tuple[str, ...] | None = None
    bound: float | None = None
    compiled: bool = False


@dataclass(frozen=True)
class Case:
    """An operation on one shape.

    Attributes:
        family: of operations, which share a time budget.
        name: unique in the family.
        inputs: draws new ones: tensors by name, one of them `GRADIENT` where there is a backward.
        reference: computes the case from inputs that were cast to float64 (or fp32).
        contenders: `OURS` first.
        min_bytes: every input read once and every result written once.
        flops: of the products.
        wanted: inputs whose gradients are computed too; none where forward only.
        priority: 0 for what decides a target; the larger the later.
        unit: in what products are taken, ``"bf16"`` or ``"int8"``.
        targets: names of the targets it counts for.
        bound: RMS ratio to the reference from which on results are wrong.
    """

    family: str
    name: str
    inputs: Callable[[], Inputs]
    reference: Callable[[Inputs], Results]
    contenders: tuple[Contender, ...]
    min_bytes: float
    flops: float = 0.0
    wanted: tuple[str, ...] = ()
    priority: int = 1
    unit: str = "bf16"
    targets: tuple[str, ...] = ()
    bound: float = 2e-2

    @property
    def id(self) -> str:
        """Name among all cases."""
        return f"{self.family}/{self.name}"


@dataclass(frozen=True)
class Setting:
    """Where cases run, and how large they are.

    Attributes:
        device: of all tensors.
        quick: small shapes that only show that everything runs.
    """

    device: torch.device
    quick: bool

    @property
    def kernel(self) -> str:
        """The implementation to ask for: on a GPU nothing but the kernel will do."""
        return TRITON if self.device.type == "cuda" else AUTO

    def normal(
        self, *shape: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16
    ) -> Tensor:
        """Draw normal numbers."""
        return (torch.randn(*shape, device=self.device) * scale).to(dtype)

    def compiled(self, name: str, function: Callable[..., Any], build: Callable[..., Any],
                 **options: Any) -> Contender:  # fmt: skip
        """Return a contender by `torch.compile`.

        Args:
            name: in tables.
            function: compiled once for all sets of inputs.
            build: takes the compiled function and inputs.
            options: of the contender.
        """
        missing = None if self.device.type == "cuda" else "torch.compile is timed on GPUs only"
        fast = torch.compile(function, dynamic=False) if missing is None else function
        return Contender(
            name, lambda inputs: build(fast, inputs), missing, compiled=True, **options
        )

    def needs(self, *packages: str) -> str | None:
        """Return why packages' kernels cannot run here; None where they can."""
        for package in packages:
            if importlib.util.find_spec(package) is None:
                return f"{package} is not installed"
        return None if self.device.type == "cuda" else "runs on GPUs only"

    def gpu(self) -> str | None:
        """Return why what needs a GPU cannot run."""
        return None if self.device.type == "cuda" else "runs on GPUs only"


def nbytes(*tensors: Tensor) -> int:
    """Return the bytes of tensors' elements."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
