"""Device code: a first-order recurrence in chunks of L tokens, in either direction of time.

Inside a chunk all states are the prefixes of an associative product; only products of decays occur,
so a decay of 0 is exact.

Shapes: B batch, T tokens, N chunks of L tokens, C channels.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from nas_kernels.tiles.triton_kernel import then


@triton.jit
def _scanned(
    decay, x, d_b, d_t, d_c, x_b, x_t, x_c, tokens, channels,
    REVERSE: tl.constexpr, L: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Return a chunk's products of decays and its states when it starts from 0, (L, BC).

    REVERSE: `g_t = x_t + decay_(t+1) g_(t+1)`, the chunk's last token first.
    """
    batch = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(2) * L + tl.arange(0, L)
    columns = tl.program_id(1) * BC + tl.arange(0, BC)
    times, decayed = rows, rows
    if REVERSE:
        times, decayed = tokens - 1 - rows, tokens - rows
    inside = columns[None, :] < channels
    decayed, times, at = decayed[:, None], times[:, None], columns[None, :].to(tl.int64)
    mask = (rows[:, None] < tokens) & (decayed < tokens) & inside
    places = batch * d_b + decayed.to(tl.int64) * d_t + at * d_c
    factor = tl.load(decay + places, mask=mask, other=0.0).to(tl.float32)
    places = batch * x_b + times.to(tl.int64) * x_t + at * x_c
    added = tl.load(x + places, mask=(rows[:, None] < tokens) & inside, other=0.0)
    # Behind the last token the state stays what it is.
    factor = tl.where(rows[:, None] < tokens, factor, 1.0)
    return tl.associative_scan((factor, added.to(tl.float32)), 0, then)


@triton.jit
def sum_chunks(
    decay, x, products, ends, d_b, d_t, d_c, x_b, x_t, x_c, tokens, channels,
    REVERSE: tl.constexpr, L: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Write the product of every chunk's decays and what it adds to a state, (B, N, C)."""
    product, h = _scanned(decay, x, d_b, d_t, d_c, x_b, x_t, x_c, tokens, channels, REVERSE, L, BC)
    last = (tl.arange(0, L) == L - 1)[:, None]
    columns = tl.program_id(1) * BC + tl.arange(0, BC)
    slot = tl.program_id(0).to(tl.int64) * tl.num_programs(2) + tl.program_id(2)
    mask = columns < channels
    places = slot * channels + columns
    tl.store(products + places, tl.sum(tl.where(last, product, 0.0), axis=0), mask=mask)
    tl.store(ends + places, tl.sum(tl.where(last, h, 0.0), axis=0), mask=mask)


@triton.jit
def pass_states(
    products, ends, start, states, s_b, s_c, channels, num_chunks,
    HAS_START: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Write the state before every chunk, (B, N, C)."""
    batch = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BC + tl.arange(0, BC)
    mask = columns < channels
    state = tl.zeros([BC], dtype=tl.float32)
    if HAS_START:
        place = start + batch * s_b + columns.to(tl.int64) * s_c
        state = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    for n in range(num_chunks):
        places = (batch * num_chunks + n) * channels + columns
        tl.store(states + places, state, mask=mask)
        product = tl.load(products + places, mask=mask, other=0.0)
        state = state * product + tl.load(ends + places, mask=mask, other=0.0)


@triton.jit
def write_states(
    decay, x, states, start, hidden, out, grad_decay,
    d_b, d_t, d_c, x_b, x_t, x_c, s_b, s_c, tokens, channels,
    HAS_START: tl.constexpr, REVERSE: tl.constexpr, L: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Write every state (B, T, C) without gaps.

    REVERSE: these are the gradients of the additions; those of the decays are written as well,
    from what `hidden` (B, T, C) and `start` held.
    """
    product, h = _scanned(decay, x, d_b, d_t, d_c, x_b, x_t, x_c, tokens, channels, REVERSE, L, BC)
    batch = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BC + tl.arange(0, BC)
    slot = batch * tl.num_programs(2) + tl.program_id(2)
    inside = columns < channels
    before = tl.load(states + slot * channels + columns, mask=inside, other=0.0)
    h += product * before[None, :]
    rows = tl.program_id(2) * L + tl.arange(0, L)
    mask = (rows[:, None] < tokens) & inside[None, :]
    times = rows
    if REVERSE:
        times = tokens - 1 - rows
    offset = batch * tokens * channels
    places = offset + times[:, None].to(tl.int64) * channels + columns[None, :]
    tl.store(out + places, h, mask=mask)
    if REVERSE:
        earlier = mask & (times[:, None] > 0)
        held = tl.load(hidden + (places - channels), mask=earlier, other=0.0)
        if HAS_START:
            first = tl.load(start + batch * s_b + columns.to(tl.int64) * s_c, inside, other=0.0)
            held += tl.where(times[:, None] == 0, first.to(tl.float32)[None, :], 0.0)
        tl.store(grad_decay + places, (h * held).to(grad_decay.dtype.element_ty), mask=mask)
