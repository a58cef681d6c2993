"""Cross-entropy of a linear map, some rows of logits at a time.

Logits live in one buffer of a chunk's size, where they turn into their own gradients; products with
inputs and weight, cuBLAS' on a GPU, are added up chunk by chunk. So gradients are computed together
with the loss and only scaled in the backward pass: computing the logits again would cost a third
more products.

Shapes: R rows in chunks of C, d <= D inputs, v <= V classes, W >= v columns of the buffer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nas_kernels.precision import at_least_fp32, without_autocast
from nas_kernels.strides import as_rows, unit_rows

Step = Callable[[Tensor, int, Tensor, Tensor, int, bool], None]
"""`cross_entropy_`, or a kernel of the same effect."""
ALIGNED = 16
"""Rows of logits start at multiples of so many elements, as wide loads and cuBLAS like them."""


@dataclass(frozen=True)
class Settings:
    """What is no tensor.

    Attributes:
        num_classes: v.
        ignore_index: target of rows that do not count.
        mean: divide by the number of rows that count.
        chunk: C.
        dtype: of logits.
        keep: whether there will be a backward pass.
        step: what turns logits into losses and gradients.
    """

    num_classes: int
    ignore_index: int
    mean: bool
    chunk: int
    dtype: torch.dtype
    keep: bool
    step: Step


def cross_entropy_(
    logits_RW: Tensor,
    num_classes: int,
    targets_R: Tensor,
    losses_R: Tensor,
    ignore_index: int,
    gradient: bool,
) -> None:
    """Write the loss of every row, and its gradient in place of the logits.

    Args:
        logits_RW: overwritten where a gradient is asked for.
        num_classes: V; what is in columns from there on does not matter.
        targets_R: int64 classes; rows with `ignore_index` get loss and gradients zero.
        losses_R: written; fp32, or float64 with such logits.
        ignore_index: see `targets_R`.
        gradient: whether to write it.
    """
    logits_RV, used_R = logits_RW[:, :num_classes], targets_R != ignore_index
    full_RV = at_least_fp32(logits_RV)
    index_R1 = torch.where(used_R, targets_R, 0)[:, None]
    log_sum_R1 = full_RV.logsumexp(dim=1, keepdim=True)
    own_R = (log_sum_R1 - full_RV.gather(1, index_R1))[:, 0]
    torch.where(used_R, own_R, own_R.new_zeros(()), out=losses_R)
    if gradient:
        grad_RV = (full_RV - log_sum_R1).exp_()
        grad_RV.scatter_add_(1, index_R1, grad_RV.new_full((), -1.0).expand(index_R1.shape))
        grad_RV.masked_fill_(~used_R[:, None], 0.0)
        logits_RV.copy_(grad_RV)


class LinearCrossEntropy(torch.autograd.Function):
    """The loss, a scalar in fp32 or float64."""

    @staticmethod
    def forward(
        ctx: Any,
        settings: Settings,
        x: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets: Tensor,
    ) -> Tensor:
        """Compute the loss and, where there will be a backward pass, all gradients."""
        x_Rd, targets_R = as_rows(x), targets.reshape(-1).contiguous()
        wide = torch.promote_types(settings.dtype, torch.float32)
        # Weight and bias gather sums over all rows, so theirs are at least in fp32.
        grads = [
            torch.zeros(tensor.shape, dtype=dtype, device=x.device)
            if tensor is not None and needed and settings.keep
            else None
            for tensor, dtype, needed in zip(
                (x_Rd, weight_VD, bias_V), (x.dtype, wide, wide), ctx.needs_input_grad[1:4],
                strict=True,
            )
        ]  # fmt: skip
        with without_autocast(x):
            losses_R, scale = _all_chunks(settings, x_Rd, weight_VD, bias_V, targets_R, grads)
        # Only now: gradients of single losses suit fp16, divided by many rows they might vanish.
        # Where no row counts they are zeros, and stay so.
        ctx.save_for_backward(scale.clamp_max(1.0), *grads)
        ctx.shape = x.shape
        ctx.dtypes = [None if t is None else t.dtype for t in (x, weight_VD, bias_V)]
        return losses_R.sum() * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> Any:
        """Return the gradients, scaled."""
        scale, *grads = ctx.saved_tensors
        factor = factor * scale
        dx, dweight_VD, dbias_V = (
            None if grad is None else (at_least_fp32(grad) * factor).to(dtype)
            for grad, dtype in zip(grads, ctx.dtypes, strict=True)
        )
        return None, None if dx is None else dx.view(ctx.shape), dweight_VD, dbias_V, None


def _all_chunks(
    settings: Settings,
    x_Rd: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_R: Tensor,
    grads: list[Tensor | None],
) -> tuple[Tensor, Tensor]:
    """Add up the gradients; return every row's loss, and what their sum is to be scaled by."""
    (num_rows, d), v, dtype = x_Rd.shape, settings.num_classes, settings.dtype
    wide = torch.promote_types(dtype, torch.float32)
    losses_R = torch.empty(num_rows, dtype=wide, device=x_Rd.device)
    scale = torch.ones((), dtype=wide, device=x_Rd.device)
    if settings.mean:
        # Stays on the device: nothing here waits for it.
        scale = (targets_R != settings.ignore_index).sum().to(wide).reciprocal()
    weight_vd = unit_rows(weight_VD[:v, :d]).to(dtype)
    bias_v = None if bias_V is None else bias_V[:v].to(dtype)
    dx_Rd, dweight_VD, dbias_V = grads
    width = -(-v // ALIGNED) * ALIGNED
    buffer = torch.empty(min(settings.chunk, num_rows), width, dtype=dtype, device=x_Rd.device)
    # PyTorch's bf16 product on CPUs reads beyond the columns that it is given.
    buffer[:, v:].zero_()
    for start in range(0, num_rows, settings.chunk):
        rows = slice(start, min(start + settings.chunk, num_rows))
        x_Cd, logits_CW = x_Rd[rows].to(dtype), buffer[: rows.stop - start]
        logits_Cv = logits_CW[:, :v]
        if bias_v is None:
            torch.mm(x_Cd, weight_vd.T, out=logits_Cv)
        else:
            torch.addmm(bias_v, x_Cd, weight_vd.T, out=logits_Cv)
        settings.step(
            logits_CW, v, targets_R[rows], losses_R[rows], settings.ignore_index,
            any(grad is not None for grad in grads),
        )  # fmt: skip
        if dx_Rd is not None:
            dx_Rd[rows] = torch.mm(logits_Cv, weight_vd)
        if dweight_VD is not None:
            _add_product(dweight_VD[:v, :d], logits_Cv.T, x_Cd)
        if dbias_V is not None:
            dbias_V[:v] += logits_Cv.sum(dim=0, dtype=wide)
    return losses_R, scale


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add `left @ right` to a total that may be wider than both."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
