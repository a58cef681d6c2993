"""How the input of a linear map is rounded: not at all, or with a scale per token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from nas_kernels.int8_linear import (
    QuantizedActivations,
    fake_quantize_activations,
    quantize_activations,
)


class RoundedActivations(NamedTuple):
    """Activations that are on their grid already, in floating point."""

    values: Tensor


class Activations(Protocol):
    """The rounding of inputs; each method leaves alone what it returned before."""

    def round(self, x: Any) -> Any:
        """Return what `values` takes: `x` on its grid, differentiable (straight-through)."""

    def values(self, x: Any) -> Tensor:
        """Return the floating point tensor (..., K) of a rounded or plain input."""

    def quantize(self, x: Any) -> Any:
        """Return the form that `Precision.run` takes."""


class FloatActivations:
    """Inputs stay as they are."""

    def round(self, x: Tensor) -> Tensor:
        """Return `x`."""
        return x

    def values(self, x: Tensor) -> Tensor:
        """Return `x`."""
        return x

    def quantize(self, x: Tensor) -> Tensor:
        """Return `x`."""
        return x


class PerTokenActivations:
    """A grid with one scale per token, so that tokens do not depend on each other.

    Args:
        fake_quantize: rounds each token to its grid, in floating point.
        quantize: returns values and scales.
        quantized: the type of what `quantize` returns.
    """

    def __init__(
        self,
        fake_quantize: Callable[[Tensor], Tensor],
        quantize: Callable[[Tensor], Any],
        quantized: type,
    ) -> None:
        self._fake_quantize, self._quantize = fake_quantize, quantize
        self._quantized = quantized

    def round(self, x: Tensor | RoundedActivations) -> RoundedActivations:
        """Round each token to its grid, in floating point."""
        if isinstance(x, RoundedActivations):
            return x
        return RoundedActivations(self._fake_quantize(x))

    def values(self, x: Tensor | RoundedActivations) -> Tensor:
        """Return the rounded values."""
        return self.round(x).values

    def quantize(self, x: Any) -> Any:
        """Return rounded values and scales."""
        return x if isinstance(x, self._quantized) else self._quantize(x)


FLOAT = FloatActivations()
INT8 = PerTokenActivations(fake_quantize_activations, quantize_activations, QuantizedActivations)
