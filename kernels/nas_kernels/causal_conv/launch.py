"""Launching the Triton kernels, forward and backward.

Shapes: B batch, T tokens, C channels, W taps, P = W - 1 tokens before.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nas_kernels import tuning
from nas_kernels.dispatch import launching_on
from nas_kernels.launching import cdiv, power_of_two

MAX_TOKENS = 32
MAX_CHANNELS = 64
Inputs = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
"""Tokens, taps, the tokens before and the bias."""


class Blocks(NamedTuple):
    """Tokens and channels of a program, and its warps."""

    tokens: int
    channels: int
    warps: int = 4


def block_choices(shape_BTC: torch.Size) -> tuple[Blocks, ...]:
    """Return the blocks to choose from, the default first."""
    _, tokens, channels = (power_of_two(size) for size in shape_BTC)
    return _block_choices(min(tokens, MAX_TOKENS), min(channels, 4 * MAX_CHANNELS))


@cache
def _block_choices(tokens: int, most: int) -> tuple[Blocks, ...]:
    channels, more = min(most, MAX_CHANNELS), min(most, 2 * MAX_CHANNELS)
    shorter = max(tokens // 2, 1)
    found = [Blocks(tokens, channels), Blocks(tokens, channels, 8), Blocks(shorter, channels)]
    found += [Blocks(shorter, more), Blocks(tokens, more, 8), Blocks(2 * tokens, channels, 8)]
    found += [Blocks(max(tokens // 4, 1), most), Blocks(2 * tokens, min(most, 32))]
    return tuple(dict.fromkeys(found))


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
        inputs = (x, weight, state, bias)
        candidates = block_choices(x.shape)
        blocks = candidates[0]
        if tuning.wanted():
            run, key = partial(_convolve, inputs, silu), _key(x, weight, silu)
            blocks = tuning.choose("causal_conv", key, candidates, run)
        out, after = _convolve(inputs, silu, blocks)
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)
        ctx.silu = silu
        return out, after

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_out: Tensor | None, grad_after: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, weight, _, _ = inputs = ctx.saved_tensors
        if grad_out is None:
            grad_out = x.new_zeros(1).expand(x.shape)
        given = (inputs, ctx.silu, grad_out, grad_after, ctx.needs_input_grad)
        candidates = block_choices(x.shape)
        blocks = candidates[0]
        if tuning.wanted():
            run, key = partial(_backward, *given), _key(x, weight, ctx.silu)
            blocks = tuning.choose("causal_conv backward", key, candidates, run)
        return *_backward(*given, blocks), None


def _key(x: Tensor, weight: Tensor, silu: bool) -> tuning.Key:
    """Return what the choice of blocks depends on."""
    return tuning.rounded(*x.shape, weight.shape[1], silu, x.dtype)


def _convolve(inputs: Inputs, silu: bool, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """Return the result and the last tokens."""
    from nas_kernels.causal_conv.triton_kernel import convolve

    x, weight, state, bias = inputs
    (batch, tokens, channels), taps = x.shape, weight.shape[1]
    dtype = torch.promote_types(x.dtype, weight.dtype)
    if bias is not None:
        dtype = torch.promote_types(dtype, bias.dtype)
    kept_as = x.dtype if state is None else torch.promote_types(x.dtype, state.dtype)
    out = torch.empty(batch, tokens, channels, device=x.device, dtype=dtype)
    after = torch.empty(batch, taps - 1, channels, device=x.device, dtype=kept_as)
    grid, constants = _grid(x, tokens, blocks)
    tensors, strides = _tensors(inputs)
    convolve[grid](
        *(*tensors, out, after),
        *(*strides, tokens, channels),
        **(constants | _kind(inputs, silu)),
    )
    return out, after


def _backward(
    inputs: Inputs,
    silu: bool,
    grad_out: Tensor,
    grad_after: Tensor | None,
    wanted: tuple[bool, ...],
    blocks: Blocks,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of the inputs."""
    grad_sum, grad_weight, grad_bias = _sum_gradients(
        inputs, silu, grad_out, wanted[1], wanted[3], blocks
    )
    grad_x = grad_state = None
    if wanted[0] or wanted[2]:
        grad_x, grad_state = _input_gradients(*inputs[:3], grad_sum, grad_after, blocks)
    return grad_x, grad_weight, grad_state, grad_bias


def _sum_gradients(
    inputs: Inputs, silu: bool, grad: Tensor, of_weight: bool, of_bias: bool, blocks: Blocks
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the gradients of the sums before the activation, of the taps and of the bias."""
    from nas_kernels.causal_conv.triton_kernel import sum_gradients

    if not (silu or of_weight or of_bias):
        return grad, None, None
    x, weight, _, bias = inputs
    (batch, tokens, channels), taps = x.shape, weight.shape[1]
    grad_sum = torch.empty(x.shape, device=x.device, dtype=grad.dtype) if silu else grad
    grid, constants = _grid(x, tokens, blocks)
    shape = (batch, grid[2], taps + 1, channels)
    parts = torch.empty(shape, device=x.device, dtype=torch.float32)
    tensors, strides = _tensors(inputs)
    sum_gradients[grid](
        *(*tensors, grad, grad_sum, parts),
        *(*strides, *grad.stride(), tokens, channels),
        **(constants | _kind(inputs, silu)),
    )
    total = parts.sum(dim=(0, 1))
    grad_weight = total[:taps].t().to(weight.dtype) if of_weight else None
    grad_bias = total[taps].to(bias.dtype) if of_bias and bias is not None else None
    return grad_sum, grad_weight, grad_bias


def _input_gradients(
    x: Tensor,
    weight: Tensor,
    state: Tensor | None,
    grad_sum: Tensor,
    grad_after: Tensor | None,
    blocks: Blocks,
) -> tuple[Tensor, Tensor | None]:
    from nas_kernels.causal_conv.triton_kernel import input_gradients

    tokens, channels, taps = *x.shape[1:], weight.shape[1]
    has_state = state is not None and taps > 1
    grad_x = torch.empty(x.shape, device=x.device, dtype=x.dtype)
    grad_state = None
    if state is not None:
        grad_state = torch.empty(state.shape, device=x.device, dtype=state.dtype)
    grid, constants = _grid(x, tokens + (taps - 1 if has_state else 0), blocks)
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


def _grid(x: Tensor, tokens: int, blocks: Blocks) -> tuple[tuple[int, int, int], dict[str, int]]:
    """Return the grid over batch, channels and tokens, and the blocks' sizes."""
    grid = (x.shape[0], cdiv(x.shape[2], blocks.channels), cdiv(tokens, blocks.tokens))
    return grid, {"BT": blocks.tokens, "BC": blocks.channels, "num_warps": blocks.warps}


def _tensors(inputs: Inputs) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Return what the kernels that convolve read, and the strides."""
    x, weight, state, bias = inputs
    before, added = (x if state is None else state), (weight[:, 0] if bias is None else bias)
    tensors = (x, before, weight, added)
    return tensors, tuple(stride for tensor in tensors for stride in tensor.stride())


def _kind(inputs: Inputs, silu: bool) -> dict[str, Any]:
    _, weight, state, bias = inputs
    taps = weight.shape[1]
    return {
        "W": taps,
        "HAS_STATE": state is not None and taps > 1,
        "HAS_BIAS": bias is not None,
        "SILU": silu,
    }
