"""The chunked form: one scan per chunk of tokens, forward and backward.

Shapes: B batch, T tokens, L tokens of a chunk, C channels, S numbers of state per channel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nas_kernels.linear_scan.chunked import reverse_scan, scan_states
from nas_kernels.recurrence import SUM, in_two_levels, recorded

CHUNK_ELEMENTS = 2**17
"""Numbers in each of a chunk's (B, L, C, S) tensors: they should fit the caches near a core."""
CHUNK_ELEMENTS_CUDA = 2**24
"""On a GPU a chunk should fill every core; fewer, larger chunks also mean fewer launches."""


def selective_scan(
    x_BTC: Tensor,
    delta_BTC: Tensor,
    a_CS: Tensor,
    write_BTS: Tensor,
    read_BTS: Tensor,
    state_BCS: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute `recurrent_selective_scan`; same arguments and results.

    The (B, T, C, S) tensors exist for one chunk of tokens at a time; the backward pass computes
    them again from the states before each chunk. Decays are exponentials of negative numbers and
    products of them, so nothing overflows. 16-bit inputs are computed in fp32.

    Source: Gu and Dao 2023, "Mamba", section 3.3.2 (scan, recomputation).
    """
    dtype = torch.promote_types(x_BTC.dtype, torch.float32)
    inputs = [z.to(dtype) for z in (x_BTC, delta_BTC, a_CS, write_BTS, read_BTS)]
    state = inputs[0].new_zeros(x_BTC.shape[0], *a_CS.shape) if state_BCS is None else state_BCS
    inputs.append(state.to(dtype))
    if x_BTC.shape[1] == 1:
        return _step(*inputs)
    if recorded():
        return _in_one_piece(*inputs)
    if torch.is_grad_enabled() and any(z.requires_grad for z in inputs):
        out, last = _SelectiveScan.apply(*inputs)
        return out, last
    out, states = _forward(*inputs)
    return out, states[-1]


def _step(
    x: Tensor, delta: Tensor, a: Tensor, write: Tensor, read: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token: update the state, then read it."""
    added = (delta * x).transpose(1, 2) * write
    state = torch.addcmul(added, (delta.transpose(1, 2) * a).exp(), state)
    return (state * read).sum(dim=-1)[:, None], state


def _in_one_piece(
    x: Tensor, delta: Tensor, a: Tensor, write: Tensor, read: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute `_forward` for a number of tokens that is not known yet."""
    decay, added = (delta[..., None] * a).exp(), (delta * x)[..., None] * write[:, :, None]
    states = in_two_levels(SUM, decay.flatten(2), added.flatten(2), state.flatten(1))
    h_BTCS = states.unflatten(2, a.shape)
    return (h_BTCS * read[:, :, None]).sum(dim=-1), h_BTCS[:, -1]


def _chunk_size(x_BTC: Tensor, a_CS: Tensor) -> int:
    elements = CHUNK_ELEMENTS_CUDA if x_BTC.is_cuda else CHUNK_ELEMENTS
    tokens = max(1, elements // max(x_BTC.shape[0] * a_CS.numel(), 1))
    # A power of two, which `scan_states` need not pad.
    return 1 << (tokens.bit_length() - 1)


def _recur(
    delta_BLC: Tensor, a_CS: Tensor, u_BLC: Tensor, write_BLS: Tensor, state_BCS: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the decays and states of a chunk, (B, L, C, S), for the inputs u = delta x."""
    decay = (delta_BLC[..., None] * a_CS).exp_()
    added = u_BLC[..., None] * write_BLS[:, :, None]
    states = scan_states(decay.flatten(2), added.flatten(2), state_BCS.flatten(1))
    return decay, states.unflatten(2, a_CS.shape)


def _forward(
    x: Tensor, delta: Tensor, a: Tensor, write: Tensor, read: Tensor, state: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Return y, and the states before every chunk and after the last."""
    chunks = (z.split(_chunk_size(x, a), dim=1) for z in (delta, delta * x, write, read))
    outputs, states = [], [state]
    for delta_BLC, u_BLC, write_BLS, read_BLS in zip(*chunks, strict=True):
        _, h_BLCS = _recur(delta_BLC, a, u_BLC, write_BLS, states[-1])
        outputs.append((h_BLCS * read_BLS[:, :, None]).sum(dim=-1))
        states.append(h_BLCS[:, -1].clone())
    return torch.cat(outputs, dim=1), states


class _SelectiveScan(torch.autograd.Function):
    """`_forward` with its gradient: the chunks backward in time, each computed again."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        out, states = _forward(*inputs)
        ctx.save_for_backward(*inputs[:-1], *states[:-1])
        return out, states[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out_BTC: Tensor, grad_BCS: Tensor) -> tuple[Tensor, ...]:
        x, delta, a, write, read, *states = ctx.saved_tensors
        size = _chunk_size(x, a)
        chunks = (z.split(size, dim=1) for z in (x, delta, write, read, grad_out_BTC))
        grad_a, grads = torch.zeros_like(a), []
        for parts, state in reversed(list(zip(zip(*chunks, strict=True), states, strict=True))):
            grad, grad_a_part, grad_BCS = _chunk_gradient(parts, a, state, grad_BCS)
            grad_a += grad_a_part
            grads.append(grad)
        grad_x, grad_delta, grad_write, grad_read = (
            torch.cat(parts[::-1], dim=1) for parts in zip(*grads, strict=True)
        )
        return grad_x, grad_delta, grad_a, grad_write, grad_read, grad_BCS


def _chunk_gradient(
    parts: tuple[Tensor, ...], a: Tensor, state: Tensor, grad_last: Tensor
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor, Tensor]:
    """Return the gradients of (x, delta, write, read), of `a`, and of the state before."""
    x, delta, write, read, grad_out = parts
    u = delta * x
    decay, h = _recur(delta, a, u, write, state)
    grad_read = (grad_out[:, :, None] @ h)[:, :, 0]
    grad_h = grad_out[..., None] * read[:, :, None]
    grad_h[:, -1] += grad_last
    grad_h = reverse_scan(decay.flatten(2), grad_h.flatten(2)).unflatten(2, a.shape)
    grad_write = (u[:, :, None] @ grad_h)[:, :, 0]
    grad_u = (grad_h @ write[..., None])[..., 0]
    decay *= grad_h
    grad_state = decay[:, 0].clone()
    # d exp(delta a): the decay times the state it met.
    decay[:, 0] *= state
    decay[:, 1:] *= h[:, :-1]
    grad_a = (decay * delta[..., None]).sum(dim=(0, 1))
    grad_delta = decay.mul_(a).sum(dim=-1)
    return (grad_u * delta, grad_delta + grad_u * x, grad_write, grad_read), grad_a, grad_state
