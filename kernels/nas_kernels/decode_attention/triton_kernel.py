"""Split-KV decode attention: partial softmaxes over parts of the keys, then their sum.

A program takes all query heads of one key/value head (times new tokens), so keys and values are
read once. With the log of its denominator, a part's result is all that the sum needs.

fp32 is multiplied as three TF32 products, nearly exactly, or as one where PyTorch may do so too.

Shapes: B batch, H query heads, G key/value heads, T new tokens, R = H / G * T rows that share keys,
S slots of the cache, K key width, V value width, P parts.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from nas_kernels import tuning
from nas_kernels.decode_attention.blocks import Blocks, block_choices
from nas_kernels.dispatch import launching_on, num_multiprocessors
from nas_kernels.launching import dot_precision, power_of_two_below, tile
from nas_kernels.tiles.types import triton_dtype

LOG2_E = 1.4426950408889634
MOST_PARTS = 128
TILES_EACH = 4
"""Tiles of keys below which a part is not worth its share of the sum."""


@triton.jit
def _part_kernel(
    q_ptr, k_ptr, v_ptr, length_ptr, out_ptr, lse_ptr, scale, window, first_tokens, T, R, S, K, V,
    stride_qb, stride_qh, stride_qt, stride_qk, stride_kb, stride_kg, stride_ks, stride_kk,
    stride_vb, stride_vg, stride_vs, stride_vv, stride_length, G, PARTS: tl.constexpr,
    HAS_LENGTH: tl.constexpr, WINDOWED: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    which, block, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, g = (which // G).to(tl.int64), (which % G).to(tl.int64)
    r, k, v = block * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    head, token = g * (R // T) + r // T, r % T
    length = S
    if HAS_LENGTH:
        length = tl.minimum(tl.load(length_ptr + b * stride_length).to(tl.int32), S)
    position = length - T + token
    q_rows = q_ptr + b * stride_qb + head * stride_qh + token.to(tl.int64) * stride_qt
    q_mask = (r < R)[:, None] & (k < K)[None, :]
    q = tl.load(q_rows[:, None] + k.to(tl.int64)[None, :] * stride_qk, mask=q_mask, other=0.0)
    q = q.to(DOT)
    # Keys in view are the first `kept` and those from `start` on: counted through without the gap.
    start, kept = 0, 0
    if WINDOWED:
        start = tl.maximum(length - T + 1 - window, 0)
        kept = tl.minimum(first_tokens, start)
    count = tl.maximum(kept + length - start, 0)
    each = tl.cdiv(tl.cdiv(count, BLOCK_S), PARTS) * BLOCK_S
    largest = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    acc = tl.zeros((BLOCK_R, BLOCK_V), tl.float32)
    k_base, v_base = k_ptr + b * stride_kb + g * stride_kg, v_ptr + b * stride_vb + g * stride_vg
    for at in range(part * each, tl.minimum((part + 1) * each, count), BLOCK_S):
        i = at + tl.arange(0, BLOCK_S)
        s = i
        if WINDOWED:
            s = tl.where(i < kept, i, start + i - kept)
        there, slot = i < count, s.to(tl.int64)
        k_mask, v_mask = there[:, None] & (k < K)[None, :], there[:, None] & (v < V)[None, :]
        k_at = slot[:, None] * stride_ks + k.to(tl.int64)[None, :] * stride_kk
        v_at = slot[:, None] * stride_vs + v.to(tl.int64)[None, :] * stride_vv
        keys = tl.load(k_base + k_at, mask=k_mask, other=0.0)
        values = tl.load(v_base + v_at, mask=v_mask, other=0.0)
        scores = tl.dot(q, tl.trans(keys.to(DOT)), input_precision=PRECISION) * scale
        visible = there[None, :] & (s[None, :] <= position[:, None])
        if WINDOWED:
            near = position[:, None] - s[None, :] < window
            visible = visible & (near | (s < first_tokens)[None, :])
        scores = tl.where(visible, scores, float("-inf"))
        new = tl.maximum(largest, tl.max(scores, axis=1))
        # A row may not have seen a key yet; minus infinity less itself would be NaN.
        base = tl.where(new == float("-inf"), 0.0, new)
        weights, shrink = tl.exp2(scores - base[:, None]), tl.exp2(largest - base)
        total = total * shrink + tl.sum(weights, axis=1)
        acc = acc * shrink[:, None]
        acc += tl.dot(weights.to(DOT), values.to(DOT), input_precision=PRECISION)
        largest = new
    denominator = tl.where(total > 0.0, total, 1.0)
    out = acc / denominator[:, None]
    # (B, G, R, P, V): the rows of a group are its heads' tokens, as they lie in (B, H, T, V).
    row = (b * G + g) * R + r
    at = row[:, None] * (PARTS * V) + part * V + v[None, :]
    out_mask = (r < R)[:, None] & (v < V)[None, :]
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=out_mask)
    if PARTS > 1:
        # Where no key was seen, `largest` is minus infinity.
        lse = largest + tl.log2(denominator)
        tl.store(lse_ptr + row * PARTS + part, lse, mask=r < R)


@triton.jit
def _sum_kernel(
    parts_ptr, lse_ptr, out_ptr, V, PARTS: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    p, v = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_V)
    highest = tl.full((BLOCK_P,), float("-inf"), tl.float32)
    for at in range(0, PARTS, BLOCK_P):
        here = lse_ptr + row * PARTS + at + p
        highest = tl.maximum(highest, tl.load(here, mask=at + p < PARTS, other=float("-inf")))
    largest = tl.max(highest, axis=0)
    base = tl.where(largest == float("-inf"), 0.0, largest)
    acc, total = tl.zeros((BLOCK_V,), tl.float32), tl.zeros((BLOCK_P,), tl.float32)
    for at in range(0, PARTS, BLOCK_P):
        there = at + p < PARTS
        lse = tl.load(lse_ptr + row * PARTS + at + p, mask=there, other=float("-inf"))
        weight = tl.exp2(lse - base)
        where = (row * PARTS + at + p)[:, None] * V + v[None, :]
        mask = there[:, None] & (v < V)[None, :]
        acc += tl.sum(tl.load(parts_ptr + where, mask=mask, other=0.0) * weight[:, None], axis=0)
        total += weight
    denominator = tl.sum(total, axis=0)
    out = acc / tl.where(denominator > 0.0, denominator, 1.0)
    tl.store(out_ptr + row * V + v, out.to(out_ptr.dtype.element_ty), mask=v < V)


def decode_attention(
    q_BHTK: Tensor,
    k_BGSK: Tensor,
    v_BGSV: Tensor,
    length_B: Tensor | None,
    window: int | None,
    first_tokens: int,
    scale: float,
    parts: int | None = None,
) -> Tensor:
    """Run the kernels; see `nas_kernels.decode_attention`. `parts` is for tests."""
    shape = (*q_BHTK.shape[:3], v_BGSV.shape[3])
    if 0 in shape:
        return torch.empty(shape, dtype=q_BHTK.dtype, device=q_BHTK.device)
    batch, groups, slots = k_BGSK.shape[:3]
    rows = q_BHTK.shape[1] // groups * q_BHTK.shape[2]
    candidates = block_choices(rows, max(q_BHTK.shape[3], shape[3]), q_BHTK.dtype)
    given = (q_BHTK, k_BGSK, v_BGSV, length_B, window, first_tokens, scale, parts)
    blocks = candidates[0]
    with launching_on(q_BHTK):
        if tuning.wanted():
            sizes = (batch * groups, rows, slots, q_BHTK.shape[3], shape[3], window or 0)
            key = tuning.rounded(*sizes, q_BHTK.dtype)
            run = partial(_launch, *given)
            blocks = tuning.choose("decode_attention", key, candidates, run)
        return _launch(*given, blocks)


def _launch(
    q_BHTK: Tensor,
    k_BGSK: Tensor,
    v_BGSV: Tensor,
    length_B: Tensor | None,
    window: int | None,
    first_tokens: int,
    scale: float,
    parts: int | None,
    blocks: Blocks,
) -> Tensor:
    (batch, heads, tokens, width), (_, groups, slots, _) = q_BHTK.shape, k_BGSK.shape
    shape, device = (batch, heads, tokens, v_BGSV.shape[3]), q_BHTK.device
    rows = heads // groups * tokens
    across = triton.cdiv(rows, blocks.block_r)
    if parts is None:
        seen = slots if window is None else min(slots, window + first_tokens + tokens)
        programs = batch * groups * across
        parts = _num_parts(programs, seen // blocks.block_s, blocks.waves, device)
    target = lse = out = torch.empty(shape, dtype=q_BHTK.dtype, device=device)
    if parts > 1:
        target = torch.empty(*shape[:3], parts, shape[3], dtype=torch.float32, device=device)
        lse = torch.empty(*shape[:3], parts, dtype=torch.float32, device=device)
    block_v = tile(shape[3], 256)
    _part_kernel[(batch * groups, across, parts)](
        q_BHTK, k_BGSK, v_BGSV, length_B, target, lse, scale * LOG2_E,
        0 if window is None else window, first_tokens, tokens, rows, slots, width,
        shape[3], *q_BHTK.stride(), *k_BGSK.stride(), *v_BGSV.stride(),
        0 if length_B is None else length_B.stride(0), groups, PARTS=parts,
        HAS_LENGTH=length_B is not None, WINDOWED=window is not None,
        DOT=triton_dtype(q_BHTK.dtype), PRECISION=dot_precision(q_BHTK, k_BGSK, v_BGSV),
        BLOCK_R=blocks.block_r, BLOCK_S=blocks.block_s, BLOCK_K=tile(width, 256),
        BLOCK_V=block_v, num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip
    if parts > 1:
        _sum_kernel[(batch * heads * tokens,)](
            target, lse, out, shape[3], PARTS=parts, BLOCK_P=16, BLOCK_V=block_v
        )
    return out


def _num_parts(programs: int, tiles: int, waves: int, device: torch.device) -> int:
    """Return into how many parts keys are cut to occupy the device `waves` times."""
    wanted = waves * num_multiprocessors(device) // programs
    return power_of_two_below(min(wanted, tiles // TILES_EACH, MOST_PARTS))
