"""From a chunk of logits to losses, and to the logits' gradients in their place.

A program holds one row and goes through its classes in blocks: once for the logarithm of the sum of
exponentials, rescaled whenever a larger logit turns up, and once more, out of the cache, for the
gradients.

Shapes: R rows, V classes, W >= V columns.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from functools import cache, partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nas_kernels import tuning
from nas_kernels.dispatch import interpreting, launching_on
from nas_kernels.launching import tile

LARGEST_BLOCK = 4096
INTERPRETED_BLOCK = 64


class Blocks(NamedTuple):
    """Classes that a program has at a time, and its warps."""

    classes: int
    warps: int


def block_choices(num_classes: int) -> tuple[Blocks, ...]:
    """Return the blocks to choose from, the default first."""
    largest = INTERPRETED_BLOCK if interpreting() else LARGEST_BLOCK
    return _block_choices(tile(num_classes, largest), tile(num_classes, 2 * LARGEST_BLOCK))


@cache
def _block_choices(default: int, most: int) -> tuple[Blocks, ...]:
    found = [Blocks(default, 8 if default > 1024 else 4)]
    others = ((1024, 4), (2048, 4), (2048, 8), (4096, 4), (4096, 16), (8192, 8), (8192, 16))
    found += [Blocks(min(classes, most), warps) for classes, warps in others]
    return tuple(dict.fromkeys(found))


@triton.jit
def _cross_entropy_kernel(
    logits_ptr, targets_ptr, losses_ptr, row_stride, num_classes, width, ignore_index,
    GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    target = tl.load(targets_ptr + row)
    used = target != ignore_index
    # A target that is no class gives NaN, as nothing outside of the row is read. Read here, before
    # sums that all warps wait for: later it might be another warp's gradient already.
    known = (target >= 0) & (target < num_classes)
    own = tl.load(logits_ptr + target, mask=used & known, other=float("nan")).to(tl.float32)
    # Finite, so that a block of minus infinities leaves zeros and not NaN.
    highest = -3.0e38
    total = 0.0
    for start in range(0, num_classes, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        logits = tl.load(logits_ptr + cols, mask=cols < width, other=0.0).to(tl.float32)
        logits = tl.where(cols < num_classes, logits, -float("inf"))
        higher = tl.maximum(highest, tl.max(logits, axis=0))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(logits - higher), axis=0)
        highest = higher
    log_sum = highest + tl.log(total)
    tl.store(losses_ptr + row, tl.where(used, log_sum - own, 0.0))
    if GRADIENT:
        for start in range(0, num_classes, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            mask = cols < width
            logits = tl.load(logits_ptr + cols, mask=mask, other=0.0).to(tl.float32)
            gradient = tl.exp(logits - log_sum) - tl.where(cols == target, 1.0, 0.0)
            gradient = tl.where(used & (cols < num_classes), gradient, 0.0)
            tl.store(logits_ptr + cols, gradient.to(logits_ptr.dtype.element_ty), mask=mask)


def cross_entropy_(
    logits_RW: Tensor,
    num_classes: int,
    targets_R: Tensor,
    losses_R: Tensor,
    ignore_index: int,
    gradient: bool,
) -> None:
    """Do what `chunked.cross_entropy_` does, in one launch."""
    if len(logits_RW) == 0:
        return
    candidates, numbers = block_choices(num_classes), (num_classes, ignore_index, gradient)
    blocks = candidates[0]
    with launching_on(logits_RW):
        if tuning.wanted():
            # Logits turn into gradients in their place, so copies are what is measured.
            copies = logits_RW.clone(), targets_R, torch.empty_like(losses_R)
            key = tuning.rounded(len(logits_RW), num_classes, gradient, logits_RW.dtype)
            run = partial(_launch, *copies, *numbers)
            blocks = tuning.choose("cross_entropy", key, candidates, run)
        _launch(logits_RW, targets_R, losses_R, *numbers, blocks)


def _launch(
    logits_RW: Tensor,
    targets_R: Tensor,
    losses_R: Tensor,
    num_classes: int,
    ignore_index: int,
    gradient: bool,
    blocks: Blocks,
) -> None:
    num_rows, width = logits_RW.shape
    _cross_entropy_kernel[(num_rows,)](
        logits_RW, targets_R, losses_R, logits_RW.stride(0), num_classes, width,
        ignore_index, GRADIENT=gradient, BLOCK=blocks.classes, num_warps=blocks.warps,
    )  # fmt: skip
