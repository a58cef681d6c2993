"""Device code: states from chunk to chunk, outputs, and their gradients.

A chunk has C tokens. `total_t` is the sum of a chunk's log decays up to and including token t, so
the decay from token s to t is `exp(total_t - total_s)`. For one decay per head that difference is
taken first: it is never positive. For a decay per feature it has to be a product of two factors,
around the total of the middle token: with log decays >= -2 and 64 tokens both stay below exp(64).
Above the diagonal their product may overflow, and is replaced by zero.

DECAY is 0 for none, 1 for one per head, 2 for one per feature. Products have operands of the type
DOT (bf16 for bf16 inputs, else fp32) and sums in fp32.

Shapes: B batch, H query heads, G key/value heads, R = H / G, T tokens, N chunks of C tokens,
K key width, V value width, E = K or 1 features of the decay.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from nas_kernels.tiles.triton_kernel import load_fp32_tile, store_tile


@triton.jit
def _head_totals(g, rows, row_stride, num_rows, floor):
    """Return the running sum of a head's log decays, (C,)."""
    decay = tl.load(g + rows.to(tl.int64) * row_stride, mask=rows < num_rows, other=0.0)
    return tl.cumsum(tl.maximum(decay.to(tl.float32), floor), axis=0)


@triton.jit
def _feature_totals(g, rows, columns, row_stride, column_stride, num_rows, num_columns, floor):
    """Return the running sum of every feature's log decays, (C, K)."""
    decay = load_fp32_tile(g, rows, columns, row_stride, column_stride, num_rows, num_columns)
    return tl.cumsum(tl.maximum(decay, floor), axis=0)


@triton.jit
def _row(x, number: tl.constexpr, C: tl.constexpr):
    """Return one row of a matrix, (K,)."""
    return tl.sum(tl.where((tl.arange(0, C) == number)[:, None], x, 0.0), axis=0)


@triton.jit
def _last(x, C: tl.constexpr):
    """Return the last number of a vector."""
    return tl.sum(tl.where(tl.arange(0, C) == C - 1, x, 0.0), axis=0)


