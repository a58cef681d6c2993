"""Launching the Triton kernels, forward and backward.

Shapes: B batch, T tokens, N chunks of L tokens, C channels, S numbers of state per channel.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nas_kernels import tuning
from nas_kernels.dispatch import launching_on
from nas_kernels.launching import cdiv, empty_like_dense, step_tile
from nas_kernels.scan_blocks import MAX_CHANNELS, Blocks, block_choices


def selective_scan_kernels(
    x_BTC: Tensor,
    delta_BTC: Tensor,
    a_CS: Tensor,
    write_BTS: Tensor,
    read_BTS: Tensor,
    state_BCS: Tensor | None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute `selective_scan` with kernels; a chunk is a power of two of tokens."""
    inputs = (x_BTC, delta_BTC, a_CS, write_BTS, read_BTS, state_BCS)
    with launching_on(x_BTC):
        out, last = _SelectiveScan.apply(*inputs, chunk)
    return out, last


def step_kernel(
    x_BC: Tensor,
    delta_BC: Tensor,
    a_CS: Tensor,
    write_BS: Tensor,
    read_BS: Tensor,
    state_BCS: Tensor | None,
    new_state_BCS: Tensor,
) -> Tensor:
    """Write the state after one token, which may be the one before it, and return y (B, C)."""
    from nas_kernels.selective_scan.triton_kernel import one_token

    (batch, channels), num_states = x_BC.shape, a_CS.shape[1]
    out = torch.empty(batch, channels, device=x_BC.device, dtype=torch.float32)
    old = new_state_BCS if state_BCS is None else state_BCS
    block_s, block_c, num_warps = step_tile(num_states, channels)
    tensors = (x_BC, delta_BC, a_CS, write_BS, read_BS, old, new_state_BCS)
    with launching_on(x_BC):
        one_token[(batch, cdiv(channels, block_c))](
            *(*tensors, out),
            *(stride for x in tensors for stride in x.stride()),
            *(channels, num_states),
            HAS_STATE=state_BCS is not None,
            BC=block_c,
            BS=block_s,
            num_warps=num_warps,
        )
    return out


@dataclass(frozen=True)
class _Plan:
    """What the kernels of one call have in common."""

    batch: int
    tokens: int
    channels: int
    num_states: int
    blocks: Blocks

    @property
    def num_chunks(self) -> int:
        return cdiv(self.tokens, self.blocks.chunk)

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.batch, cdiv(self.channels, self.blocks.channels), self.num_chunks

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        return self.tokens, self.channels, self.num_states, self.num_chunks

    def constants(self) -> dict[str, int]:
        blocks = self.blocks
        return {"L": blocks.chunk, "BC": blocks.channels, "num_warps": blocks.warps}

    def empty(self, like: Tensor, *shape: int) -> Tensor:
        return torch.empty(self.batch, *shape, device=like.device, dtype=torch.float32)


def _plan(x: Tensor, a: Tensor, blocks: Blocks) -> _Plan:
    batch, tokens, channels = x.shape
    return _Plan(batch, tokens, channels, a.shape[1], blocks)


