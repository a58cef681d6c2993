"""Attention by lists of tiles as a differentiable function.

Shapes: B batch, H query heads, G key/value heads, T queries, S keys, K key width, V value width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nas_kernels.block_attention.pattern import Pattern, tile_lists
from nas_kernels.dispatch import launching_on
from nas_kernels.launching import cdiv, dot_precision, tile
from nas_kernels.tiles.types import triton_dtype

HALVES = (torch.bfloat16, torch.float16)


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
        from nas_kernels.block_attention.triton_kernel import forward_kernel

        batch, heads, tokens, _ = q.shape
        out = torch.empty(batch, heads, tokens, v.shape[3], dtype=q.dtype, device=q.device)
        lse = torch.empty(batch, heads, tokens, dtype=torch.float32, device=q.device)
        block, _ = _sizes(q, v)
        lists = tile_lists(pattern, tokens, k.shape[2], block, q.device, block_mask)
        ctx.pattern, ctx.scale, ctx.lists, ctx.block = pattern, scale, lists, block
        if out.numel():
            numbers, strides, flags = _arguments(q, k, v, pattern, scale)
            tiles = cdiv(tokens, block)
            with launching_on(q):
                forward_kernel[(batch * heads * tiles,)](
                    q, k, v, out, lse, lists.keys_IN, lists.num_keys_I, lists.keys_IN.shape[1],
                    tiles, *numbers, *strides, **flags, num_stages=2,
                )  # fmt: skip
        ctx.save_for_backward(q, k, v, out, lse)
        return out, lse * math.log(2.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of queries, keys and values."""
        from nas_kernels.block_attention.triton_kernel import key_grad_kernel, query_grad_kernel

        d_out, d_lse = grads
        q, k, v, out, lse = ctx.saved_tensors
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        if out.numel() == 0:
            return dq.zero_(), dk.zero_(), dv.zero_(), None, None, None
        lists, block, delta = ctx.lists, ctx.block, torch.empty_like(lse)
        numbers, strides, flags = _arguments(q, k, v, ctx.pattern, ctx.scale)
        tail = (*numbers, *strides, *d_out.stride())
        (batch, heads, tokens, _), (_, groups, keys, _) = q.shape, k.shape
        q_tiles, k_tiles = cdiv(tokens, block), cdiv(keys, block)
        with launching_on(q):
            query_grad_kernel[(batch * heads * q_tiles,)](
                q, k, v, out, lse, d_out, d_lse.contiguous(), delta, dq, lists.keys_IN,
                lists.num_keys_I, lists.keys_IN.shape[1], q_tiles, *tail, **flags, num_stages=2,
            )  # fmt: skip
            key_grad_kernel[(batch * groups * k_tiles,)](
                q, k, v, lse, d_out, delta, dk, dv, lists.queries_JN, lists.num_queries_J,
                lists.queries_JN.shape[1], k_tiles, *tail, **flags, num_stages=2,
            )  # fmt: skip
        return dq, dk, dv, None, None, None


def _sizes(q: Tensor, v: Tensor) -> tuple[int, int]:
    """Return the side of a tile and the number of warps.

    They are the largest tiles whose backward, compiled for compute capability 9.0, spills no
    registers (to speak of); only for fp32 heads above 128 none does not.
    """
    width = max(q.shape[-1], v.shape[-1])
    if q.dtype in HALVES:
        return (64, 4 if width <= 64 else 8) if width <= 128 else (32, 8)
    return (32 if width <= 64 else 16), 8


def _arguments(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, scale: float
) -> tuple[tuple[Any, ...], tuple[int, ...], dict[str, Any]]:
    """Return what all kernels take: numbers, strides and compile-time values."""
    (_, heads, tokens, width), (_, groups, keys, _) = q.shape, k.shape
    numbers = (
        scale, pattern.window or 0, pattern.dilation, pattern.global_tokens, pattern.segment or 0,
        heads, groups, tokens, keys, width, v.shape[3],
    )  # fmt: skip
    block, warps = _sizes(q, v)
    flags = {
        "CAUSAL": pattern.causal,
        "WINDOWED": pattern.window is not None,
        "SEGMENTED": pattern.segment is not None,
        "DOT": triton_dtype(q.dtype),
        "PRECISION": dot_precision(q, k, v),
        "BLOCK": block,
        "BLOCK_K": tile(width, 256),
        "BLOCK_V": tile(v.shape[3], 256),
        "num_warps": warps,
    }
    return numbers, (*q.stride(), *k.stride(), *v.stride()), flags
