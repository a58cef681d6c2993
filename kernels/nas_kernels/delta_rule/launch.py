"""Launching the Triton kernels, forward and backward.

Shapes: B batch, H query heads, G key/value heads, R = H / G, T tokens, N chunks of C tokens,
K key width, V value width.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nas_kernels import tuning
from nas_kernels.dispatch import launching_on
from nas_kernels.head_states import Blocks, Plan, block_choices, launch_step, plan_of
from nas_kernels.launching import cdiv, empty_like_dense, power_of_two, tile

FP32_CHUNK = 32
"""Longest chunk of tensors in fp32."""


def delta_rule_kernels(
    q_BHTK: Tensor,
    k_BGTK: Tensor,
    v_BGTV: Tensor,
    beta_BGT: Tensor,
    state_BGKV: Tensor | None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute `delta_rule` with kernels; a chunk is a power of two from 16 to 64 tokens."""
    with launching_on(q_BHTK):
        out, last = _DeltaRule.apply(q_BHTK, k_BGTK, v_BGTV, beta_BGT, state_BGKV, chunk)
    return out, last


def step_kernel(
    q_BHK: Tensor,
    k_BGK: Tensor,
    v_BGV: Tensor,
    beta_BG: Tensor,
    state_BGKV: Tensor | None,
    new_state_BGKV: Tensor,
) -> Tensor:
    """Write the state after one token, which may be the one before it, and return (B, H, V)."""
    from nas_kernels.delta_rule.triton_kernel import one_token

    shape = (*q_BHK.shape[:2], v_BGV.shape[2])
    out = torch.empty(shape, device=q_BHK.device, dtype=torch.float32)
    tensors = (q_BHK, k_BGK, v_BGV, beta_BG)
    return launch_step(one_token, tensors, state_BGKV, new_state_BGKV, out)


class _DeltaRule(torch.autograd.Function):
    """The kernels; the backward pass computes what chunks write, and the states, again."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        state: Tensor | None,
        chunk: int | None,
    ) -> tuple[Tensor, Tensor]:
        given = (q, k, v, beta, state)
        candidates = block_choices(q, k, v, chunk, FP32_CHUNK)
        blocks = candidates[0]
        if tuning.wanted():
            key = tuning.rounded(*q.shape, k.shape[1], v.shape[3], q.dtype)
            blocks = tuning.choose("delta_rule", key, candidates, partial(_forward, *given))
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
        q, k, v, _, _ = saved = ctx.saved_tensors
        if grad_out is None:
            grad_out = q.new_zeros(1).expand(*q.shape[:3], v.shape[3])
        given = (saved, grad_out, grad_last, any(ctx.needs_input_grad[:4]))
        candidates = block_choices(q, k, v, ctx.chunk, FP32_CHUNK)
        blocks = candidates[0]
        if tuning.wanted():
            key = tuning.rounded(*q.shape, k.shape[1], v.shape[3], q.dtype)
            run = partial(_backward, *given)
            blocks = tuning.choose("delta_rule backward", key, candidates, run)
        return *_backward(*given, blocks), None


def _forward(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, state: Tensor | None, blocks: Blocks
) -> tuple[Tensor, Tensor]:
    """Return outputs and the last state."""
    from nas_kernels.linear_attention.triton_kernel import read_outputs

    plan = plan_of(q, k, v, blocks)
    states, written, last = _pass_states(plan, k, state, *_prepare(plan, k, v, beta))
    out = torch.empty(*q.shape[:3], v.shape[3], device=q.device, dtype=torch.float32)
    read_outputs[(plan.batch * plan.heads, plan.num_blocks[1], plan.num_chunks)](
        *(q, k, written, q, states, out),
        *(*q.stride(), *k.stride(), *written.stride(), *q.stride()),
        *(plan.heads, plan.repeats, *plan.sizes, plan.num_chunks, 0.0),
        **plan.constants(DECAY=0),
    )
    return out, last


def _backward(
    saved: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None],
    grad_out: Tensor,
    grad_last: Tensor | None,
    of_inputs: bool,
    blocks: Blocks,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of what was saved; of the state alone where no other is wanted."""
    q, k, v, beta, state = saved
    plan = plan_of(q, k, v, blocks)
    corrections, values = _prepare(plan, k, v, beta)
    grad_states, grad_written, grad_start = _pass_gradients(
        plan, q, k, corrections, grad_out, grad_last
    )
    grad_state = None if state is None else grad_start.to(state.dtype)
    if not of_inputs:
        return None, None, None, None, grad_state
    states, written, _ = _pass_states(plan, k, state, corrections, values)
    grad_q, grad_read = _read_gradients(plan, q, k, written, grad_out, states, grad_states)
    grads = _input_gradients(
        plan, (k, v, beta), (corrections, values), states, grad_written, grad_read
    )
    return grad_q, *grads, grad_state


def _inverting(plan: Plan, **others: Any) -> dict[str, Any]:
    """Return the constants of the kernels that invert a matrix for each chunk."""
    # bf16 inputs have fewer digits than TF32.
    precision = "tf32" if plan.dot == torch.bfloat16 else plan.precision
    levels = plan.blocks.chunk.bit_length() - 1
    return plan.constants(LEVELS=levels, INVERSE_PRECISION=precision, **others)


