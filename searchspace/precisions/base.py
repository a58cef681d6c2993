"""What a precision is: how weights are rounded in training, stored, and really run.

Shapes: N output rows, K columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from searchspace.precisions.activations import Activations

T = TypeVar("T")

Runtime = dict[str, Any]
"""What a layer keeps beside its stored tensors while it runs; see `kept`."""


class Precision(Protocol):
    """How a linear map's weight (and, where it says so, its input) is rounded.

    Stateless. Scales are computed from the weight that is passed in, so a slice of a shared weight
    and its extracted copy are rounded alike.
    """

    @property
    def name(self) -> str:
        """The name in `PRECISIONS`, genes and file names."""

    @property
    def bits(self) -> int:
        """Bits stored for each weight, scales aside."""

    @property
    def activations(self) -> Activations:
        """How inputs are rounded; maps that share it share the rounded input (`project`)."""

    def fake_weight(self, weight_NK: Tensor) -> Tensor:
        """Return the weight on this precision's grid; the gradient passes straight through."""

    def pack(self, weight_NK: Tensor) -> dict[str, Tensor]:
        """Return the tensors that are stored; ``"weight"`` is the main one. Works on meta.

        An empty dict means that the trained weight itself is stored.
        """

    def run(self, x: Any, stored: Mapping[str, Tensor], runtime: Runtime) -> Tensor:
        """Return `x @ weight.T` (..., N) from what `pack` returned.

        Args:
            x: (..., K) as `activations.quantize` returned it.
            stored: what `pack` returned.
            runtime: starts empty; for what is derived from `stored` once (see `kept`).
        """


def kept(runtime: Runtime, name: str, make: Callable[[], T]) -> T:
    """Return `runtime[name]`, made at the first use.

    It is made outside inference mode whoever asks first, and not kept while a program is being
    traced or shapes are being propagated: fake tensors must not outlive their trace.
    """
    if name in runtime:
        return runtime[name]
    if torch.compiler.is_compiling():
        return make()  # a change of modes would be recorded as a part of the program
    with torch.inference_mode(False), torch.no_grad():
        value = make()
        ordinary = type(torch.empty(0)) is Tensor
    if ordinary:
        runtime[name] = value
    return value
