"""Device code: the delta rule in chunks of C tokens (UT form).

With `A` the part of `diag(beta) K K^T` below the diagonal and `M = (I + A)^-1`, a chunk's tokens
write `D = U - W S` under their keys, where `W = M diag(beta) K`, `U = M diag(beta) V` and S is the
state before: `S' = S + K^T D`. What queries read, and half of the gradients, is linear attention
with the values D: kernels of `nas_kernels.linear_attention`.

Products have operands of the type DOT (bf16 for bf16 inputs, else fp32) and sums in fp32.

Shapes: B batch, H query heads, G key/value heads, R = H / G, T tokens, N chunks of C tokens,
K key width, V value width.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from nas_kernels.tiles.triton_kernel import load_fp32_tile, store_tile


@triton.jit
def _overlap(
    k, rows, k_t, k_k, tokens, key_dim, C: tl.constexpr, BK: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Return `K K^T` below the diagonal."""
    product = tl.zeros([C, C], dtype=tl.float32)
    for i in range(tl.cdiv(key_dim, BK)):
        features = i * BK + tl.arange(0, BK)
        y = load_fp32_tile(k, rows, features, k_t, k_k, tokens, key_dim).to(DOT)
        product += tl.dot(y, tl.trans(y), input_precision=PRECISION)
    below = tl.arange(0, C)[:, None] > tl.arange(0, C)[None, :]
    return tl.where(below, product, 0.0)


@triton.jit
def _unit_lower_inverse(lower, C: tl.constexpr, LEVELS: tl.constexpr, PRECISION: tl.constexpr):
    """Return the inverse of I + L for strictly lower triangular L, C = 2^LEVELS.

    Neighbouring diagonal blocks, inverted already, are merged until one is left:
    `[[A, 0], [L, B]]^-1 = [[A^-1, 0], [-B^-1 L A^-1, B^-1]]`, for all pairs in one product.
    """
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    inverse = tl.where(i == j, 1.0, 0.0) - tl.where((i >> 1) == (j >> 1), lower, 0.0)
    for level in tl.static_range(1, LEVELS):
        merged = ((i >> (level + 1)) == (j >> (level + 1))) & ((i >> level) != (j >> level))
        between = tl.where(merged, lower, 0.0)
        corner = tl.dot(inverse, between, input_precision=PRECISION)
        inverse -= tl.dot(corner, inverse, input_precision=PRECISION)
    return inverse


@triton.jit
def prepare_chunks(
    k, v, beta, corrections, values,
    k_b, k_h, k_t, k_k, v_b, v_h, v_t, v_v, b_b, b_h, b_t, groups, tokens, key_dim, value_dim,
    C: tl.constexpr, LEVELS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, INVERSE_PRECISION: tl.constexpr,
):  # fmt: skip
    """Write W (B, G, T, K) and U (B, G, T, V), both without gaps."""
    pair = tl.program_id(0).to(tl.int64)
    batch, group = pair // groups, pair % groups
    rows = tl.program_id(1) * C + tl.arange(0, C)
    k += batch * k_b + group * k_h
    v += batch * v_b + group * v_h
    beta += batch * b_b + group * b_h + rows.to(tl.int64) * b_t
    share = tl.load(beta, mask=rows < tokens, other=0.0).to(tl.float32)[:, None]
    lower = _overlap(k, rows, k_t, k_k, tokens, key_dim, C, BK, DOT, PRECISION) * share
    inverse = _unit_lower_inverse(lower, C, LEVELS, INVERSE_PRECISION).to(DOT)
    corrections += pair * tokens * key_dim
    values += pair * tokens * value_dim
    for i in range(tl.cdiv(key_dim, BK)):
        features = i * BK + tl.arange(0, BK)
        y = load_fp32_tile(k, rows, features, k_t, k_k, tokens, key_dim) * share
        product = tl.dot(inverse, y.to(DOT), input_precision=PRECISION)
        store_tile(corrections, product, rows, features, tokens, key_dim)
    for i in range(tl.cdiv(value_dim, BV)):
        columns = i * BV + tl.arange(0, BV)
        z = load_fp32_tile(v, rows, columns, v_t, v_v, tokens, value_dim) * share
        product = tl.dot(inverse, z.to(DOT), input_precision=PRECISION)
        store_tile(values, product, rows, columns, tokens, value_dim)


