"""Attention within windows and blocks.

Shapes: B sequences, H query heads, G key/value heads, T tokens of D features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from nas_kernels.block_attention import BLOCK, Pattern, block_attention, visible_pairs
from tests.benchmarks._kernel_cases._flex import flex_contender
from tests.benchmarks._kernel_cases.case import GRADIENT, OURS, Case, Contender, Inputs, Setting

FAMILY = "block_attention"
Shape = tuple[int, int, int, int]
WINDOWS: list[tuple[Shape, int]] = [((1, 16, 4, 8192), 1024), ((2, 16, 16, 4096), 512),
                                    ((1, 16, 4, 16384), 1024)]  # fmt: skip
"""B, H, G, T and the window."""
BLOCKS: Shape = (1, 16, 4, 8192)
WIDTH = 128
LONG = 4096
"""Tokens from which on the reference computes its scores twice, so as not to keep them."""
KEPT = 0.25
"""Share of blocks that a query sees, beside its own."""


def cases(setting: Setting) -> list[Case]:
    """Return windows and one block mask, forward and with backward."""
    windows = [((1, 4, 2, 96), 32)] if setting.quick else WINDOWS
    found = []
    for shape, window in windows:
        found += [_case(setting, shape, window, trained) for trained in (False, True)]
    shape = (1, 4, 2, 192) if setting.quick else BLOCKS
    return found + [_case(setting, shape, None, trained) for trained in (False, True)]


def _case(setting: Setting, shape: Shape, window: int | None, trained: bool) -> Case:
    batch, heads, groups, tokens = shape
    width = 16 if setting.quick else WIDTH
    pattern, mask = Pattern(causal=True, window=window), None
    if window is None:
        mask = _random_blocks(tokens)
    # The blocks' mask stays on the CPU, where lists of tiles are made from it.
    on_device = None if mask is None else mask.to(setting.device)

    def inputs() -> Inputs:
        given: Inputs = {"q": setting.normal(batch, heads, tokens, width)}
        given |= {name: setting.normal(batch, groups, tokens, width) for name in ("k", "v")}
        if trained:
            given = {name: value.requires_grad_() for name, value in given.items()}
            given[GRADIENT] = setting.normal(batch, heads, tokens, width)
        return given

    def rule(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = query >= key
        if window is not None:
            return seen & (query - key < window)
        assert on_device is not None
        return seen & on_device[query // BLOCK, key // BLOCK]

    def ours(given: Inputs) -> Any:
        q, k, v = given["q"], given["k"], given["v"]
        return lambda: block_attention(
            q, k, v, pattern, block_mask_IJ=mask, implementation=setting.kernel
        )[:1]

    def visible() -> Tensor:
        return visible_pairs(pattern, tokens, tokens, setting.device, mask)

    def attend(given: Inputs, **options: Any) -> tuple[Tensor]:
        q, k, v = given["q"], given["k"], given["v"]
        return (F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options),)

    def masked(given: Inputs) -> Any:
        seen = visible()
        return lambda: attend(given, attn_mask=seen)

    share = _share(window, tokens, mask)
    names = ("q", "k", "v")
    numbers = batch * tokens * width * (2 * heads + 2 * groups)
    mode = " train" if trained else ""
    what = f"window {window}" if window is not None else f"{KEPT:.0%} of blocks"
    return Case(
        family=FAMILY,
        name=f"{what}, batch {batch} tokens {tokens} heads {heads}/{groups}{mode}",
        inputs=inputs,
        reference=lambda given: (_by_head(given, visible()),),
        contenders=(
            Contender(OURS, ours),
            flex_contender(setting, "flex", rule, enable_gqa=True),
            Contender("sdpa, mask", masked),
            Contender(
                "sdpa, all earlier keys",
                lambda given: lambda: attend(given, is_causal=True),
                same=False,
            ),
        ),
        min_bytes=2.0 * numbers * (3 if trained else 1),
        flops=4.0 * batch * heads * width * tokens**2 * share * (3.5 if trained else 1),
        wanted=names if trained else (),
        priority=1,
    )


def _by_head(given: Inputs, visible_TS: Tensor) -> Tensor:
    """Attend head by head: the scores of all at once would not fit."""
    q, k, v = given["q"], given["k"], given["v"]
    repeats = q.shape[1] // k.shape[1]

    def attend(q_BTD: Tensor, k_BSD: Tensor, v_BSD: Tensor) -> Tensor:
        scores = q_BTD @ k_BSD.transpose(-1, -2) * q.shape[-1] ** -0.5
        return scores.masked_fill(~visible_TS, -torch.inf).softmax(dim=-1) @ v_BSD

    parts = [(q[:, i], k[:, i // repeats], v[:, i // repeats]) for i in range(q.shape[1])]
    if q.shape[2] < LONG:
        return torch.stack([attend(*part) for part in parts], dim=1)
    return torch.stack([checkpoint(attend, *part, use_reentrant=False) for part in parts], dim=1)


def _random_blocks(tokens: int) -> Tensor:
    """Return a causal mask of blocks; every query sees its own block."""
    blocks = -(-tokens // BLOCK)
    generator = torch.Generator().manual_seed(0)
    kept = torch.rand(blocks, blocks, generator=generator) < KEPT
    return kept.tril() | torch.eye(blocks, dtype=torch.bool)


def _share(window: int | None, tokens: int, mask: Tensor | None) -> float:
    """Return which share of all pairs is visible."""
    if mask is not None:
        return float(mask.tril(-1).sum() + 0.5 * mask.diagonal().sum()) / mask.numel()
    assert window is not None
    return (window * tokens - window**2 / 2) / tokens**2