@triton.jit
def pass_states(
    a, b, g, start, states, end,
    a_b, a_h, a_t, a_k, b_b, b_h, b_t, b_v, g_b, g_h, g_t, g_k, s_b, s_h, s_k, s_v,
    groups, repeats, tokens, key_dim, value_dim, num_chunks, floor,
    HAS_START: tl.constexpr, DECAY: tl.constexpr, BACKWARD: tl.constexpr, C: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the state before every chunk and after the last one: (B, G, N + 1, K, V).

    Forward: a = keys, b = values, each weighed by the decay to the end of its chunk. BACKWARD: the
    states' gradients, from the last chunk to the first; a = queries, b = the outputs' gradients,
    each weighed by the decay from the start of its chunk, summed over the heads of a group.
    """
    pair = tl.program_id(0).to(tl.int64)
    batch, group = pair // groups, pair % groups
    features = tl.program_id(1) * BK + tl.arange(0, BK)
    columns = tl.program_id(2) * BV + tl.arange(0, BV)
    g += batch * g_b + group * g_h
    size = key_dim * value_dim
    states += pair * (num_chunks + 1) * size
    state = tl.zeros([BK, BV], dtype=tl.float32)
    if HAS_START:
        start += batch * s_b + group * s_h
        state = load_fp32_tile(start, features, columns, s_k, s_v, key_dim, value_dim)
    if BACKWARD:
        states += (pair * 0 + num_chunks) * size  # `pair` makes it int64
    store_tile(states, state, features, columns, key_dim, value_dim)
    for i in range(num_chunks):
        n = i
        if BACKWARD:
            n = num_chunks - 1 - i
        rows = n * C + tl.arange(0, C)
        if DECAY == 1:
            total = _head_totals(g, rows, g_t, tokens, floor)
            state *= tl.exp(_last(total, C))
            weight = tl.exp(_last(total, C) - total)[:, None]
            if BACKWARD:
                weight = tl.exp(total)[:, None]
        if DECAY == 2:
            total = _feature_totals(g, rows, features, g_t, g_k, tokens, key_dim, floor)
            last = _row(total, C - 1, C)
            state *= tl.exp(last)[:, None]
            weight = tl.exp(last[None, :] - total)
            if BACKWARD:
                weight = tl.exp(total)
        for r in range(repeats):
            head = group * repeats + r
            a_head, b_head = a + batch * a_b + head * a_h, b + batch * b_b + head * b_h
            x = load_fp32_tile(a_head, rows, features, a_t, a_k, tokens, key_dim)
            y = load_fp32_tile(b_head, rows, columns, b_t, b_v, tokens, value_dim)
            if DECAY != 0:
                x *= weight
            state += tl.dot(tl.trans(x.to(DOT)), y.to(DOT), input_precision=PRECISION)
        if BACKWARD:
            states -= size
        else:
            states += size
        store_tile(states, state, features, columns, key_dim, value_dim)
    store_tile(end + pair * size, state, features, columns, key_dim, value_dim)


@triton.jit
def read_outputs(
    q, k, v, g, states, out,
    q_b, q_h, q_t, q_k, k_b, k_h, k_t, k_k, v_b, v_h, v_t, v_v, g_b, g_h, g_t, g_k,
    heads, repeats, tokens, key_dim, value_dim, num_chunks, floor,
    DECAY: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write `out = scores v + (q decayed from the chunk's start) S`, (B, H, T, V) without gaps."""
    pair = tl.program_id(0).to(tl.int64)
    batch, head = pair // heads, pair % heads
    group = head // repeats
    n = tl.program_id(2)
    rows, columns = n * C + tl.arange(0, C), tl.program_id(1) * BV + tl.arange(0, BV)
    q += batch * q_b + head * q_h
    k += batch * k_b + group * k_h
    v += batch * v_b + group * v_h
    g += batch * g_b + group * g_h
    size = key_dim * value_dim
    states += ((batch * (heads // repeats) + group) * (num_chunks + 1) + n) * size
    scores = tl.zeros([C, C], dtype=tl.float32)
    result = tl.zeros([C, BV], dtype=tl.float32)
    for i in range(tl.cdiv(key_dim, BK)):
        features = i * BK + tl.arange(0, BK)
        x = load_fp32_tile(q, rows, features, q_t, q_k, tokens, key_dim)
        y = load_fp32_tile(k, rows, features, k_t, k_k, tokens, key_dim)
        read = x
        if DECAY == 2:
            total = _feature_totals(g, rows, features, g_t, g_k, tokens, key_dim, floor)
            middle = _row(total, C // 2, C)[None, :]
            read = x * tl.exp(total)
            x, y = x * tl.exp(total - middle), y * tl.exp(middle - total)
        scores += tl.dot(x.to(DOT), tl.trans(y.to(DOT)), input_precision=PRECISION)
        state = load_fp32_tile(states, features, columns, value_dim, 1, key_dim, value_dim)
        result += tl.dot(read.to(DOT), state.to(DOT), input_precision=PRECISION)
    seen = tl.arange(0, C)[:, None] >= tl.arange(0, C)[None, :]
    scores = tl.where(seen, scores, 0.0)
    if DECAY == 1:
        total = _head_totals(g, rows, g_t, tokens, floor)
        result *= tl.exp(total)[:, None]
        scores *= tl.exp(tl.where(seen, total[:, None] - total[None, :], 0.0))
    z = load_fp32_tile(v, rows, columns, v_t, v_v, tokens, value_dim)
    result += tl.dot(scores.to(DOT), z.to(DOT), input_precision=PRECISION)
    out += pair * tokens * value_dim
    store_tile(out, result, rows, columns, tokens, value_dim)


@triton.jit
def value_gradients(
    q, k, g, grad_out, grad_states, grad_v,
    q_b, q_h, q_t, q_k, k_b, k_h, k_t, k_k, g_b, g_h, g_t, g_k, o_b, o_h, o_t, o_v,
    groups, repeats, tokens, key_dim, value_dim, num_chunks, floor,
    DECAY: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write `dv = scores^T do + (k decayed to the chunk's end) dS`, (B, G, T, V) without gaps."""
    pair = tl.program_id(0).to(tl.int64)
    batch, group = pair // groups, pair % groups
    n = tl.program_id(2)
    rows, columns = n * C + tl.arange(0, C), tl.program_id(1) * BV + tl.arange(0, BV)
    k += batch * k_b + group * k_h
    g += batch * g_b + group * g_h
    size = key_dim * value_dim
    grad_states += (pair * (num_chunks + 1) + n + 1) * size
    result = tl.zeros([C, BV], dtype=tl.float32)
    for i in range(tl.cdiv(key_dim, BK)):
        features = i * BK + tl.arange(0, BK)
        y = load_fp32_tile(k, rows, features, k_t, k_k, tokens, key_dim)
        if DECAY == 2:
            total = _feature_totals(g, rows, features, g_t, g_k, tokens, key_dim, floor)
            y *= tl.exp(_row(total, C - 1, C)[None, :] - total)
        grad_state = load_fp32_tile(
            grad_states, features, columns, value_dim, 1, key_dim, value_dim
        )
        result += tl.dot(y.to(DOT), grad_state.to(DOT), input_precision=PRECISION)
    seen = tl.arange(0, C)[:, None] <= tl.arange(0, C)[None, :]  # keys are rows, queries columns
    if DECAY == 1:
        totals = _head_totals(g, rows, g_t, tokens, floor)
        result *= tl.exp(_last(totals, C) - totals)[:, None]
        decay = tl.exp(tl.where(seen, totals[None, :] - totals[:, None], 0.0))
    for r in range(repeats):
        head = group * repeats + r
        q_head, out_head = q + batch * q_b + head * q_h, grad_out + batch * o_b + head * o_h
        scores = tl.zeros([C, C], dtype=tl.float32)
        for i in range(tl.cdiv(key_dim, BK)):
            features = i * BK + tl.arange(0, BK)
            x = load_fp32_tile(q_head, rows, features, q_t, q_k, tokens, key_dim)
            y = load_fp32_tile(k, rows, features, k_t, k_k, tokens, key_dim)
            if DECAY == 2:
                total = _feature_totals(g, rows, features, g_t, g_k, tokens, key_dim, floor)
                middle = _row(total, C // 2, C)[None, :]
                x, y = x * tl.exp(total - middle), y * tl.exp(middle - total)
            scores += tl.dot(y.to(DOT), tl.trans(x.to(DOT)), input_precision=PRECISION)
        scores = tl.where(seen, scores, 0.0)
        if DECAY == 1:
            scores *= decay
        grad = load_fp32_tile(out_head, rows, columns, o_t, o_v, tokens, value_dim)
        result += tl.dot(scores.to(DOT), grad.to(DOT), input_precision=PRECISION)
    grad_v += pair * tokens * value_dim
    store_tile(grad_v, result, rows, columns, tokens, value_dim)


@triton.jit
def key_gradients(
    q, k, v, g, grad_out, states, grad_states, grad_q, grad_k, grad_g,
    q_b, q_h, q_t, q_k, k_b, k_h, k_t, k_k, v_b, v_h, v_t, v_v, g_b, g_h, g_t, g_k,
    o_b, o_h, o_t, o_v,
    groups, repeats, tokens, key_dim, value_dim, num_chunks, floor,
    DECAY: tl.constexpr, GATE_GRADIENT: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the gradients of queries, keys and log decays, all without gaps.

    Scaling a feature by `exp(total_t)` scales what query t reads and divides what key t writes, so
    the gradient of `total_t` is `q dq - k dk`; that of the last one has `sum_V S dS` of the state
    after the chunk besides. A decay per head gets one share of every block of features,
    `grad_g` (B, G, T, K / BK); a decay per feature (B, G, T, K).
    """
    pair = tl.program_id(0).to(tl.int64)
    batch, group = pair // groups, pair % groups
    n = tl.program_id(2)
    rows, features = n * C + tl.arange(0, C), tl.program_id(1) * BK + tl.arange(0, BK)
    k += batch * k_b + group * k_h
    v += batch * v_b + group * v_h
    g += batch * g_b + group * g_h
    size = key_dim * value_dim
    states += (pair * (num_chunks + 1) + n) * size
    grad_states += (pair * (num_chunks + 1) + n + 1) * size
    seen = tl.arange(0, C)[:, None] >= tl.arange(0, C)[None, :]
    y = load_fp32_tile(k, rows, features, k_t, k_k, tokens, key_dim)
    if DECAY == 1:
        total_C = _head_totals(g, rows, g_t, tokens, floor)
        decay = tl.exp(tl.where(seen, total_C[:, None] - total_C[None, :], 0.0))
        total, last = total_C[:, None], tl.full([BK], 0.0, tl.float32) + _last(total_C, C)
    if DECAY == 2:
        total = _feature_totals(g, rows, features, g_t, g_k, tokens, key_dim, floor)
        last, middle = _row(total, C - 1, C), _row(total, C // 2, C)[None, :]
        later, earlier = tl.exp(total - middle), tl.exp(middle - total)
    dk = tl.zeros([C, BK], dtype=tl.float32)
    whole = tl.zeros([BK], dtype=tl.float32)
    for j in range(tl.cdiv(value_dim, BV)):
        columns = j * BV + tl.arange(0, BV)
        z = load_fp32_tile(v, rows, columns, v_t, v_v, tokens, value_dim)
        state = load_fp32_tile(states, features, columns, value_dim, 1, key_dim, value_dim)
        grad_state = load_fp32_tile(
            grad_states, features, columns, value_dim, 1, key_dim, value_dim
        )
        dk += tl.dot(z.to(DOT), tl.trans(grad_state.to(DOT)), input_precision=PRECISION)
        whole += tl.sum(state * grad_state, axis=1)
    if DECAY != 0:
        dk *= tl.exp(last[None, :] - total)
        whole = whole * tl.exp(last) + tl.sum(dk * y, axis=0)
    dg = tl.zeros([C, BK], dtype=tl.float32)
    for r in range(repeats):
        head = group * repeats + r
        q_head, out_head = q + batch * q_b + head * q_h, grad_out + batch * o_b + head * o_h
        x = load_fp32_tile(q_head, rows, features, q_t, q_k, tokens, key_dim)
        scores = tl.zeros([C, C], dtype=tl.float32)
        dq = tl.zeros([C, BK], dtype=tl.float32)
        for j in range(tl.cdiv(value_dim, BV)):
            columns = j * BV + tl.arange(0, BV)
            grad = load_fp32_tile(out_head, rows, columns, o_t, o_v, tokens, value_dim).to(DOT)
            z = load_fp32_tile(v, rows, columns, v_t, v_v, tokens, value_dim)
            state = load_fp32_tile(states, features, columns, value_dim, 1, key_dim, value_dim)
            scores += tl.dot(grad, tl.trans(z.to(DOT)), input_precision=PRECISION)
            dq += tl.dot(grad, tl.trans(state.to(DOT)), input_precision=PRECISION)
        scores = tl.where(seen, scores, 0.0)
        if DECAY == 1:
            scores *= decay
        if DECAY != 0:
            dq *= tl.exp(total)
        x_in, y_in = x, y
        if DECAY == 2:
            x_in, y_in = x * later, y * earlier
        scores = scores.to(DOT)
        dq_in = tl.dot(scores, y_in.to(DOT), input_precision=PRECISION)
        dk_in = tl.dot(tl.trans(scores), x_in.to(DOT), input_precision=PRECISION)
        if DECAY == 2:
            dq_in, dk_in = dq_in * later, dk_in * earlier
        dq += dq_in
        dk += dk_in
        dg += x * dq
        q_out = grad_q + (pair * repeats + r) * tokens * key_dim
        store_tile(q_out, dq, rows, features, tokens, key_dim)
    store_tile(grad_k + pair * tokens * key_dim, dk, rows, features, tokens, key_dim)
    if GATE_GRADIENT:
        dg -= y * dk
        # The sum from a token to the chunk's end, and what comes after the chunk.
        dg = tl.sum(dg, axis=0)[None, :] - tl.cumsum(dg, axis=0) + dg + whole[None, :]
        if DECAY == 2:
            raw = load_fp32_tile(g, rows, features, g_t, g_k, tokens, key_dim)
            dg = tl.where(raw >= floor, dg, 0.0)
            base = grad_g + pair * tokens * key_dim
            store_tile(base, dg, rows, features, tokens, key_dim)
        else:
            raw = tl.load(g + rows.to(tl.int64) * g_t, mask=rows < tokens, other=0.0)
            share = tl.where(raw.to(tl.float32) >= floor, tl.sum(dg, axis=1), 0.0)
            shares = tl.num_programs(1)
            base = grad_g + pair * tokens * shares + tl.program_id(1)
            tl.store(base + rows.to(tl.int64) * shares, share, mask=rows < tokens)


@triton.jit
def one_token(
    q, k, v, g, state, new_state, out,
    q_b, q_h, q_k, k_b, k_h, k_k, v_b, v_h, v_v, g_b, g_h, g_k, s_b, s_h, s_k, s_v,
    n_b, n_h, n_k, n_v, groups, repeats, key_dim, value_dim, floor,
    HAS_STATE: tl.constexpr, DECAY: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Update a state, in place where `new_state` is `state`, and read it; out (B, H, V)."""
    pair = tl.program_id(0).to(tl.int64)
    batch, group = pair // groups, pair % groups
    features = tl.arange(0, BK).to(tl.int64)
    columns = tl.program_id(1).to(tl.int64) * BV + tl.arange(0, BV)
    in_key, in_value = features < key_dim, columns < value_dim
    y = tl.load(k + batch * k_b + group * k_h + features * k_k, mask=in_key, other=0.0)
    z = tl.load(v + batch * v_b + group * v_h + columns * v_v, mask=in_value, other=0.0)
    memory = y.to(tl.float32)[:, None] * z.to(tl.float32)[None, :]
    if HAS_STATE:
        base = state + batch * s_b + group * s_h
        old = load_fp32_tile(base, features, columns, s_k, s_v, key_dim, value_dim)
        g += batch * g_b + group * g_h
        if DECAY == 1:
            old *= tl.exp(tl.maximum(tl.load(g).to(tl.float32), floor))
        if DECAY == 2:
            decay = tl.load(g + features * g_k, mask=in_key, other=0.0).to(tl.float32)
            old *= tl.exp(tl.maximum(decay, floor))[:, None]
        memory += old
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
