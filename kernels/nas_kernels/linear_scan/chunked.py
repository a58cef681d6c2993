"""The chunked form: all chunks go through their tokens side by side, then hand on their states.

Shapes: B batch, T tokens, N chunks of L tokens, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from nas_kernels.recurrence import SUM, in_two_levels, recorded


def linear_scan(
    decay_BTC: Tensor, input_BTC: Tensor, state_BC: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute `recurrent_linear_scan` in about 2 sqrt(T) steps; same arguments and results.

    Only products of decays occur, never a quotient or an exponential, so nothing overflows for
    decays in [0, 1] and a decay of zero is exact. 16-bit inputs are computed in fp32. The gradient
    is such a recurrence itself and keeps no more than the decays and the results.

    Source: Blelloch 1990, "Prefix Sums and Their Applications", section 1.4 (linear recurrences as
    scans; blocks per processor in section 1.2.1); Martin and Cundy 2018, "Parallelizing Linear
    Recurrent Neural Nets Over Sequence Length", section 2.2 (the gradient is a scan).
    """
    dtype = torch.promote_types(input_BTC.dtype, torch.float32)
    decay, x = decay_BTC.to(dtype), input_BTC.to(dtype)
    state = x.new_zeros(x.shape[0], x.shape[2]) if state_BC is None else state_BC.to(dtype)
    if x.shape[1] == 1:
        last = torch.addcmul(x[:, 0], decay[:, 0], state)
        return last[:, None], last
    if recorded():
        states = in_two_levels(SUM, decay, x, state)
        return states, states[:, -1]
    needs_grad = decay.requires_grad or x.requires_grad or state.requires_grad
    if torch.is_grad_enabled() and needs_grad:
        states = _Scan.apply(decay, x, state)
    else:
        states = scan_states(decay, x, state)
    # A copy: the last state outlives the others.
    return states, states[:, -1].clone()


def _chunks(x_BTC: Tensor) -> Tensor:
    """Return a copy, (B, N, L, C) with N and L near sqrt(T), zeros at the end."""
    tokens = x_BTC.shape[1]
    # A power of two: the usual lengths need no padding.
    chunk = 1 << (((tokens - 1).bit_length() + 1) // 2)
    num_chunks = -(-tokens // chunk)
    pad = num_chunks * chunk - tokens
    copy = F.pad(x_BTC, (0, 0, 0, pad)) if pad else x_BTC.clone()
    return copy.unflatten(1, (num_chunks, chunk))


def scan_states(decay_BTC: Tensor, input_BTC: Tensor, state_BC: Tensor) -> Tensor:
    """Return every state, (B, T, C); for tensors that autograd does not track."""
    product, states = _chunks(decay_BTC), _chunks(input_BTC)
    for i in range(1, states.shape[2]):
        states[:, :, i].addcmul_(product[:, :, i], states[:, :, i - 1])
        product[:, :, i].mul_(product[:, :, i - 1])
    before = [state_BC]
    for n in range(states.shape[1] - 1):
        before.append(torch.addcmul(states[:, n, -1], product[:, n, -1], before[-1]))
    states.addcmul_(product, torch.stack(before, dim=1)[:, :, None])
    return states.flatten(1, 2)[:, : input_BTC.shape[1]]


def reverse_scan(decay_BTC: Tensor, input_BTC: Tensor) -> Tensor:
    """Return `g_t = input_t + decay_{t+1} g_{t+1}`, (B, T, C): the gradient's recurrence.

    For tensors that autograd does not track.
    """
    product, states = _chunks(decay_BTC), _chunks(input_BTC)
    first, last = product[:, :, 0].clone(), states.shape[2] - 1
    for i in reversed(range(last)):
        states[:, :, i].addcmul_(product[:, :, i + 1], states[:, :, i + 1])
    for i in reversed(range(last)):
        product[:, :, i].mul_(product[:, :, i + 1])
    # What a chunk hands to the one before it: decay_t g_t of its first token.
    own = first * states[:, :, 0]
    after = [torch.zeros_like(own[:, 0])]
    for n in range(states.shape[1] - 1, 0, -1):
        after.append(torch.addcmul(own[:, n], product[:, n, 0], after[-1]))
    after_BNC = torch.stack(after[::-1], dim=1)
    states[:, :, :-1].addcmul_(product[:, :, 1:], after_BNC[:, :, None])
    states[:, :, -1].add_(after_BNC)
    return states.flatten(1, 2)[:, : input_BTC.shape[1]]


class _Scan(torch.autograd.Function):
    """`scan_states` with its gradient: the same recurrence backward in time."""

    @staticmethod
    def forward(decay_BTC: Tensor, input_BTC: Tensor, state_BC: Tensor) -> Tensor:
        return scan_states(decay_BTC, input_BTC, state_BC)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        decay_BTC, _, state_BC = inputs
        ctx.save_for_backward(decay_BTC, state_BC, output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        decay, state, states = ctx.saved_tensors
        grad = reverse_scan(decay, grad_BTC)
        before = torch.cat([state[:, None], states[:, :-1]], dim=1)
        return before.mul_(grad), grad, grad[:, 0] * decay[:, 0]
