"""Attention by lists of tiles as a differentiable function.

Shapes: B batch, H query heads, G key/value heads, T queries, S keys, K key width, V value width.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nas_kernels import tuning
from nas_kernels.block_attention.pattern import BLOCK, Pattern, TileLists, tile_lists
from nas_kernels.dispatch import launching_on
from nas_kernels.launching import HALVES, cdiv, dot_precision, tile
from nas_kernels.tiles.types import triton_dtype

Lists = Callable[[int], TileLists]


class Blocks(NamedTuple):
    """The side of a tile of queries and of keys, and how a program processes it."""

    side: int
    warps: int
    stages: int


class BlockAttention(torch.autograd.Function):
    """See `nas_kernels.block_attention.block_attention`."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pattern: Pattern,
        scale: float,
        block_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Return outputs (B, H, T, V) and natural logs of the denominators (B, H, T)."""
        lists = functools.partial(
            tile_lists, pattern, q.shape[2], k.shape[2], device=q.device, block_mask_IJ=block_mask
        )
        # One for each side of tiles, as forward and backward may have different ones.
        ctx.lists = functools.cache(lists)
        ctx.pattern, ctx.scale = pattern, scale
        candidates = block_choices(q, v, masked=block_mask is not None)
        blocks, given = candidates[0], (q, k, v, ctx.lists, pattern, scale)
        with launching_on(q):
            if tuning.wanted() and q.shape[:3].numel():
                run, key = functools.partial(_forward, *given), _key(q, k, v, pattern)
                blocks = tuning.choose("block_attention", key, candidates, run)
            out, lse = _forward(*given, blocks)
        ctx.masked = block_mask is not None
        ctx.save_for_backward(q, k, v, out, lse)
        return out, lse * math.log(2.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of queries, keys and values."""
        q, k, v, out, _ = saved = ctx.saved_tensors
        if out.numel() == 0:
            return *(torch.zeros_like(x) for x in (q, k, v)), None, None, None
        candidates = block_choices(q, v, masked=ctx.masked)
        blocks, given = candidates[0], (saved, grads, ctx.lists, ctx.pattern, ctx.scale)
        with launching_on(q):
            if tuning.wanted():
                run, key = functools.partial(_backward, *given), _key(q, k, v, ctx.pattern)
                blocks = tuning.choose("block_attention backward", key, candidates, run)
            return *_backward(*given, blocks), None, None, None


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists_of: Lists,
    pattern: Pattern,
    scale: float,
    blocks: Blocks,
) -> tuple[Tensor, Tensor]:
    """Return outputs, and logs of the denominators to the base 2."""
    from nas_kernels.block_attention.triton_kernel import forward_kernel

    batch, heads, tokens, _ = q.shape
    out = torch.empty(batch, heads, tokens, v.shape[3], dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, tokens, dtype=torch.float32, device=q.device)
    if out.numel():
        lists, tiles = lists_of(blocks.side), cdiv(tokens, blocks.side)
        numbers, strides, flags = _arguments(q, k, v, pattern, scale, blocks)
        forward_kernel[(batch * heads * tiles,)](
            q, k, v, out, lse, lists.keys_IN, lists.num_keys_I, lists.keys_IN.shape[1],
            tiles, *numbers, *strides, **flags,
        )  # fmt: skip
    return out, lse


def _backward(
    saved: tuple[Tensor, ...],
    grads: tuple[Tensor, ...],
    lists_of: Lists,
    pattern: Pattern,
    scale: float,
    blocks: Blocks,
) -> tuple[Tensor, Tensor, Tensor]:
    from nas_kernels.block_attention.triton_kernel import key_grad_kernel, query_grad_kernel

    (q, k, v, out, lse), (d_out, d_lse) = saved, grads
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    lists, delta = lists_of(blocks.side), torch.empty_like(lse)
    numbers, strides, flags = _arguments(q, k, v, pattern, scale, blocks)
    tail = (*numbers, *strides, *d_out.stride())
    (batch, heads, tokens, _), (_, groups, keys, _) = q.shape, k.shape
    q_tiles, k_tiles = cdiv(tokens, blocks.side), cdiv(keys, blocks.side)
    query_grad_kernel[(batch * heads * q_tiles,)](
        q, k, v, out, lse, d_out, d_lse.contiguous(), delta, dq, lists.keys_IN,
        lists.num_keys_I, lists.keys_IN.shape[1], q_tiles, *tail, **flags,
    )  # fmt: skip
    key_grad_kernel[(batch * groups * k_tiles,)](
        q, k, v, lse, d_out, delta, dk, dv, lists.queries_JN, lists.num_queries_J,
        lists.queries_JN.shape[1], k_tiles, *tail, **flags,
    )  # fmt: skip
    return dq, dk, dv


def block_choices(q: Tensor, v: Tensor, masked: bool) -> tuple[Blocks, ...]:
    """Return the blocks to choose from, the default first.

    That has the largest tiles whose backward, compiled for compute capability 9.0, spills no
    registers (to speak of); only for fp32 heads above 128 none does not.

    Args:
        q: queries.
        v: values.
        masked: whether there is a block mask, whose entries no tile may be larger than.
    """
    return _block_choices(max(q.shape[-1], v.shape[-1]), q.dtype in HALVES, masked)


@functools.cache
def _block_choices(width: int, half: bool, masked: bool) -> tuple[Blocks, ...]:
    if half and width <= 128:
        found = [Blocks(64, 4 if width <= 64 else 8, 2), Blocks(64, 4, 3), Blocks(64, 8, 3)]
        found += [Blocks(32, 4, 2), Blocks(32, 4, 3), Blocks(128, 8, 2)]
    elif half:
        found = [Blocks(32, 8, 2), Blocks(32, 4, 2), Blocks(64, 8, 2), Blocks(16, 4, 2)]
    else:
        found = [Blocks(32 if width <= 64 else 16, 8, 2), Blocks(16, 4, 2), Blocks(32, 4, 2)]
        found += [Blocks(16, 4, 3)]
    return tuple(blocks for blocks in found if not masked or blocks.side <= BLOCK)


def _key(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> tuning.Key:
    """Return what the choice of blocks depends on."""
    (batch, heads, tokens, width), (_, groups, keys, _) = q.shape, k.shape
    sizes = (batch, heads, groups, tokens, keys, width, v.shape[3])
    reach = (pattern.causal, pattern.window or 0, pattern.dilation, pattern.segment or 0)
    return tuning.rounded(*sizes, *reach, q.dtype)


def _arguments(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, scale: float, blocks: Blocks
) -> tuple[tuple[Any, ...], tuple[int, ...], dict[str, Any]]:
    """Return what all kernels take: numbers, strides and compile-time values."""
    (_, heads, tokens, width), (_, groups, keys, _) = q.shape, k.shape
    numbers = (
        scale, pattern.window or 0, pattern.dilation, pattern.global_tokens, pattern.segment or 0,
        heads, groups, tokens, keys, width, v.shape[3],
    )  # fmt: skip
    flags = {
        "CAUSAL": pattern.causal,
        "WINDOWED": pattern.window is not None,
        "SEGMENTED": pattern.segment is not None,
        "DOT": triton_dtype(q.dtype),
        "PRECISION": dot_precision(q, k, v),
        "BLOCK": blocks.side,
        "BLOCK_K": tile(width, 256),
        "BLOCK_V": tile(v.shape[3], 256),
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
    }
    return numbers, (*q.stride(), *k.stride(), *v.stride()), flags