@triton.jit
def pass_states(
    k, corrections, values, start, states, written, end,
    k_b, k_h, k_t, k_k, s_b, s_h, s_k, s_v, groups, tokens, key_dim, value_dim, num_chunks,
    HAS_START: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the states before every chunk and after the last (B, G, N + 1, K, V), and D.

    BK covers all features: what a chunk writes depends on the whole columns of the state.
    """
    pair = tl.program_id(0).to(tl.int64)
    batch, group = pair // groups, pair % groups
    features, columns = tl.arange(0, BK), tl.program_id(1) * BV + tl.arange(0, BV)
    k += batch * k_b + group * k_h
    corrections += pair * tokens * key_dim
    values += pair * tokens * value_dim
    written += pair * tokens * value_dim
    size = key_dim * value_dim
    states += pair * (num_chunks + 1) * size
    state = tl.zeros([BK, BV], dtype=tl.float32)
    if HAS_START:
        start += batch * s_b + group * s_h
        state = load_fp32_tile(start, features, columns, s_k, s_v, key_dim, value_dim)
    for n in range(num_chunks):
        store_tile(states, state, features, columns, key_dim, value_dim)
        states += size
        rows = n * C + tl.arange(0, C)
        w = load_fp32_tile(corrections, rows, features, key_dim, 1, tokens, key_dim)
        d = load_fp32_tile(values, rows, columns, value_dim, 1, tokens, value_dim)
        d -= tl.dot(w.to(DOT), state.to(DOT), input_precision=PRECISION)
        store_tile(written, d, rows, columns, tokens, value_dim)
        y = load_fp32_tile(k, rows, features, k_t, k_k, tokens, key_dim)
        state += tl.dot(tl.trans(y.to(DOT)), d.to(DOT), input_precision=PRECISION)
    store_tile(states, state, features, columns, key_dim, value_dim)
    store_tile(end + pair * size, state, features, columns, key_dim, value_dim)


@triton.jit
def pass_gradients(
    q, k, corrections, grad_out, start, grad_states, grad_written, end,
    q_b, q_h, q_t, q_k, k_b, k_h, k_t, k_k, o_b, o_h, o_t, o_v, s_b, s_h, s_k, s_v,
    groups, repeats, tokens, key_dim, value_dim, num_chunks,
    HAS_START: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the gradients of all states (B, G, N + 1, K, V) and of D, from the last chunk on.

    `dD = scores^T dO + K dS'` and `dS = dS' + Q^T dO - W^T dD`.
    """
    pair = tl.program_id(0).to(tl.int64)
    batch, group = pair // groups, pair % groups
    features, columns = tl.arange(0, BK), tl.program_id(1) * BV + tl.arange(0, BV)
    k += batch * k_b + group * k_h
    corrections += pair * tokens * key_dim
    grad_written += pair * tokens * value_dim
    size = key_dim * value_dim
    grad_states += (pair * (num_chunks + 1) + num_chunks) * size
    state = tl.zeros([BK, BV], dtype=tl.float32)
    if HAS_START:
        start += batch * s_b + group * s_h
        state = load_fp32_tile(start, features, columns, s_k, s_v, key_dim, value_dim)
    seen = tl.arange(0, C)[:, None] <= tl.arange(0, C)[None, :]  # keys are rows, queries columns
    for i in range(num_chunks):
        store_tile(grad_states, state, features, columns, key_dim, value_dim)
        grad_states -= size
        rows = (num_chunks - 1 - i) * C + tl.arange(0, C)
        y = load_fp32_tile(k, rows, features, k_t, k_k, tokens, key_dim).to(DOT)
        d = tl.dot(y, state.to(DOT), input_precision=PRECISION)
        for r in range(repeats):
            head = group * repeats + r
            q_head, out_head = q + batch * q_b + head * q_h, grad_out + batch * o_b + head * o_h
            x = load_fp32_tile(q_head, rows, features, q_t, q_k, tokens, key_dim).to(DOT)
            grad = load_fp32_tile(out_head, rows, columns, o_t, o_v, tokens, value_dim).to(DOT)
            scores = tl.dot(y, tl.trans(x), input_precision=PRECISION)
            scores = tl.where(seen, scores, 0.0)
            d += tl.dot(scores.to(DOT), grad, input_precision=PRECISION)
            state += tl.dot(tl.trans(x), grad, input_precision=PRECISION)
        store_tile(grad_written, d, rows, columns, tokens, value_dim)
        w = load_fp32_tile(corrections, rows, features, key_dim, 1, tokens, key_dim)
        state -= tl.dot(tl.trans(w.to(DOT)), d.to(DOT), input_precision=PRECISION)
    store_tile(grad_states, state, features, columns, key_dim, value_dim)
    store_tile(end + pair * size, state, features, columns, key_dim, value_dim)


@triton.jit
def correction_gradients(
    grad_written, states, grad_corrections, tokens, key_dim, value_dim, num_chunks,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Write `dW = -dD S^T`, (B, G, T, K) without gaps."""
    pair = tl.program_id(0).to(tl.int64)
    n = tl.program_id(2)
    rows, features = n * C + tl.arange(0, C), tl.program_id(1) * BK + tl.arange(0, BK)
    grad_written += pair * tokens * value_dim
    states += (pair * (num_chunks + 1) + n) * (key_dim * value_dim)
    result = tl.zeros([C, BK], dtype=tl.float32)
    for i in range(tl.cdiv(value_dim, BV)):
        columns = i * BV + tl.arange(0, BV)
        d = load_fp32_tile(grad_written, rows, columns, value_dim, 1, tokens, value_dim).to(DOT)
        state = load_fp32_tile(states, features, columns, value_dim, 1, key_dim, value_dim).to(DOT)
        result -= tl.dot(d, tl.trans(state), input_precision=PRECISION)
    grad_corrections += pair * tokens * key_dim
    store_tile(grad_corrections, result, rows, features, tokens, key_dim)


@triton.jit
def input_gradients(
    k, v, beta, corrections, values, grad_corrections, grad_written, grad_read,
    grad_k, grad_v, grad_beta,
    k_b, k_h, k_t, k_k, v_b, v_h, v_t, v_v, b_b, b_h, b_t, groups, tokens, key_dim, value_dim,
    C: tl.constexpr, LEVELS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, INVERSE_PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the gradients of keys, values and beta, all without gaps.

    With `X = M^T dW` and `Y = M^T dU` (dU = dD), `dA = -(X W^T + Y U^T)` below the diagonal.
    `grad_read` (B, G, T, K) is the part of the keys' gradient that does not go through W and U.
    """
    pair = tl.program_id(0).to(tl.int64)
    batch, group = pair // groups, pair % groups
    rows = tl.program_id(1) * C + tl.arange(0, C)
    k += batch * k_b + group * k_h
    v += batch * v_b + group * v_h
    beta += batch * b_b + group * b_h + rows.to(tl.int64) * b_t
    share = tl.load(beta, mask=rows < tokens, other=0.0).to(tl.float32)[:, None]
    overlap = _overlap(k, rows, k_t, k_k, tokens, key_dim, C, BK, DOT, PRECISION)
    inverse = _unit_lower_inverse(overlap * share, C, LEVELS, INVERSE_PRECISION)
    back = tl.trans(inverse).to(DOT)
    corrections += pair * tokens * key_dim
    grad_corrections += pair * tokens * key_dim
    values += pair * tokens * value_dim
    grad_written += pair * tokens * value_dim
    lower = tl.zeros([C, C], dtype=tl.float32)
    of_share = tl.zeros([C], dtype=tl.float32)
    for i in range(tl.cdiv(value_dim, BV)):
        columns = i * BV + tl.arange(0, BV)
        d = load_fp32_tile(grad_written, rows, columns, value_dim, 1, tokens, value_dim)
        u = load_fp32_tile(values, rows, columns, value_dim, 1, tokens, value_dim)
        y = tl.dot(back, d.to(DOT), input_precision=PRECISION)
        lower -= tl.dot(y.to(DOT), tl.trans(u.to(DOT)), input_precision=PRECISION)
        z = load_fp32_tile(v, rows, columns, v_t, v_v, tokens, value_dim)
        of_share += tl.sum(y * z, axis=1)
        base = grad_v + pair * tokens * value_dim
        store_tile(base, y * share, rows, columns, tokens, value_dim)
    for i in range(tl.cdiv(key_dim, BK)):
        features = i * BK + tl.arange(0, BK)
        d = load_fp32_tile(grad_corrections, rows, features, key_dim, 1, tokens, key_dim)
        w = load_fp32_tile(corrections, rows, features, key_dim, 1, tokens, key_dim)
        x = tl.dot(back, d.to(DOT), input_precision=PRECISION)
        lower -= tl.dot(x.to(DOT), tl.trans(w.to(DOT)), input_precision=PRECISION)
    below = tl.arange(0, C)[:, None] > tl.arange(0, C)[None, :]
    lower = tl.where(below, lower, 0.0)
    of_share += tl.sum(lower * overlap, axis=1)
    lower *= share  # the gradient of K K^T below the diagonal
    for i in range(tl.cdiv(key_dim, BK)):
        features = i * BK + tl.arange(0, BK)
        d = load_fp32_tile(grad_corrections, rows, features, key_dim, 1, tokens, key_dim)
        x = tl.dot(back, d.to(DOT), input_precision=PRECISION)
        y = load_fp32_tile(k, rows, features, k_t, k_k, tokens, key_dim)
        of_share += tl.sum(x * y, axis=1)
        base = grad_read + pair * tokens * key_dim
        grad = load_fp32_tile(base, rows, features, key_dim, 1, tokens, key_dim) + x * share
        grad += tl.dot(lower.to(DOT), y.to(DOT), input_precision=PRECISION)
        grad += tl.dot(tl.trans(lower).to(DOT), y.to(DOT), input_precision=PRECISION)
        base = grad_k + pair * tokens * key_dim
        store_tile(base, grad, rows, features, tokens, key_dim)
    place = grad_beta + pair * tokens + rows
    tl.store(place, of_share.to(grad_beta.dtype.element_ty), mask=rows < tokens)


@triton.jit
def one_token(
    q, k, v, beta, state, new_state, out,
    q_b, q_h, q_k, k_b, k_h, k_k, v_b, v_h, v_v, b_b, b_h, s_b, s_h, s_k, s_v,
    n_b, n_h, n_k, n_v, groups, repeats, key_dim, value_dim,
    HAS_STATE: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Update a state, in place where `new_state` is `state`, and read it; out (B, H, V)."""
    pair = tl.program_id(0).to(tl.int64)
    batch, group = pair // groups, pair % groups
    features = tl.arange(0, BK).to(tl.int64)
    columns = tl.program_id(1).to(tl.int64) * BV + tl.arange(0, BV)
    in_key, in_value = features < key_dim, columns < value_dim
    y = tl.load(k + batch * k_b + group * k_h + features * k_k, mask=in_key, other=0.0)
    z = tl.load(v + batch * v_b + group * v_h + columns * v_v, mask=in_value, other=0.0)
    y, z = y.to(tl.float32), z.to(tl.float32)
    share = tl.load(beta + batch * b_b + group * b_h).to(tl.float32)
    memory = tl.zeros([BK, BV], dtype=tl.float32)
    if HAS_STATE:
        base = state + batch * s_b + group * s_h
        memory = load_fp32_tile(base, features, columns, s_k, s_v, key_dim, value_dim)
    stored = tl.sum(memory * y[:, None], axis=0)
    memory += (share * y)[:, None] * (z - stored)[None, :]
    mask = in_key[:, None] & in_value[None, :]
    new_state += batch * n_b + group * n_h
    offsets = features[:, None] * n_k + columns[None, :] * n_v
    tl.store(new_state + offsets, memory.to(new_state.dtype.element_ty), mask=mask)
    for r in range(repeats):
        head = group * repeats + r
        x = tl.load(q + batch * q_b + head * q_h + features * q_k, mask=in_key, other=0.0)
        read = tl.sum(x.to(tl.float32)[:, None] * memory, axis=0)
        place = out + (pair * repeats + r) * value_dim + columns
        tl.store(place, read.to(out.dtype.element_ty), mask=in_value)
