"""Device code: a depthwise causal convolution, forward and backward.

A program has a block of tokens and a block of channels; sums are in fp32.

Shapes: B batch, T tokens, C channels, W taps, P = W - 1 tokens before.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tokens(
    x, state, rows, columns, x_t, x_c, s_t, s_c, tokens, channels, W: tl.constexpr,
    HAS_STATE: tl.constexpr,
):  # fmt: skip
    """Load tokens in fp32, (rows, channels): row -1 is the state's last one; zeros outside."""
    inside = columns[None, :] < channels
    mask = (rows[:, None] >= 0) & (rows[:, None] < tokens) & inside
    at = columns[None, :].to(tl.int64)
    found = tl.load(x + rows[:, None].to(tl.int64) * x_t + at * x_c, mask=mask, other=0.0)
    found = found.to(tl.float32)
    if HAS_STATE:
        earlier = rows[:, None] + (W - 1)
        mask = (rows[:, None] < 0) & (earlier >= 0) & inside
        before = tl.load(state + earlier.to(tl.int64) * s_t + at * s_c, mask=mask, other=0.0)
        found += before.to(tl.float32)
    return found


@triton.jit
def _convolved(
    x, state, weight, bias, rows, columns, x_t, x_c, s_t, s_c, w_c, w_w, bias_c, tokens, channels,
    W: tl.constexpr, HAS_STATE: tl.constexpr, HAS_BIAS: tl.constexpr, BT: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """Return the weighted sums before the activation."""
    inside, at = columns < channels, columns.to(tl.int64)
    total = tl.zeros([BT, BC], dtype=tl.float32)
    for tap in tl.static_range(W):
        found = _tokens(
            x, state, rows - tap, columns, x_t, x_c, s_t, s_c, tokens, channels, W, HAS_STATE
        )
        factor = tl.load(weight + at * w_c + tap * w_w, mask=inside, other=0.0)
        total += found * factor.to(tl.float32)[None, :]
    if HAS_BIAS:
        added = tl.load(bias + at * bias_c, mask=inside, other=0.0)
        total += added.to(tl.float32)[None, :]
    return total


@triton.jit
def convolve(
    x, state, weight, bias, out, after,
    x_b, x_t, x_c, s_b, s_t, s_c, w_c, w_w, bias_c, tokens, channels,
    W: tl.constexpr, HAS_STATE: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Write the result (B, T, C) and the last W - 1 inputs (B, P, C), both without gaps."""
    batch = tl.program_id(0).to(tl.int64)
    rows, columns = tl.program_id(2) * BT + tl.arange(0, BT), tl.program_id(1) * BC
    columns += tl.arange(0, BC)
    x += batch * x_b
    state += batch * s_b
    total = _convolved(
        x, state, weight, bias, rows, columns, x_t, x_c, s_t, s_c, w_c, w_w, bias_c, tokens,
        channels, W, HAS_STATE, HAS_BIAS, BT, BC,
    )  # fmt: skip
    if SILU:
        total *= tl.sigmoid(total)
    inside = columns[None, :] < channels
    places = rows[:, None].to(tl.int64) * channels + columns[None, :]
    out += batch * tokens * channels
    tl.store(out + places, total.to(out.dtype.element_ty), (rows[:, None] < tokens) & inside)
    if tl.program_id(2) == 0:
        kept = tl.arange(0, 8)
        last = _tokens(
            x, state, kept + (tokens - (W - 1)), columns, x_t, x_c, s_t, s_c, tokens, channels,
            W, HAS_STATE,
        )  # fmt: skip
        kept_at = kept[:, None].to(tl.int64) * channels + columns[None, :]
        kept_at += batch * (W - 1) * channels
        kept_in = (kept[:, None] < W - 1) & inside
        tl.store(after + kept_at, last.to(after.dtype.element_ty), kept_in)


@triton.jit
def sum_gradients(
    x, state, weight, bias, grad_out, grad_sum, parts,
    x_b, x_t, x_c, s_b, s_t, s_c, w_c, w_w, bias_c, o_b, o_t, o_c, tokens, channels,
    W: tl.constexpr, HAS_STATE: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Write the gradient of the sums (only with SILU, else it is `grad_out`), without gaps.

    And this block of tokens' share of the taps' and the bias' gradient: (B, blocks, W + 1, C).
    """
    batch = tl.program_id(0).to(tl.int64)
    block = tl.program_id(2)
    rows, columns = block * BT + tl.arange(0, BT), tl.program_id(1) * BC + tl.arange(0, BC)
    x += batch * x_b
    state += batch * s_b
    inside, at = columns < channels, columns.to(tl.int64)
    mask = (rows[:, None] < tokens) & inside[None, :]
    grad_out += batch * o_b + rows[:, None].to(tl.int64) * o_t + at[None, :] * o_c
    grad = tl.load(grad_out, mask=mask, other=0.0).to(tl.float32)
    if SILU:
        total = _convolved(
            x, state, weight, bias, rows, columns, x_t, x_c, s_t, s_c, w_c, w_w, bias_c, tokens,
            channels, W, HAS_STATE, HAS_BIAS, BT, BC,
        )  # fmt: skip
        gate = tl.sigmoid(total)
        grad *= gate * (1.0 + total * (1.0 - gate))
        grad_sum += batch * tokens * channels
        places = rows[:, None].to(tl.int64) * channels + at[None, :]
        tl.store(grad_sum + places, grad.to(grad_sum.dtype.element_ty), mask)
    parts += (batch * tl.num_programs(2) + block) * (W + 1) * channels + at
    for tap in tl.static_range(W):
        found = _tokens(
            x, state, rows - tap, columns, x_t, x_c, s_t, s_c, tokens, channels, W, HAS_STATE
        )
        tl.store(parts + tap * channels, tl.sum(found * grad, axis=0), inside)
    tl.store(parts + W * channels, tl.sum(grad, axis=0), inside)


@triton.jit
def input_gradients(
    grad_sum, weight, grad_after, grad_x, grad_state,
    u_b, u_t, u_c, w_c, w_w, a_b, a_t, a_c, tokens, channels,
    W: tl.constexpr, HAS_STATE: tl.constexpr, HAS_AFTER: tl.constexpr, BT: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """Write the gradients of the tokens and of the state before them, both without gaps."""
    batch = tl.program_id(0).to(tl.int64)
    rows, columns = tl.program_id(2) * BT + tl.arange(0, BT), tl.program_id(1) * BC
    columns += tl.arange(0, BC)
    if HAS_STATE:
        rows -= W - 1
    inside, at = columns < channels, columns.to(tl.int64)
    total = tl.zeros([BT, BC], dtype=tl.float32)
    for tap in tl.static_range(W):
        later = rows[:, None] + tap
        mask = (later >= 0) & (later < tokens) & inside[None, :]
        places = batch * u_b + later.to(tl.int64) * u_t + at[None, :] * u_c
        grad = tl.load(grad_sum + places, mask=mask, other=0.0)
        factor = tl.load(weight + at * w_c + tap * w_w, mask=inside, other=0.0)
        total += grad.to(tl.float32) * factor.to(tl.float32)[None, :]
    if HAS_AFTER:
        kept = rows[:, None] - (tokens - (W - 1))
        mask = (kept >= 0) & (kept < W - 1) & inside[None, :]
        places = batch * a_b + kept.to(tl.int64) * a_t + at[None, :] * a_c
        total += tl.load(grad_after + places, mask=mask, other=0.0).to(tl.float32)
    mask = (rows[:, None] >= 0) & (rows[:, None] < tokens) & inside[None, :]
    grad_x += batch * tokens * channels
    places = rows[:, None].to(tl.int64) * channels + at[None, :]
    tl.store(grad_x + places, total.to(grad_x.dtype.element_ty), mask)
    if HAS_STATE:
        grad_state += batch * (W - 1) * channels
        earlier = rows[:, None] + (W - 1)
        mask = (rows[:, None] < 0) & (earlier >= 0) & inside[None, :]
        places = earlier.to(tl.int64) * channels + at[None, :]
        tl.store(grad_state + places, total.to(grad_state.dtype.element_ty), mask)
