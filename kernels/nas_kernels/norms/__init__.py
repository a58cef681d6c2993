"""Normalisation of rows, alone or together with the residual sum before it.

Rows may be the leading features of wider ones: they are read by their stride and never copied. A
weight or bias that is longer than a row serves its leading part.

Shapes: D features of a row, on the last axis; D' >= D of weight and bias.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from nas_kernels.dispatch import AUTO, use_triton
from nas_kernels.norms.ref import layer_norm_ref, rms_norm_ref
from nas_kernels.precision import without_autocast

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "layer_norm",
    "layer_norm_ref",
    "rms_norm",
    "rms_norm_ref",
]

WIDEST = 16384
"""Features that a program of a kernel can hold."""


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5, implementation: str = AUTO) -> Tensor:
    """Return `x / sqrt(mean(x^2) + eps) * weight` over the last axis, of shape and dtype of `x`.

    Args:
        x: (..., D), any floating point; statistics are taken in fp32 (of float64 in float64).
        weight: (D',), of any floating-point dtype.
        eps: added to the mean square.
        implementation: ``"auto"``, ``"reference"`` or ``"triton"``; see `dispatch.use_triton`.

    Raises:
        ValueError: when the weight is shorter than a row.

    Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", equation 4.
    """
    return _normalise(x, None, weight, None, eps, False, implementation)[0]


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    implementation: str = AUTO,
) -> Tensor:
    """Return `(x - mean(x)) / sqrt(var(x) + eps) * weight + bias` over the last axis.

    Arguments, result and errors are those of `rms_norm`; the bias has the shape of the weight.

    Source: Ba, Kiros and Hinton 2016, "Layer Normalization", equation 4.
    """
    return _normalise(x, None, weight, bias, eps, True, implementation)[0]


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-5, implementation: str = AUTO
) -> tuple[Tensor, Tensor]:
    """Return `x + residual` and its `rms_norm`, in the wider of both dtypes.

    What is normalised is the sum as it is returned, after rounding. `residual` has the shape of
    `x`; arguments and errors are otherwise those of `rms_norm`.
    """
    normed, total = _normalise(x, residual, weight, None, eps, False, implementation)
    return total, normed


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    implementation: str = AUTO,
) -> tuple[Tensor, Tensor]:
    """Return `x + residual` and its `layer_norm`; see `add_rms_norm`."""
    normed, total = _normalise(x, residual, weight, bias, eps, True, implementation)
    return total, normed


def _normalise(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    centred: bool,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    """Return the norm, and what it is of."""
    width = x.shape[-1]
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None and (vector.ndim != 1 or vector.shape[0] < width):
            raise ValueError(
                f"{name} has shape {tuple(vector.shape)}, but rows have {width} features; give a "
                "vector of at least as many"
            )
    if residual is not None and residual.shape != x.shape:
        raise ValueError(
            f"residual has shape {tuple(residual.shape)}, but x has {tuple(x.shape)}; give the same"
        )
    unsupported = f"rows have {width} features, above {WIDEST}" if width > WIDEST else None
    weight, bias = weight[:width], None if bias is None else bias[:width]
    given = (x, residual, weight, bias)
    kernel = use_triton("norms", *given, implementation=implementation, unsupported=unsupported)
    if not kernel or x.numel() == 0:
        total = x if residual is None else x + residual
        return _plain(total, weight, bias, eps, centred), total
    from nas_kernels.norms.triton_kernel import Normalise

    normed, added = Normalise.apply(x, residual, weight, bias, eps, centred)
    return normed, x if added is None else added


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, centred: bool) -> Tensor:
    """PyTorch's own, which wants one dtype; the definition where there are several."""
    if any(t is not None and t.dtype != x.dtype for t in (weight, bias)):
        return layer_norm_ref(x, weight, bias, eps) if centred else rms_norm_ref(x, weight, eps)
    # Autocast would return fp32, whatever was given.
    with without_autocast(x):
        if centred:
            return F.layer_norm(x, weight.shape, weight, bias, eps)
        return F.rms_norm(x, weight.shape, weight, eps)