def _passing(plan: Plan) -> dict[str, Any]:
    """Return the constants of the kernels that hold whole columns of the state."""
    block_k = tile(plan.key_dim, power_of_two(max(plan.key_dim, 16)))
    narrow = block_k > (128 if plan.dot == torch.bfloat16 else 64)
    block_v = tile(plan.value_dim, 16 if narrow else plan.blocks.columns)
    num_warps = plan.more_warps if block_k > 64 else plan.blocks.warps
    return plan.constants(BK=block_k, BV=block_v, num_warps=num_warps, num_stages=1)


def _empty(plan: Plan, width: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return memory for a vector of every token, (B, G, T, width)."""
    shape = (plan.batch, plan.groups, plan.tokens, width)
    return torch.empty(shape, device=like.device, dtype=dtype or plan.dot)


def _prepare(plan: Plan, k: Tensor, v: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Return W (B, G, T, K) and U (B, G, T, V)."""
    from nas_kernels.delta_rule.triton_kernel import prepare_chunks

    corrections, values = _empty(plan, plan.key_dim, k), _empty(plan, plan.value_dim, k)
    prepare_chunks[(plan.pairs, plan.num_chunks)](
        *(k, v, beta, corrections, values),
        *(*k.stride(), *v.stride(), *beta.stride(), plan.groups, *plan.sizes),
        **_inverting(plan),
    )
    return corrections, values


def _pass_states(
    plan: Plan, k: Tensor, state: Tensor | None, corrections: Tensor, values: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the states of all chunks, D (B, G, T, V), and the last state in fp32."""
    from nas_kernels.delta_rule.triton_kernel import pass_states

    (states, end), written = plan.empty_states(k), _empty(plan, plan.value_dim, k)
    start, constants = (end if state is None else state), _passing(plan)
    pass_states[(plan.pairs, cdiv(plan.value_dim, constants["BV"]))](
        *(k, corrections, values, start, states, written, end),
        *(*k.stride(), *start.stride(), plan.groups, *plan.sizes, plan.num_chunks),
        HAS_START=state is not None,
        **constants,
    )
    return states, written, end


def _pass_gradients(
    plan: Plan,
    q: Tensor,
    k: Tensor,
    corrections: Tensor,
    grad_out: Tensor,
    grad_last: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of all states, of D, and of the state before the first token."""
    from nas_kernels.delta_rule.triton_kernel import pass_gradients

    (states, end), written = plan.empty_states(k), _empty(plan, plan.value_dim, k)
    start, constants = (end if grad_last is None else grad_last), _passing(plan)
    pass_gradients[(plan.pairs, cdiv(plan.value_dim, constants["BV"]))](
        *(q, k, corrections, grad_out, start, states, written, end),
        *(*q.stride(), *k.stride(), *grad_out.stride(), *start.stride()),
        *(plan.groups, plan.repeats, *plan.sizes, plan.num_chunks),
        HAS_START=grad_last is not None,
        **constants,
    )
    return states, written, end


def _read_gradients(
    plan: Plan,
    q: Tensor,
    k: Tensor,
    written: Tensor,
    grad_out: Tensor,
    states: Tensor,
    grad_states: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of queries and keys of linear attention with the values D."""
    from nas_kernels.linear_attention.triton_kernel import key_gradients

    grad_q, grad_k = empty_like_dense(q), _empty(plan, plan.key_dim, k, torch.float32)
    key_gradients[(plan.pairs, plan.num_blocks[0], plan.num_chunks)](
        *(q, k, written, q, grad_out, states, grad_states, grad_q, grad_k, grad_k),
        *(*q.stride(), *k.stride(), *written.stride(), *q.stride(), *grad_out.stride()),
        *(plan.groups, plan.repeats, *plan.sizes, plan.num_chunks, 0.0),
        **plan.constants(DECAY=0, GATE_GRADIENT=False, num_warps=plan.more_warps),
    )
    return grad_q, grad_k


def _input_gradients(
    plan: Plan,
    inputs: tuple[Tensor, Tensor, Tensor],
    prepared: tuple[Tensor, Tensor],
    states: Tensor,
    grad_written: Tensor,
    grad_read: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of keys, values and beta."""
    from nas_kernels.delta_rule import triton_kernel

    k, v, beta = inputs
    grad_corrections = _empty(plan, plan.key_dim, k)
    grid = (plan.pairs, plan.num_blocks[0], plan.num_chunks)
    triton_kernel.correction_gradients[grid](
        *(grad_written, states, grad_corrections, *plan.sizes, plan.num_chunks),
        **plan.constants(),
    )
    grads = empty_like_dense(k), empty_like_dense(v), empty_like_dense(beta)
    triton_kernel.input_gradients[(plan.pairs, plan.num_chunks)](
        *(*inputs, *prepared, grad_corrections, grad_written, grad_read, *grads),
        *(*k.stride(), *v.stride(), *beta.stride(), plan.groups, *plan.sizes),
        **_inverting(plan, num_warps=plan.more_warps),
    )
    return grads
