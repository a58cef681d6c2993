"""Softmax attention of the newest tokens of each sequence, in plain PyTorch.

Shapes: B batch, H query heads, G key/value heads, T new tokens, S slots of the cache, K key width,
V value width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def visible_keys(
    length_B: Tensor, tokens: int, slots: int, window: int | None, first_tokens: int
) -> Tensor:
    """Return which slots the last `tokens` positions of each sequence see (B, T, S)."""
    slot_S = torch.arange(slots, device=length_B.device)
    token_T = torch.arange(tokens, device=length_B.device)
    position_BT1 = (length_B[:, None] - tokens + token_T)[:, :, None]
    visible_BTS = slot_S <= position_BT1
    if window is None:
        return visible_BTS
    return visible_BTS & ((position_BT1 - slot_S < window) | (slot_S < first_tokens))


def decode_attention_ref(
    q_BHTK: Tensor,
    k_BGSK: Tensor,
    v_BGSV: Tensor,
    length_B: Tensor | None,
    window: int | None,
    first_tokens: int,
    scale: float,
) -> Tensor:
    """Return (B, H, T, V), computed in the dtype of `q_BHTK`, in fp32 where that is narrower.

    A token that sees no key gets zeros.

    Source: Vaswani et al. 2017, "Attention Is All You Need", equation 1; Shazeer 2019, "Fast
    Transformer Decoding", section 3 (heads that share keys and values).
    """
    batch, heads, tokens, width = q_BHTK.shape
    groups, slots = k_BGSK.shape[1:3]
    dtype = torch.promote_types(q_BHTK.dtype, torch.float32)
    if length_B is None:
        length_B = torch.full((batch,), slots, device=q_BHTK.device)
    length_B = length_B.clamp_max(slots)
    q = q_BHTK.to(dtype).reshape(batch, groups, heads // groups, tokens, width)
    # Slots that no token sees may hold anything: NaN times a weight of zero would not be zero.
    visible = visible_keys(length_B, tokens, slots, window, first_tokens)[:, None, None]
    used = visible.any(dim=-2)[:, :, 0, :, None]
    k, v = (x.to(dtype).masked_fill(~used, 0.0) for x in (k_BGSK, v_BGSV))
    scores = (q @ k.transpose(-1, -2)[:, :, None] * scale).masked_fill(~visible, -torch.inf)
    weights = scores.softmax(dim=-1).masked_fill(~visible, 0.0)
    return (weights @ v[:, :, None]).flatten(1, 2).to(q_BHTK.dtype)
