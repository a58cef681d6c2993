"""Device code: the selective scan in chunks of L tokens, forward and backward.

`total_t` is the sum of a chunk's step sizes up to and including token t, so a state decays by
`exp(a (total_t - total_u))` from token u to t: what a chunk adds to the state after it needs no
scan. Inside a chunk all states of a channel are the prefixes of an associative product.

Shapes: B batch, T tokens, N chunks of L tokens, C channels, S numbers of state per channel.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from nas_kernels.tiles.triton_kernel import store_tile, then


@triton.jit
def _tile(base, rows, columns, row_stride, column_stride, first, end, num_columns):
    """Load the rows in [first, end) of a matrix in fp32, zeros outside."""
    mask = (rows[:, None] >= first) & (rows[:, None] < end) & (columns[None, :] < num_columns)
    base += rows[:, None].to(tl.int64) * row_stride
    offsets = columns[None, :].to(tl.int64) * column_stride
    return tl.load(base + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _column(base, rows, row_stride, first, end):
    """Load one number of every token in [first, end) in fp32, as a column; zeros outside."""
    mask = (rows >= first) & (rows < end)
    return tl.load(base + rows.to(tl.int64) * row_stride, mask=mask, other=0.0).to(tl.float32)[
        :, None
    ]


@triton.jit
def sum_chunks(
    x, delta, a, vector, ends, totals,
    x_b, x_t, x_c, d_b, d_t, d_c, a_c, a_s, v_b, v_t, v_s, tokens, channels, num_states,
    num_chunks, BACKWARD: tl.constexpr, L: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Write what every chunk adds to the state after it (B, N, C, S), and `total` (B, N, C).

    BACKWARD: what it adds to the gradient of the state before it; x is the output's gradient and
    the vector is what reads a state, not what writes it.
    """
    batch, n = tl.program_id(0).to(tl.int64), tl.program_id(2)
    rows, columns = n * L + tl.arange(0, L), tl.program_id(1) * BC + tl.arange(0, BC)
    inside = columns < channels
    steps = _tile(delta + batch * d_b, rows, columns, d_t, d_c, 0, tokens, channels)
    u = _tile(x + batch * x_b, rows, columns, x_t, x_c, 0, tokens, channels)
    total = tl.sum(steps, axis=0)
    passed = tl.cumsum(steps, axis=0)
    if not BACKWARD:
        u *= steps
        passed = total[None, :] - passed
    vector += batch * v_b
    slot = (batch * num_chunks + n) * channels
    tl.store(totals + slot + columns, total, mask=inside)
    ends += slot * num_states + columns.to(tl.int64) * num_states
    for s in range(num_states):
        rate = tl.load(a + columns.to(tl.int64) * a_c + s * a_s, mask=inside, other=0.0)
        weight = tl.exp(passed * rate.to(tl.float32)[None, :])
        added = u * _column(vector + s * v_s, rows, v_t, 0, tokens) * weight
        tl.store(ends + s, tl.sum(added, axis=0), mask=inside)


