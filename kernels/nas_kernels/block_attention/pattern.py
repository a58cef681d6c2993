"""Which keys a query sees, as a rule for pairs of positions and as lists of tiles.

Shapes: T queries, S keys, I tiles of queries, J tiles of keys, N the most tiles that one sees.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nas_kernels.constants import cached_constant

BLOCK = 64
"""Positions that one entry of a block mask stands for."""


class Pattern(NamedTuple):
    """A rule; every field may be left at what hides nothing.

    Args:
        causal: hide keys behind the query.
        window: show positions less than `window * dilation` away; None for all.
        dilation: of those in the window, show only every so many.
        global_tokens: show the first positions to all and, where not causal, all to them.
        segment: hide what is not in the query's own segment of so many positions; None for none.
    """

    causal: bool = True
    window: int | None = None
    dilation: int = 1
    global_tokens: int = 0
    segment: int | None = None


class TileLists(NamedTuple):
    """For each tile of queries the tiles of keys it may see, ascending, and the reverse."""

    keys_IN: Tensor
    num_keys_I: Tensor
    queries_JN: Tensor
    num_queries_J: Tensor


def visible_pairs(
    pattern: Pattern, tokens: int, keys: int, device: torch.device, block_mask_IJ: Tensor | None
) -> Tensor:
    """Return which keys the last `tokens` positions see (T, S)."""
    query_T1 = torch.arange(keys - tokens, keys, device=device)[:, None]
    key_1S = torch.arange(keys, device=device)[None, :]
    age_TS = query_T1 - key_1S
    visible_TS = torch.ones(tokens, keys, dtype=torch.bool, device=device)
    if pattern.window is not None:
        near_TS = age_TS.abs() < pattern.window * pattern.dilation
        visible_TS = near_TS & (age_TS % pattern.dilation == 0) | (key_1S < pattern.global_tokens)
        if not pattern.causal:
            visible_TS = visible_TS | (query_T1 < pattern.global_tokens)
    if pattern.segment is not None:
        visible_TS = visible_TS & (query_T1 // pattern.segment == key_1S // pattern.segment)
    if pattern.causal:
        visible_TS = visible_TS & (age_TS >= 0)
    if block_mask_IJ is not None:
        mask_TS = block_mask_IJ.to(device).repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
        visible_TS = visible_TS & mask_TS[:tokens, :keys]
    return visible_TS


def tile_lists(
    pattern: Pattern,
    tokens: int,
    keys: int,
    block: int,
    device: torch.device,
    block_mask_IJ: Tensor | None = None,
) -> TileLists:
    """Return the tiles of `block` positions that hold visible pairs, or may do so.

    Without a block mask they are made once for each pattern and size.
    """
    if block_mask_IJ is None:
        return _cached_lists(pattern, tokens, keys, block, device)
    finer = BLOCK // block
    mask = block_mask_IJ.cpu().repeat_interleave(finer, 0).repeat_interleave(finer, 1)
    visible_IJ = _visible_tiles(pattern, tokens, keys, block)
    return _lists(visible_IJ & mask[: len(visible_IJ), : visible_IJ.shape[1]], device)


@cached_constant
def _cached_lists(
    pattern: Pattern, tokens: int, keys: int, block: int, device: torch.device
) -> TileLists:
    return _lists(_visible_tiles(pattern, tokens, keys, block), device)


def _visible_tiles(pattern: Pattern, tokens: int, keys: int, block: int) -> Tensor:
    first_q = torch.arange(0, tokens, block)[:, None] + keys - tokens
    first_k = torch.arange(0, keys, block)[None, :]
    last_q, last_k = (first_q + block - 1).clamp_max(keys - 1), first_k + block - 1
    youngest, oldest = first_q - last_k, last_q - first_k
    visible_IJ = torch.ones(youngest.shape, dtype=torch.bool)
    if pattern.window is not None:
        reach = (pattern.window - 1) * pattern.dilation
        visible_IJ = (youngest <= reach) & (oldest >= -reach) | (first_k < pattern.global_tokens)
        if not pattern.causal:
            visible_IJ = visible_IJ | (first_q < pattern.global_tokens)
    if pattern.segment is not None:
        overlap = first_q // pattern.segment <= last_k // pattern.segment
        visible_IJ = (
            visible_IJ & overlap & (first_k // pattern.segment <= last_q // pattern.segment)
        )
    return visible_IJ & (oldest >= 0) if pattern.causal else visible_IJ


def _lists(visible_IJ: Tensor, device: torch.device) -> TileLists:
    parts = []
    for visible in (visible_IJ, visible_IJ.T):
        count = visible.sum(dim=1)
        most = max(int(count.max()), 1) if len(count) else 1
        order = visible.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
        parts += [order[:, :most].to(torch.int32).contiguous(), count.to(torch.int32)]
    return TileLists(*(part.to(device) for part in parts))