class _SelectiveScan(torch.autograd.Function):
    """The kernels; the backward pass computes the states again."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        delta: Tensor,
        a: Tensor,
        write: Tensor,
        read: Tensor,
        state: Tensor | None,
        chunk: int | None,
    ) -> tuple[Tensor, Tensor]:
        given = (x, delta, a, write, read, state)
        candidates = block_choices(x.shape, chunk)
        blocks = candidates[0]
        if tuning.wanted():
            key = tuning.rounded(*x.shape, a.shape[1], x.dtype)
            blocks = tuning.choose("selective_scan", key, candidates, partial(_forward, *given))
        out, last = _forward(*given, blocks)
        ctx.save_for_backward(*given)
        ctx.set_materialize_grads(False)
        ctx.chunk = chunk
        return out, last

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_out: Tensor | None, grad_last: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, _, a, *_ = saved = ctx.saved_tensors
        if grad_out is None:
            grad_out = x.new_zeros(1).expand(x.shape)
        given = (saved, grad_out, grad_last)
        candidates = block_choices(x.shape, ctx.chunk)
        blocks = candidates[0]
        if tuning.wanted():
            key, run = tuning.rounded(*x.shape, a.shape[1], x.dtype), partial(_backward, *given)
            blocks = tuning.choose("selective_scan backward", key, candidates, run)
        return *_backward(*given, blocks), None


def _forward(
    x: Tensor,
    delta: Tensor,
    a: Tensor,
    write: Tensor,
    read: Tensor,
    state: Tensor | None,
    blocks: Blocks,
) -> tuple[Tensor, Tensor]:
    """Return outputs and the last state."""
    from nas_kernels.selective_scan.triton_kernel import read_outputs

    plan = _plan(x, a, blocks)
    states, last = _pass_states(plan, x, delta, a, write, state, backward=False)
    out = torch.empty(x.shape, device=x.device, dtype=torch.float32)
    inputs = (x, delta, a, write, read)
    read_outputs[plan.grid](
        *(*inputs, states, out),
        *(stride for z in inputs for stride in z.stride()),
        *plan.sizes,
        **plan.constants(),
    )
    return out, last


def _backward(
    saved: tuple[Tensor, ...], grad_out: Tensor, grad_last: Tensor | None, blocks: Blocks
) -> tuple[Tensor | None, ...]:
    """Return the gradients of what was saved."""
    from nas_kernels.selective_scan.triton_kernel import input_gradients

    *inputs, state = saved
    x, delta, a, write, read = inputs
    plan = _plan(x, a, blocks)
    states, _ = _pass_states(plan, x, delta, a, write, state, backward=False)
    grad_states, grad_start = _pass_states(plan, grad_out, delta, a, read, grad_last, backward=True)
    grad_x, grad_delta = empty_like_dense(x), empty_like_dense(delta)
    grad_a = plan.empty(a, plan.num_chunks, plan.channels, plan.num_states)
    shares = (plan.grid[1], plan.tokens, plan.num_states)
    grad_write, grad_read = plan.empty(a, *shares), plan.empty(a, *shares)
    input_gradients[plan.grid](
        *(*inputs, grad_out, states, grad_states),
        *(grad_x, grad_delta, grad_a, grad_write, grad_read),
        *(stride for z in (*inputs, grad_out) for stride in z.stride()),
        *plan.sizes,
        # Ten tiles live through its loop: four warps would spill registers.
        **(plan.constants() | {"num_warps": 8}),
    )
    return (
        grad_x,
        grad_delta,
        grad_a.sum(dim=(0, 1)).to(a.dtype),
        grad_write.sum(dim=1).to(write.dtype),
        grad_read.sum(dim=1).to(read.dtype),
        None if state is None else grad_start.to(state.dtype),
    )


def _pass_states(
    plan: _Plan,
    x: Tensor,
    delta: Tensor,
    a: Tensor,
    vector: Tensor,
    start: Tensor | None,
    backward: bool,
) -> tuple[Tensor, Tensor]:
    """Return the states before all chunks (B, N, C, S) and the last one (B, C, S).

    Backward: the gradients of the states after all chunks, and of the one before the first.
    """
    from nas_kernels.selective_scan.triton_kernel import pass_states, sum_chunks

    ends = plan.empty(a, plan.num_chunks, plan.channels, plan.num_states)
    totals = plan.empty(a, plan.num_chunks, plan.channels)
    inputs = (x, delta, a, vector)
    sum_chunks[plan.grid](
        *(*inputs, ends, totals),
        *(stride for z in inputs for stride in z.stride()),
        *plan.sizes,
        BACKWARD=backward,
        **plan.constants(),
    )
    states, last = empty_like_dense(ends), plan.empty(a, plan.channels, plan.num_states)
    first = last if start is None else start
    block_s, block_c, num_warps = step_tile(plan.num_states, plan.channels)
    block_c = min(block_c, MAX_CHANNELS)
    pass_states[(plan.batch, cdiv(plan.channels, block_c))](
        *(a, ends, totals, first, states, last),
        *(*a.stride(), *first.stride(), plan.channels, plan.num_states, plan.num_chunks),
        HAS_START=start is not None,
        BACKWARD=backward,
        BC=block_c,
        BS=block_s,
        num_warps=num_warps,
    )
    return states, last