@triton.jit
def pass_states(
    a, ends, totals, start, states, last,
    a_c, a_s, s_b, s_c, s_s, channels, num_states, num_chunks,
    HAS_START: tl.constexpr, BACKWARD: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Write the state before every chunk (B, N, C, S) and the one after the last (B, C, S).

    BACKWARD: the gradient of the state after every chunk, and of the one before the first.
    """
    batch = tl.program_id(0).to(tl.int64)
    columns, numbers = tl.program_id(1) * BC + tl.arange(0, BC), tl.arange(0, BS)
    rates = _tile(a, columns, numbers, a_c, a_s, 0, channels, num_states)
    state = tl.zeros([BC, BS], dtype=tl.float32)
    if HAS_START:
        start += batch * s_b
        state = _tile(start, columns, numbers, s_c, s_s, 0, channels, num_states)
    size = channels * num_states
    for i in range(num_chunks):
        n = i
        if BACKWARD:
            n = num_chunks - 1 - i
        slot = batch * num_chunks + n
        store_tile(states + slot * size, state, columns, numbers, channels, num_states)
        total = tl.load(totals + slot * channels + columns, mask=columns < channels, other=0.0)
        end = _tile(ends + slot * size, columns, numbers, num_states, 1, 0, channels, num_states)
        state = state * tl.exp(total[:, None] * rates) + end
    store_tile(last + batch * size, state, columns, numbers, channels, num_states)


@triton.jit
def read_outputs(
    x, delta, a, write, read, states, out,
    x_b, x_t, x_c, d_b, d_t, d_c, a_c, a_s, w_b, w_t, w_s, r_b, r_t, r_s, tokens, channels,
    num_states, num_chunks, L: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Write y (B, T, C) without gaps."""
    batch, n = tl.program_id(0).to(tl.int64), tl.program_id(2)
    rows, columns = n * L + tl.arange(0, L), tl.program_id(1) * BC + tl.arange(0, BC)
    inside = columns < channels
    steps = _tile(delta + batch * d_b, rows, columns, d_t, d_c, 0, tokens, channels)
    u = _tile(x + batch * x_b, rows, columns, x_t, x_c, 0, tokens, channels) * steps
    write += batch * w_b
    read += batch * r_b
    states += (batch * num_chunks + n) * channels * num_states
    states += columns.to(tl.int64) * num_states
    result = tl.zeros([L, BC], dtype=tl.float32)
    for s in range(num_states):
        rate = tl.load(a + columns.to(tl.int64) * a_c + s * a_s, mask=inside, other=0.0)
        before = tl.load(states + s, mask=inside, other=0.0)
        decay = tl.exp(steps * rate.to(tl.float32)[None, :])
        added = u * _column(write + s * w_s, rows, w_t, 0, tokens)
        decay, h = tl.associative_scan((decay, added), 0, then)
        h += decay * before[None, :]
        result += h * _column(read + s * r_s, rows, r_t, 0, tokens)
    store_tile(out + batch * tokens * channels, result, rows, columns, tokens, channels)


@triton.jit
def input_gradients(
    x, delta, a, write, read, grad_out, states, grad_states,
    grad_x, grad_delta, grad_a, grad_write, grad_read,
    x_b, x_t, x_c, d_b, d_t, d_c, a_c, a_s, w_b, w_t, w_s, r_b, r_t, r_s, o_b, o_t, o_c,
    tokens, channels, num_states, num_chunks, L: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Write the gradients, without gaps: of x and delta (B, T, C); and shares of those of

    a (B, N, C, S), one for every chunk; of write and read (B, M, T, S), one for each of M blocks of
    channels. The states before each token are scanned forward from the chunk's first one, their
    gradients backward from the one after the chunk.
    """
    batch, n = tl.program_id(0).to(tl.int64), tl.program_id(2)
    block = tl.program_id(1)
    rows, columns = n * L + tl.arange(0, L), block * BC + tl.arange(0, BC)
    inside = columns < channels
    x += batch * x_b
    delta += batch * d_b
    write += batch * w_b
    read += batch * r_b
    first = n * L
    steps = _tile(delta, rows, columns, d_t, d_c, 0, tokens, channels)
    earlier = _tile(delta, rows - 1, columns, d_t, d_c, first, tokens, channels)
    later = _tile(delta, rows + 1, columns, d_t, d_c, 0, tokens, channels)
    z = _tile(x, rows, columns, x_t, x_c, 0, tokens, channels)
    u = z * steps
    before_u = _tile(x, rows - 1, columns, x_t, x_c, first, tokens, channels) * earlier
    grad = _tile(grad_out + batch * o_b, rows, columns, o_t, o_c, 0, tokens, channels)
    rest = tl.sum(steps, axis=0)[None, :] - tl.cumsum(steps, axis=0)
    slot = (batch * num_chunks + n) * channels * num_states + columns.to(tl.int64) * num_states
    states += slot
    grad_states += slot
    grad_a += slot
    token = (batch * tl.num_programs(1) + block) * tokens * num_states
    token += rows.to(tl.int64) * num_states
    grad_write += token
    grad_read += token
    grad_u = tl.zeros([L, BC], dtype=tl.float32)
    grad_steps = tl.zeros([L, BC], dtype=tl.float32)
    for s in range(num_states):
        rate = tl.load(a + columns.to(tl.int64) * a_c + s * a_s, mask=inside, other=0.0)
        rate = rate.to(tl.float32)[None, :]
        start = tl.load(states + s, mask=inside, other=0.0)[None, :]
        after = tl.load(grad_states + s, mask=inside, other=0.0)[None, :]
        added = before_u * _column(write + s * w_s, rows - 1, w_t, first, tokens)
        decay, h = tl.associative_scan((tl.exp(earlier * rate), added), 0, then)
        kept = tl.exp(steps * rate) * (h + decay * start)
        w = _column(write + s * w_s, rows, w_t, 0, tokens)
        h = kept + u * w
        own = grad * _column(read + s * r_s, rows, r_t, 0, tokens)
        _, g = tl.associative_scan((tl.exp(later * rate), own), 0, then, reverse=True)
        g += tl.exp(rest * rate) * after
        tl.store(grad_read + s, tl.sum(grad * h, axis=1), mask=rows < tokens)
        tl.store(grad_write + s, tl.sum(u * g, axis=1), mask=rows < tokens)
        grad_u += g * w
        kept *= g  # the gradient of the exponent
        grad_steps += kept * rate
        tl.store(grad_a + s, tl.sum(kept * steps, axis=0), mask=inside)
    offset = batch * tokens * channels
    store_tile(grad_x + offset, grad_u * steps, rows, columns, tokens, channels)
    grad_steps += grad_u * z
    store_tile(grad_delta + offset, grad_steps, rows, columns, tokens, channels)


@triton.jit
def one_token(
    x, delta, a, write, read, state, new_state, out,
    x_b, x_c, d_b, d_c, a_c, a_s, w_b, w_s, r_b, r_s, s_b, s_c, s_s, n_b, n_c, n_s,
    channels, num_states, HAS_STATE: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Update a state, in place where `new_state` is `state`, and read it; out (B, C)."""
    batch = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1).to(tl.int64) * BC + tl.arange(0, BC)
    numbers = tl.arange(0, BS).to(tl.int64)
    inside, in_state = columns < channels, numbers < num_states
    step = tl.load(delta + batch * d_b + columns * d_c, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(x + batch * x_b + columns * x_c, mask=inside, other=0.0).to(tl.float32) * step
    w = tl.load(write + batch * w_b + numbers * w_s, mask=in_state, other=0.0).to(tl.float32)
    r = tl.load(read + batch * r_b + numbers * r_s, mask=in_state, other=0.0).to(tl.float32)
    h = u[:, None] * w[None, :]
    if HAS_STATE:
        rates = _tile(a, columns, numbers, a_c, a_s, 0, channels, num_states)
        old = _tile(state + batch * s_b, columns, numbers, s_c, s_s, 0, channels, num_states)
        h += tl.exp(step[:, None] * rates) * old
    place = new_state + batch * n_b + columns[:, None] * n_c + numbers[None, :] * n_s
    mask = inside[:, None] & in_state[None, :]
    tl.store(place, h.to(new_state.dtype.element_ty), mask=mask)
    result = tl.sum(h * r[None, :], axis=1)
    out += batch * channels + columns
    tl.store(out, result.to(out.dtype.element_ty), mask=inside)
