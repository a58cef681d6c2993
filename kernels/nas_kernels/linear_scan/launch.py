"""Launching the Triton kernels, forward and backward.

Shapes: B batch, T tokens, N chunks of L tokens, C channels.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nas_kernels import tuning
from nas_kernels.dispatch import launching_on
from nas_kernels.launching import cdiv, empty_like_dense
from nas_kernels.scan_blocks import Blocks, block_choices


def linear_scan_kernels(
    decay_BTC: Tensor, input_BTC: Tensor, state_BC: Tensor | None, chunk: int | None = None
) -> Tensor:
    """Compute every state of `linear_scan`; a chunk is a power of two of tokens."""
    with launching_on(input_BTC):
        states_BTC: Tensor = _LinearScan.apply(decay_BTC, input_BTC, state_BC, chunk)
    return states_BTC


class _LinearScan(torch.autograd.Function):
    """The kernels; the gradient is the same recurrence backward in time."""

    @staticmethod
    def forward(
        ctx: Any, decay: Tensor, x: Tensor, state: Tensor | None, chunk: int | None
    ) -> Tensor:
        out = _scan("linear_scan", (decay, x, state), None, None, chunk)
        ctx.save_for_backward(decay, state, out)
        ctx.types = decay.dtype, x.dtype
        ctx.chunk = chunk
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        decay, state, hidden = ctx.saved_tensors
        decay_dtype, input_dtype = ctx.types
        grad_decay = empty_like_dense(hidden, decay_dtype)
        given = (decay, grad, state)
        grad_input = _scan("linear_scan backward", given, hidden, grad_decay, ctx.chunk)
        grad_state = None
        if state is not None:
            grad_state = (grad_input[:, 0] * decay[:, 0]).to(state.dtype)
        return grad_decay, grad_input.to(input_dtype), grad_state, None


def _scan(
    operation: str,
    given: tuple[Tensor, Tensor, Tensor | None],
    hidden: Tensor | None,
    grad_decay: Tensor | None,
    chunk: int | None,
) -> Tensor:
    """Return the states; with `hidden`, the states of before, their gradients, and `grad_decay`.

    Args:
        operation: to choose blocks for.
        given: decay, input and first state.
        hidden: every state, for the gradients.
        grad_decay: written where `hidden` is given.
        chunk: what the caller asks for.
    """
    x = given[1]
    candidates = block_choices(x.shape, chunk)
    blocks = candidates[0]
    if tuning.wanted():
        key, run = tuning.rounded(*x.shape, x.dtype), partial(_launch, *given, hidden, grad_decay)
        blocks = tuning.choose(operation, key, candidates, run)
    return _launch(*given, hidden, grad_decay, blocks)


def _launch(
    decay: Tensor,
    x: Tensor,
    state: Tensor | None,
    hidden: Tensor | None,
    grad_decay: Tensor | None,
    blocks: Blocks,
) -> Tensor:
    from nas_kernels.linear_scan.triton_kernel import pass_states, sum_chunks, write_states

    batch, tokens, channels = x.shape
    grid = (batch, cdiv(channels, blocks.channels), cdiv(tokens, blocks.chunk))
    out = torch.empty(x.shape, device=x.device, dtype=torch.float32)
    products = torch.empty(batch, grid[2], channels, device=x.device, dtype=torch.float32)
    ends, states = empty_like_dense(products), empty_like_dense(products)
    constants = {"L": blocks.chunk, "BC": blocks.channels, "num_warps": blocks.warps}
    constants["REVERSE"] = hidden is not None
    strides = (*decay.stride(), *x.stride())
    sum_chunks[grid](decay, x, products, ends, *strides, tokens, channels, **constants)
    first = products[:, 0] if state is None else state
    pass_states[grid[:2]](
        *(products, ends, first, states, *first.stride(), channels, grid[2]),
        HAS_START=state is not None and hidden is None,
        BC=blocks.channels,
        num_warps=1,
    )
    hidden, grad_decay = (
        (out if hidden is None else hidden),
        (out if grad_decay is None else grad_decay),
    )
    write_states[grid](
        *(decay, x, states, first, hidden, out, grad_decay),
        *(*strides, *first.stride(), tokens, channels),
        HAS_START=state is not None,
        **constants,
    )
    return out
