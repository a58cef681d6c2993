"""Windows of tokens around each token, and weighted sums over them.

A window of W tokens is the own token and the W - 1 before it (causal), or the (W - 1) // 2 before
and the W // 2 after it (bidirectional). Weights of a window are stored by distance: own token
first, then 1, 2, ... tokens back (causal) or one ahead, one back, two ahead, ... (bidirectional).
The leading part of them is then a smaller window.

Shapes: B batch, T tokens, H groups of channels, E channels of a group, W window, N blocks,
I tokens of a block, M = I + W - 1 tokens that a block sees.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from nas_kernels.constants import cached_constant

BLOCK = 64


def sides(window: int, causal: bool) -> tuple[int, int]:
    """Return how many tokens of the window lie before and after the own one."""
    return (window - 1, 0) if causal else ((window - 1) // 2, window // 2)


def block_size(tokens: int, window: int) -> int:
    """Return how many tokens `band_sums` treats together."""
    block = max(BLOCK, window)
    # In a graph for any number of tokens it is the same for all of them.
    return block if isinstance(tokens, torch.SymInt) else min(tokens, block)


def padding(tokens: int, block: int) -> int:
    """Return how many tokens `band_sums` puts behind others, so that all blocks are whole."""
    tail = -tokens % block
    if isinstance(tokens, torch.SymInt) and tokens <= block:
        # A graph for any number of tokens that is recorded with one block would have one always.
        return tail + block
    return tail


@cached_constant
def band_index(
    block: int, window: int, causal: bool, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return for each token of a block and each token it may see (I, M) which weight is theirs.

    Returns:
        The index in the order of storage, 0 outside the window, and 1 inside and 0 outside it.
    """
    before, after = sides(window, causal)
    seen_M = torch.arange(block + window - 1, device=device) - before
    offset_IM = seen_M[None, :] - torch.arange(block, device=device)[:, None]
    inside_IM = (offset_IM >= -before) & (offset_IM <= after)
    if causal:
        index_IM = -offset_IM
    else:
        index_IM = torch.where(offset_IM > 0, 2 * offset_IM - 1, -2 * offset_IM)
    return torch.where(inside_IM, index_IM, 0), inside_IM


def band_sums(padded_BTHE: Tensor, band_NHIM: Tensor) -> Tensor:
    """Sum weighted tokens of the window of every token, a block of tokens at a time.

    Args:
        padded_BTHE: the tokens with those before and after them that their windows reach,
            (B, T + W - 1, H, E).
        band_NHIM: weights, 0 outside the window; N and H may be 1 where all share them.

    Returns:
        The sums (B, T, H, E).
    """
    block, seen = band_NHIM.shape[-2:]
    tokens = padded_BTHE.shape[1] - (seen - block)
    tail = padding(tokens, block)
    if tail:
        padded_BTHE = F.pad(padded_BTHE, (0, 0, 0, 0, 0, tail))
    seen_BNHME = padded_BTHE.unfold(1, seen, block).transpose(-1, -2)
    out_BNHIE = band_NHIM @ seen_BNHME
    return out_BNHIE.transpose(2, 3).flatten(1, 2)[:, :tokens]
