"""Attention within a window in blocks, with work linear in the number of tokens.

Shapes: B batch, T tokens, H query heads, G key/value heads, K head width, W window, N blocks of W
tokens, S keys of one block of queries.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from nas_kernels.constants import cached_constant
from searchspace.mixers.attention import key_age, sdpa
from searchspace.positions import alibi_bias


def block_banded(
    q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, window: int, causal: bool, alibi: bool
) -> Tensor:
    """Attend to the own token and `window - 1` tokens before it and, if not causal, after it.

    Each block of W queries attends to its own block of keys and to those beside it.
    """
    batch, heads, tokens, _ = q_BHTK.shape
    num_blocks = -(-tokens // window)
    tail = num_blocks * window - tokens

    def blocks(x: Tensor) -> Tensor:
        padded = F.pad(x, (0, 0, 0, tail)) if tail else x
        return padded.unflatten(2, (num_blocks, window)).transpose(1, 2)  # (B, N, heads, W, K)

    def with_neighbours(x: Tensor) -> Tensor:
        own = blocks(x)
        outside = torch.zeros_like(own[:, :1])
        parts = [torch.cat([outside, own[:, :-1]], dim=1), own]
        if not causal:
            parts.append(torch.cat([own[:, 1:], outside], dim=1))
        return torch.cat(parts, dim=3).flatten(0, 1)

    mask = _block_mask(num_blocks, window, tokens, causal, q_BHTK.device)
    if alibi:
        # A block's queries stand one block after its first key, wherever the block is.
        bias = alibi_bias(heads, window, mask.shape[-1], window, q_BHTK.device)
        mask = bias.masked_fill(~mask, -math.inf)
    mask = mask.expand(batch, -1, -1, -1, -1).flatten(0, 1)
    out = sdpa(blocks(q_BHTK).flatten(0, 1), with_neighbours(k_BGTK), with_neighbours(v_BGTK), mask)
    out = out.unflatten(0, (batch, num_blocks)).transpose(1, 2)
    return out.reshape(batch, heads, num_blocks * window, -1)[:, :, :tokens]


@cached_constant
def _block_mask(
    num_blocks: int, window: int, tokens: int, causal: bool, device: torch.device
) -> Tensor:
    """Return (N, 1, W, S): in the window, and between the first and the last token."""
    num_keys = 2 * window if causal else 3 * window
    age_WS = key_age(window, window, num_keys, device)
    near_WS = (age_WS < window) & (age_WS >= 0 if causal else age_WS > -window)
    first_N1 = window * torch.arange(-1, num_blocks - 1, device=device)[:, None]
    key_NS = first_N1 + torch.arange(num_keys, device=device)
    there_NS = (key_NS >= 0) & (key_NS < tokens)
    # Queries of the padding see themselves: a row without any key would give NaN.
    mask_NWS = (near_WS & there_NS[:, None, :]) | (age_WS == 0)
    return mask_NWS[:, None]
