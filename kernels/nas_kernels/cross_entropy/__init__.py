"""Cross-entropy of a linear map that never holds all logits.

Shapes: d <= D inputs and v <= V classes, out of those of a maximal weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nas_kernels.cross_entropy import chunked
from nas_kernels.cross_entropy.ref import linear_cross_entropy_ref
from nas_kernels.dispatch import AUTO, use_triton, wants_gradient
from nas_kernels.precision import product_dtype

__all__ = ["linear_cross_entropy", "linear_cross_entropy_ref"]

CHUNK_BYTES = 1 << 28
"""Logits held at a time, unless told otherwise."""
REDUCTIONS = ("mean", "sum")


def linear_cross_entropy(
    x: Tensor,
    weight_VD: Tensor,
    targets: Tensor,
    bias_V: Tensor | None = None,
    num_classes: int | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    chunk_rows: int | None = None,
    implementation: str = AUTO,
) -> Tensor:
    """Return `cross_entropy(x W[:v, :d]^T + b[:v], targets)`, a scalar in fp32 or float64.

    Logits are computed in autocast's dtype where that is on, else in the widest that is given, and
    held for `chunk_rows` rows at a time; softmax and losses are computed in fp32 at least.
    Gradients are computed together with the loss: where none is needed, call it under
    `torch.no_grad`. They cannot be differentiated again.

    Args:
        x: (..., d), any rows with one stride; others are copied.
        weight_VD: W, maximal or a view of it. Its gradient is zero outside of [:v, :d].
        targets: (...), int64, below v or `ignore_index`.
        bias_V: b.
        num_classes: v; all V rows of the weight where it is None.
        ignore_index: target of rows that do not count.
        reduction: ``"mean"`` over the rows that count (NaN where none does), or ``"sum"``.
        chunk_rows: rows of logits at a time; as many as `CHUNK_BYTES` hold where it is None.
        implementation: of the step from logits to losses and their gradients; ``"auto"``,
            ``"reference"`` (PyTorch, in the same chunks) or ``"triton"``.

    Raises:
        ValueError: when sizes or the reduction do not fit.

    Source: Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models", section 4
    (what is to be avoided; here with whole rows of logits, a chunk of them).
    """
    v = weight_VD.shape[0] if num_classes is None else num_classes
    _check(x, weight_VD, targets, bias_V, v, reduction, chunk_rows)
    tensors = (x, weight_VD, bias_V)
    dtype = product_dtype(x, weight_VD)
    step = chunked.cross_entropy_
    if use_triton("cross_entropy", *tensors, targets, implementation=implementation):
        from nas_kernels.cross_entropy.triton_kernel import cross_entropy_ as step
    settings = chunked.Settings(
        num_classes=v,
        ignore_index=ignore_index,
        mean=reduction == "mean",
        chunk=chunk_rows or max(CHUNK_BYTES // (v * dtype.itemsize), 1),
        dtype=dtype,
        keep=wants_gradient(*tensors),
        step=step,
    )
    return chunked.LinearCrossEntropy.apply(settings, x, weight_VD, bias_V, targets)


def _check(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    num_classes: int,
    reduction: str,
    chunk_rows: int | None,
) -> None:
    """Raise where the arguments do not fit together."""
    if targets.shape != x.shape[:-1]:
        raise ValueError(
            f"targets have shape {tuple(targets.shape)}, but x has {tuple(x.shape)}; give one for "
            "each row"
        )
    if targets.dtype != torch.int64:
        raise ValueError(f"targets are {targets.dtype}; give torch.int64")
    if x.shape[-1] > weight.shape[1] or not 1 <= num_classes <= weight.shape[0]:
        raise ValueError(
            f"{x.shape[-1]} inputs and {num_classes} classes are no part of a weight of shape "
            f"{tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias has shape {tuple(bias.shape)}; give {(weight.shape[0],)}, one for each row of "
            "the weight"
        )
    if reduction not in REDUCTIONS:
        choices = " or ".join(REDUCTIONS)
        raise ValueError(f"reduction={reduction!r} is unknown; choose {choices}")
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows={chunk_rows} is not positive")
