"""Device code of attention by lists of tiles: outputs, and their gradients.

Scores are in units of log 2. The gradient of a score is `P (dP - delta)` with
`delta = sum(out * d_out) - d_lse`: the log of the denominator has the gradient P.

Shapes: B batch, H query heads, G key/value heads, T queries, S keys, K key width, V value width.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from nas_kernels.tiles.triton_kernel import load_tile, store_tile

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def _visible(
    query, key, T, S, window, dilation, global_tokens, segment, CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr, SEGMENTED: tl.constexpr,
):  # fmt: skip
    """Return which of the keys (S', ) the queries (T', ) see; both are counted from their first."""
    position = query + (S - T)
    visible = (query < T)[:, None] & (key < S)[None, :]
    age = position[:, None] - key[None, :]
    if WINDOWED:
        near = (tl.abs(age) < window * dilation) & (age % dilation == 0)
        near = near | (key < global_tokens)[None, :]
        if not CAUSAL:
            near = near | (position < global_tokens)[:, None]
        visible = visible & near
    if SEGMENTED:
        visible = visible & ((position // segment)[:, None] == (key // segment)[None, :])
    if CAUSAL:
        visible = visible & (age >= 0)
    return visible


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, keys_ptr, num_keys_ptr, most, num_tiles, scale, window,
    dilation, global_tokens, segment, H, G, T, S, K, V, stride_qb, stride_qh, stride_qt, stride_qk,
    stride_kb, stride_kg, stride_ks, stride_kk, stride_vb, stride_vg, stride_vs, stride_vv,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, SEGMENTED: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Write outputs (B, H, T, V) and log2 denominators (B, H, T) of one tile of queries."""
    tile, which = tl.program_id(0) % num_tiles, (tl.program_id(0) // num_tiles).to(tl.int64)
    b, h = which // H, which % H
    g = h // (H // G)
    t, k, v = tile * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    q = load_tile(q_ptr + b * stride_qb + h * stride_qh, t, k, stride_qt, stride_qk, T, K).to(DOT)
    k_base, v_base = k_ptr + b * stride_kb + g * stride_kg, v_ptr + b * stride_vb + g * stride_vg
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    acc = tl.zeros((BLOCK, BLOCK_V), tl.float32)
    for i in range(tl.load(num_keys_ptr + tile)):
        s = tl.load(keys_ptr + tile * most + i) * BLOCK + tl.arange(0, BLOCK)
        keys = load_tile(k_base, s, k, stride_ks, stride_kk, S, K).to(DOT)
        values = load_tile(v_base, s, v, stride_vs, stride_vv, S, V).to(DOT)
        visible = _visible(
            t, s, T, S, window, dilation, global_tokens, segment, CAUSAL, WINDOWED, SEGMENTED
        )
        scores = tl.dot(q, tl.trans(keys), input_precision=PRECISION) * (scale * LOG2_E)
        scores = tl.where(visible, scores, float("-inf"))
        new = tl.maximum(largest, tl.max(scores, axis=1))
        # A row may not have seen a key yet; minus infinity less itself would be NaN.
        base = tl.where(new == float("-inf"), 0.0, new)
        weights, shrink = tl.exp2(scores - base[:, None]), tl.exp2(largest - base)
        total = total * shrink + tl.sum(weights, axis=1)
        acc = acc * shrink[:, None]
        acc += tl.dot(weights.to(DOT), values, input_precision=PRECISION)
        largest = new
    denominator = tl.where(total > 0.0, total, 1.0)
    store_tile(out_ptr + which * T * V, acc / denominator[:, None], t, v, T, V)
    tl.store(lse_ptr + which * T + t, largest + tl.log2(denominator), mask=t < T)


@triton.jit
def _score_grads(
    q, keys, values, d_out, lse, delta, visible, scale, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return the weights of a tile and the gradients of its scores (before the scale)."""
    scores = tl.dot(q, tl.trans(keys), input_precision=PRECISION) * (scale * LOG2_E)
    base = tl.where(lse == float("-inf"), 0.0, lse)
    weights = tl.where(visible, tl.exp2(scores - base[:, None]), 0.0)
    d_weights = tl.dot(d_out, tl.trans(values), input_precision=PRECISION)
    return weights, weights * (d_weights - delta[:, None])


@triton.jit
def query_grad_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, d_out_ptr, d_lse_ptr, delta_ptr, dq_ptr, keys_ptr,
    num_keys_ptr, most, num_tiles, scale, window, dilation, global_tokens, segment, H, G, T, S, K,
    V, stride_qb, stride_qh, stride_qt, stride_qk, stride_kb, stride_kg, stride_ks, stride_kk,
    stride_vb, stride_vg, stride_vs, stride_vv, stride_ob, stride_oh, stride_ot, stride_ov,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, SEGMENTED: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Write the gradient of one tile of queries, and `delta` (B, H, T) for the keys' gradients."""
    tile, which = tl.program_id(0) % num_tiles, (tl.program_id(0) // num_tiles).to(tl.int64)
    b, h = which // H, which % H
    g = h // (H // G)
    t, k, v = tile * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    q = load_tile(q_ptr + b * stride_qb + h * stride_qh, t, k, stride_qt, stride_qk, T, K).to(DOT)
    out = load_tile(out_ptr + which * T * V, t, v, V, 1, T, V).to(tl.float32)
    d_out = load_tile(d_out_ptr + b * stride_ob + h * stride_oh, t, v, stride_ot, stride_ov, T, V)
    lse = tl.load(lse_ptr + which * T + t, mask=t < T, other=0.0)
    d_lse = tl.load(d_lse_ptr + which * T + t, mask=t < T, other=0.0)
    delta = tl.sum(out * d_out.to(tl.float32), axis=1) - d_lse
    tl.store(delta_ptr + which * T + t, delta, mask=t < T)
    d_out = d_out.to(DOT)
    k_base, v_base = k_ptr + b * stride_kb + g * stride_kg, v_ptr + b * stride_vb + g * stride_vg
    acc = tl.zeros((BLOCK, BLOCK_K), tl.float32)
    for i in range(tl.load(num_keys_ptr + tile)):
        s = tl.load(keys_ptr + tile * most + i) * BLOCK + tl.arange(0, BLOCK)
        keys = load_tile(k_base, s, k, stride_ks, stride_kk, S, K).to(DOT)
        values = load_tile(v_base, s, v, stride_vs, stride_vv, S, V).to(DOT)
        visible = _visible(
            t, s, T, S, window, dilation, global_tokens, segment, CAUSAL, WINDOWED, SEGMENTED
        )
        _, grads = _score_grads(q, keys, values, d_out, lse, delta, visible, scale, PRECISION)
        acc += tl.dot(grads.to(DOT), keys, input_precision=PRECISION)
    store_tile(dq_ptr + which * T * K, acc * scale, t, k, T, K)


@triton.jit
def key_grad_kernel(
    q_ptr, k_ptr, v_ptr, lse_ptr, d_out_ptr, delta_ptr, dk_ptr, dv_ptr, queries_ptr,
    num_queries_ptr, most, num_tiles, scale, window, dilation, global_tokens, segment, H, G, T, S,
    K, V, stride_qb, stride_qh, stride_qt, stride_qk, stride_kb, stride_kg, stride_ks, stride_kk,
    stride_vb, stride_vg, stride_vs, stride_vv, stride_ob, stride_oh, stride_ot, stride_ov,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, SEGMENTED: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Write the gradients of one tile of keys and values, summed over the heads that share it."""
    tile, which = tl.program_id(0) % num_tiles, (tl.program_id(0) // num_tiles).to(tl.int64)
    b, g = which // G, which % G
    s, k, v = tile * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    k_base, v_base = k_ptr + b * stride_kb + g * stride_kg, v_ptr + b * stride_vb + g * stride_vg
    keys = load_tile(k_base, s, k, stride_ks, stride_kk, S, K).to(DOT)
    values = load_tile(v_base, s, v, stride_vs, stride_vv, S, V).to(DOT)
    dk = tl.zeros((BLOCK, BLOCK_K), tl.float32)
    dv = tl.zeros((BLOCK, BLOCK_V), tl.float32)
    count = tl.load(num_queries_ptr + tile)
    for n in range(count * (H // G)):
        h = g * (H // G) + n // count
        t = tl.load(queries_ptr + tile * most + n % count) * BLOCK + tl.arange(0, BLOCK)
        at = (b * H + h) * T + t
        q_base = q_ptr + b * stride_qb + h * stride_qh
        d_out_base = d_out_ptr + b * stride_ob + h * stride_oh
        q = load_tile(q_base, t, k, stride_qt, stride_qk, T, K).to(DOT)
        d_out = load_tile(d_out_base, t, v, stride_ot, stride_ov, T, V).to(DOT)
        lse = tl.load(lse_ptr + at, mask=t < T, other=0.0)
        delta = tl.load(delta_ptr + at, mask=t < T, other=0.0)
        visible = _visible(
            t, s, T, S, window, dilation, global_tokens, segment, CAUSAL, WINDOWED, SEGMENTED
        )
        weights, grads = _score_grads(q, keys, values, d_out, lse, delta, visible, scale, PRECISION)
        dv += tl.dot(tl.trans(weights.to(DOT)), d_out, input_precision=PRECISION)
        dk += tl.dot(tl.trans(grads.to(DOT)), q, input_precision=PRECISION)
    store_tile(dk_ptr + which * S * K, dk * scale, s, k, S, K)
    store_tile(dv_ptr + which * S * V, dv, s, v, S, V)
