"""Attention within windows, segments and blocks, by tiles that hold something visible."""

from __future__ import annotations

import torch
from torch import Tensor

from nas_kernels.block_attention.pattern import BLOCK, Pattern, visible_pairs
from nas_kernels.block_attention.ref import block_attention_ref
from nas_kernels.dispatch import AUTO, use_triton

__all__ = [
    "BLOCK",
    "Pattern",
    "block_attention",
    "block_attention_ref",
    "block_obstacle",
    "visible_pairs",
]


def block_attention(
    q_BHTK: Tensor,
    k_BGSK: Tensor,
    v_BGSV: Tensor,
    pattern: Pattern,
    *,
    scale: float | None = None,
    block_mask_IJ: Tensor | None = None,
    implementation: str = AUTO,
) -> tuple[Tensor, Tensor]:
    """Return masked softmax attention (B, H, T, V) and its log denominators (B, H, T) in fp32.

    Differentiable in both results, so that several parts of one softmax can be mixed. The kernel
    skips tiles in which nothing is visible: its work grows with what a query sees, not with S. A
    query that sees no key gets zeros, and minus infinity.

    Args:
        q_BHTK: queries, the last T of the S positions.
        k_BGSK: keys; G divides H.
        v_BGSV: values, of any width.
        pattern: who sees whom.
        scale: of the scores; `1 / sqrt(K)` by default.
        block_mask_IJ: also hides, where false, `BLOCK` keys from `BLOCK` queries, both counted
            from their first one: bool (ceil(T / BLOCK), ceil(S / BLOCK)). Lists of tiles are made
            from it on the CPU at every call.
        implementation: see `nas_kernels.dispatch.use_triton`.

    Raises:
        ValueError: when shapes or sizes do not fit.

    Source: Dao 2023, "FlashAttention-2", section 3.1 and algorithms 1-2.
    """
    _check(q_BHTK, k_BGSK, v_BGSV, pattern, block_mask_IJ)
    scale = q_BHTK.shape[-1] ** -0.5 if scale is None else scale
    given = (q_BHTK, k_BGSK, v_BGSV)
    if use_triton(
        "block_attention",
        *given,
        implementation=implementation,
        unsupported=block_obstacle(*given),
    ):
        from nas_kernels.block_attention.launch import BlockAttention

        out, lse = BlockAttention.apply(*given, pattern, scale, block_mask_IJ)
        return out, lse
    return block_attention_ref(*given, pattern, scale, block_mask_IJ)


def block_obstacle(q_BHTK: Tensor, k_BGSK: Tensor, v_BGSV: Tensor) -> str | None:
    """Return why the kernel cannot take these, for `use_triton`; None where it can."""
    return "heads are wider than 256" if max(q_BHTK.shape[-1], v_BGSV.shape[-1]) > 256 else None


def _check(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, block_mask: Tensor | None) -> None:
    fits = k.shape[:3] == v.shape[:3] and q.shape[0] == k.shape[0] and q.shape[3] == k.shape[3]
    if not fits or k.shape[1] == 0 or q.shape[1] % k.shape[1] or q.shape[2] > k.shape[2]:
        raise ValueError(
            f"queries {tuple(q.shape)}, keys {tuple(k.shape)} and values {tuple(v.shape)} do not "
            "fit: (B, H, T, K), (B, G, S, K) and (B, G, S, V) with G dividing H and T <= S are "
            "needed"
        )
    for name in ("window", "dilation", "segment"):
        size = getattr(pattern, name)
        if size is not None and size < 1:
            raise ValueError(f"{name}={size} must be at least 1")
    blocks = -(-q.shape[2] // BLOCK), -(-k.shape[2] // BLOCK)
    if block_mask is not None and (block_mask.dtype != torch.bool or block_mask.shape != blocks):
        raise ValueError(
            f"block_mask_IJ is {block_mask.dtype} {tuple(block_mask.shape)}, but bool {blocks} is "
            "needed"
        )
