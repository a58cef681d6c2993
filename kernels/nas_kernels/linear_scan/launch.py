"""Launching the Triton kernels, forward and backward.

Shapes: B batch, T tokens, N chunks of L tokens, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nas_kernels.dispatch import launching_on
from nas_kernels.launching import cdiv, empty_like_dense, power_of_two

MAX_CHUNK = 64
MAX_BLOCK = 32
"""Channels of a program."""


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
        out = torch.empty(x.shape, device=x.device, dtype=torch.float32)
        _scan(decay, x, state, out, None, None, chunk)
        ctx.save_for_backward(decay, state, out)
        ctx.types = decay.dtype, x.dtype
        ctx.chunk = chunk
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        decay, state, hidden = ctx.saved_tensors
        decay_dtype, input_dtype = ctx.types
        grad_input = torch.empty(hidden.shape, device=hidden.device, dtype=torch.float32)
        grad_decay = empty_like_dense(hidden, decay_dtype)
        _scan(decay, grad, state, grad_input, hidden, grad_decay, ctx.chunk)
        grad_state = None
        if state is not None:
            grad_state = (grad_input[:, 0] * decay[:, 0]).to(state.dtype)
        return grad_decay, grad_input.to(input_dtype), grad_state, None


def _scan(
    decay: Tensor,
    x: Tensor,
    state: Tensor | None,
    out: Tensor,
    hidden: Tensor | None,
    grad_decay: Tensor | None,
    chunk: int | None,
) -> None:
    """Fill `out` with the states; with `hidden`, the states of before, with their gradients."""
    from nas_kernels.linear_scan.triton_kernel import pass_states, sum_chunks, write_states

    batch, tokens, channels = x.shape
    length = chunk or min(power_of_two(tokens), MAX_CHUNK)
    block = min(power_of_two(channels), MAX_BLOCK)
    grid = (batch, cdiv(channels, block), cdiv(tokens, length))
    products = torch.empty(batch, grid[2], channels, device=x.device, dtype=torch.float32)
    ends, states = empty_like_dense(products), empty_like_dense(products)
    constants = {"REVERSE": hidden is not None, "L": length, "BC": block, "num_warps": 4}
    strides = (*decay.stride(), *x.stride())
    sum_chunks[grid](decay, x, products, ends, *strides, tokens, channels, **constants)
    first = products[:, 0] if state is None else state
    pass_states[grid[:2]](
        *(products, ends, first, states, *first.stride(), channels, grid[2]),
        HAS_START=state is not None and hidden is None,
        BC=block,
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
