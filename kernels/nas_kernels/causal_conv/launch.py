"""Launching the Triton kernels, forward and backward.

Shapes: B batch, T tokens, C channels, W taps, P = W - 1 tokens before.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nas_kernels.dispatch import launching_on
from nas_kernels.launching import cdiv, power_of_two

MAX_BLOCK_TOKENS = 32
MAX_BLOCK_CHANNELS = 64


def causal_conv_kernels(
    x_BTC: Tensor,
    weight_CW: Tensor,
    state_BPC: Tensor | None,
    bias_C: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """Compute `causal_conv` with kernels."""
    with launching_on(x_BTC):
        out, after = _CausalConv.apply(x_BTC, weight_CW, state_BPC, bias_C, silu)
    return out, after


class _CausalConv(torch.autograd.Function):
    """The kernels; the backward pass computes the sums before the activation again."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        state: Tensor | None,
        bias: Tensor | None,
        silu: bool,
    ) -> tuple[Tensor, Tensor]:
        from nas_kernels.causal_conv.triton_kernel import convolve

        (batch, tokens, channels), taps = x.shape, weight.shape[1]
        dtype = torch.promote_types(x.dtype, weight.dtype)
        if bias is not None:
            dtype = torch.promote_types(dtype, bias.dtype)
        kept_as = x.dtype if state is None else torch.promote_types(x.dtype, state.dtype)
        out = torch.empty(batch, tokens, channels, device=x.device, dtype=dtype)
        after = torch.empty(batch, taps - 1, channels, device=x.device, dtype=kept_as)
        grid, constants = _grid(x, tokens)
        tensors, strides = _inputs(x, weight, state, bias)
        convolve[grid](
            *(*tensors, out, after),
            *(*strides, tokens, channels),
            **(constants | _kind(weight, state, bias, silu)),
        )
        ctx.save_for_backward(x, weight, state, bias)
        ctx.set_materialize_grads(False)
        ctx.silu = silu
        return out, after

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_out: Tensor | None, grad_after: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, weight, state, bias = ctx.saved_tensors
        if grad_out is None:
            grad_out = x.new_zeros(1).expand(x.shape)
        grad_sum, grad_weight, grad_bias = _sum_gradients(ctx, x, weight, state, bias, grad_out)
        grad_x = grad_state = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[2]:
            grad_x, grad_state = _input_gradients(x, weight, state, grad_sum, grad_after)
        return grad_x, grad_weight, grad_state, grad_bias, None


def _sum_gradients(
    ctx: Any, x: Tensor, weight: Tensor, state: Tensor | None, bias: Tensor | None, grad: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the gradients of the sums before the activation, of the taps and of the bias."""
    from nas_kernels.causal_conv.triton_kernel import sum_gradients

    of_weight, of_bias = ctx.needs_input_grad[1], ctx.needs_input_grad[3]
    if not (ctx.silu or of_weight or of_bias):
        return grad, None, None
    (batch, tokens, channels), taps = x.shape, weight.shape[1]
    grad_sum = grad
    if ctx.silu:
        grad_sum = torch.empty(x.shape, device=x.device, dtype=grad.dtype)
    grid, constants = _grid(x, tokens)
    shape = (batch, grid[2], taps + 1, channels)
    parts = torch.empty(shape, device=x.device, dtype=torch.float32)
    tensors, strides = _inputs(x, weight, state, bias)
    sum_gradients[grid](
        *(*tensors, grad, grad_sum, parts),
        *(*strides, *grad.stride(), tokens, channels),
        **(constants | _kind(weight, state, bias, ctx.silu)),
    )
    total = parts.sum(dim=(0, 1))
    grad_weight = total[:taps].t().to(weight.dtype) if of_weight else None
    grad_bias = total[taps].to(bias.dtype) if of_bias and bias is not None else None
    return grad_sum, grad_weight, grad_bias


def _input_gradients(
    x: Tensor, weight: Tensor, state: Tensor | None, grad_sum: Tensor, grad_after: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    from nas_kernels.causal_conv.triton_kernel import input_gradients

    tokens, channels, taps = *x.shape[1:], weight.shape[1]
    has_state = state is not None and taps > 1
    grad_x = torch.empty(x.shape, device=x.device, dtype=x.dtype)
    grad_state = None
    if state is not None:
        grad_state = torch.empty(state.shape, device=x.device, dtype=state.dtype)
    grid, constants = _grid(x, tokens + (taps - 1 if has_state else 0))
    after = grad_sum if grad_after is None else grad_after
    input_gradients[grid](
        *(grad_sum, weight, after, grad_x, grad_x if grad_state is None else grad_state),
        *(*grad_sum.stride(), *weight.stride(), *after.stride(), tokens, channels),
        W=taps,
        HAS_STATE=has_state,
        HAS_AFTER=grad_after is not None and taps > 1,
        **constants,
    )
    return grad_x, grad_state


def _grid(x: Tensor, tokens: int) -> tuple[tuple[int, int, int], dict[str, int]]:
    """Return the grid over batch, channels and tokens, and the blocks' sizes."""
    block_t = min(power_of_two(tokens), MAX_BLOCK_TOKENS)
    block_c = min(power_of_two(x.shape[2]), MAX_BLOCK_CHANNELS)
    grid = (x.shape[0], cdiv(x.shape[2], block_c), cdiv(tokens, block_t))
    return grid, {"BT": block_t, "BC": block_c, "num_warps": 4}


def _inputs(
    x: Tensor, weight: Tensor, state: Tensor | None, bias: Tensor | None
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Return what the kernels that convolve read, and the strides."""
    before, added = (x if state is None else state), (weight[:, 0] if bias is None else bias)
    tensors = (x, before, weight, added)
    return tensors, tuple(stride for tensor in tensors for stride in tensor.stride())


def _kind(weight: Tensor, state: Tensor | None, bias: Tensor | None, silu: bool) -> dict[str, Any]:
    taps = weight.shape[1]
    return {
        "W": taps,
        "HAS_STATE": state is not None and taps > 1,
        "HAS_BIAS": bias is not None,
        "SILU": silu,
    }
