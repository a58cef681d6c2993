"""Masked softmax attention in plain PyTorch.

Shapes: B batch, H query heads, G key/value heads, T queries, S keys, K key width, V value width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nas_kernels.block_attention.pattern import Pattern, visible_pairs


def block_attention_ref(
    q_BHTK: Tensor,
    k_BGSK: Tensor,
    v_BGSV: Tensor,
    pattern: Pattern,
    scale: float,
    block_mask_IJ: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (B, H, T, V) and the log of the softmax denominators (B, H, T), at least fp32.

    A query that sees no key gets zeros, and minus infinity.

    Source: Vaswani et al. 2017, "Attention Is All You Need", equation 1, with a mask; Beltagy et
    al. 2020, "Longformer", section 3.1 (window, dilation, global tokens); Child et al. 2019,
    "Generating Long Sequences with Sparse Transformers", section 4 (blocks).
    """
    batch, heads, tokens, width = q_BHTK.shape
    groups, keys = k_BGSK.shape[1:3]
    dtype = torch.promote_types(q_BHTK.dtype, torch.float32)
    q = q_BHTK.to(dtype).reshape(batch, groups, heads // groups, tokens, width)
    visible_TS = visible_pairs(pattern, tokens, keys, q.device, block_mask_IJ)
    scores = (q @ k_BGSK.to(dtype).transpose(-1, -2)[:, :, None]) * scale
    seen_T1 = visible_TS.any(dim=1, keepdim=True)
    # Rows without a key are finite on the way, so that no NaN comes back as a gradient.
    scores = scores.masked_fill(~visible_TS & seen_T1, -torch.inf)
    lse = scores.logsumexp(dim=-1)
    weights = (scores - lse[..., None]).exp().masked_fill(~visible_TS, 0.0)
    out = weights @ v_BGSV.to(dtype)[:, :, None]
    lse = lse.masked_fill(~seen_T1[:, 0], -torch.inf)
    return out.flatten(1, 2).to(q_BHTK.dtype), lse.flatten(1, 2)
