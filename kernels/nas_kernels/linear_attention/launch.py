"""Launching the Triton kernels, forward and backward.

Shapes: B batch, H query heads, G key/value heads, R = H / G, T tokens, N chunks of C tokens,
K key width, V value width, E = K or 1 features of the decay.
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
from nas_kernels.launching import as_autocast, empty_like_dense
from nas_kernels.linear_attention.chunked import MIN_LOG_DECAY

LOWEST_LOG_DECAY = -40.0
"""Of a decay per head: a factor of 4e-18 is nothing, also where 0 was meant, and sums of log decays
over a chunk stay precise."""


def linear_attention_kernels(
    q_BHTK: Tensor,
    k_BGTK: Tensor,
    v_BGTV: Tensor,
    log_decay_BGTE: Tensor | None,
    state_BGKV: Tensor | None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute `linear_attention` with kernels; a chunk is a power of two from 16 to 64 tokens."""
    q, k, v = as_autocast(q_BHTK, k_BGTK, v_BGTV)
    with launching_on(q):
        out, last = _LinearAttention.apply(q, k, v, log_decay_BGTE, state_BGKV, chunk)
    return out, last


def step_kernel(
    q_BHK: Tensor,
    k_BGK: Tensor,
    v_BGV: Tensor,
    log_decay_BGE: Tensor | None,
    state_BGKV: Tensor | None,
    new_state_BGKV: Tensor,
) -> Tensor:
    """Write the state after one token, which may be the one before it, and return (B, H, V)."""
    from nas_kernels.linear_attention.triton_kernel import one_token

    dtype = torch.promote_types(q_BHK.dtype, v_BGV.dtype)
    out = torch.empty(*q_BHK.shape[:2], v_BGV.shape[2], device=q_BHK.device, dtype=dtype)
    decay, floor = _decay_kind(log_decay_BGE)
    tensors = (q_BHK, k_BGK, v_BGV, q_BHK if log_decay_BGE is None else log_decay_BGE)
    return launch_step(one_token, tensors, state_BGKV, new_state_BGKV, out, floor, DECAY=decay)


def _decay_kind(log_decay: Tensor | None) -> tuple[int, float]:
    """Return none, per head or per feature (0, 1, 2), and the lowest log decay of a token."""
    if log_decay is None:
        return 0, 0.0
    return (2, MIN_LOG_DECAY) if log_decay.shape[-1] > 1 else (1, LOWEST_LOG_DECAY)


class _LinearAttention(torch.autograd.Function):
    """The kernels; the backward pass computes the states between chunks again."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        state: Tensor | None,
        chunk: int | None,
    ) -> tuple[Tensor, Tensor]:
        given = (q, k, v, log_decay, state)
        candidates = block_choices(q, k, v, chunk)
        blocks = candidates[0]
        if tuning.wanted():
            run, key = partial(_forward, *given), _key(q, k, v, log_decay)
            blocks = tuning.choose("linear_attention", key, candidates, run)
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
        q, k, v, log_decay, _ = saved = ctx.saved_tensors
        if grad_out is None:
            grad_out = q.new_zeros(1).expand(*q.shape[:3], v.shape[3])
        given = (saved, grad_out, grad_last, ctx.needs_input_grad)
        candidates = block_choices(q, k, v, ctx.chunk)
        blocks = candidates[0]
        if tuning.wanted():
            run, key = partial(_backward, *given), _key(q, k, v, log_decay)
            blocks = tuning.choose("linear_attention backward", key, candidates, run)
        return *_backward(*given, blocks), None


def _key(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None) -> tuning.Key:
    """Return what the choice of blocks depends on."""
    decay, _ = _decay_kind(log_decay)
    return tuning.rounded(*q.shape, k.shape[1], v.shape[3], decay, q.dtype)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    blocks: Blocks,
) -> tuple[Tensor, Tensor]:
    """Return outputs and the last state."""
    from nas_kernels.linear_attention.triton_kernel import read_outputs

    plan = plan_of(q, k, v, blocks, *_decay_kind(log_decay))
    states, last = _pass_states(plan, k, v, log_decay, state, backward=False)
    dtype = torch.promote_types(q.dtype, v.dtype)
    out = torch.empty(*q.shape[:3], v.shape[3], device=q.device, dtype=dtype)
    gate = q if log_decay is None else log_decay
    read_outputs[(plan.batch * plan.heads, plan.num_blocks[1], plan.num_chunks)](
        *(q, k, v, gate, states, out),
        *(*q.stride(), *k.stride(), *v.stride(), *gate.stride()),
        *_sizes(plan, per_query_head=True),
        **_constants(plan),
    )
    return out, last


def _backward(
    saved: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None],
    grad_out: Tensor,
    grad_last: Tensor | None,
    wanted: tuple[bool, ...],
    blocks: Blocks,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of what was saved."""
    q, k, v, log_decay, state = saved
    plan, inputs = plan_of(q, k, v, blocks, *_decay_kind(log_decay)), (q, k, v, log_decay)
    grad_states, grad_start = _pass_states(plan, q, grad_out, log_decay, grad_last, True)
    grad_q = grad_k = grad_v = grad_g = None
    if any(wanted[i] for i in (0, 1, 3)):
        states, _ = _pass_states(plan, k, v, log_decay, state, backward=False)
        grad_q, grad_k, grad_g = _key_gradients(
            plan, inputs, grad_out, states, grad_states, wanted[3]
        )
    if wanted[2]:
        grad_v = _value_gradients(plan, inputs, grad_out, grad_states)
    grad_state = None if state is None else grad_start.to(state.dtype)
    return grad_q, grad_k, grad_v, grad_g, grad_state


def _sizes(plan: Plan, per_query_head: bool = False) -> tuple[float, ...]:
    """Return the numbers that all kernels take, in their order."""
    first = plan.heads if per_query_head else plan.groups
    return (first, plan.repeats, *plan.sizes, plan.num_chunks, plan.floor)


def _constants(plan: Plan, **others: Any) -> dict[str, Any]:
    return plan.constants(DECAY=plan.decay, **others)


def _pass_states(
    plan: Plan,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor | None,
    start: Tensor | None,
    backward: bool,
) -> tuple[Tensor, Tensor]:
    """Return the states of all chunks (B, G, N + 1, K, V) and the last one computed, in fp32."""
    from nas_kernels.linear_attention.triton_kernel import pass_states

    states, end = plan.empty_states(a)
    gate, first = (a if log_decay is None else log_decay), (end if start is None else start)
    sizes = _sizes(plan)
    if not backward:
        sizes = (sizes[0], 1, *sizes[2:])  # keys and values have one head in each group
    pass_states[(plan.pairs, *plan.num_blocks)](
        *(a, b, gate, first, states, end),
        *(*a.stride(), *b.stride(), *gate.stride(), *first.stride()),
        *sizes,
        HAS_START=start is not None,
        BACKWARD=backward,
        **_constants(plan),
    )
    return states, end


def _key_gradients(
    plan: Plan,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor | None],
    grad_out: Tensor,
    states: Tensor,
    grad_states: Tensor,
    of_decay: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    from nas_kernels.linear_attention.triton_kernel import key_gradients

    q, k, v, log_decay = inputs
    grad_q, grad_k = empty_like_dense(q), empty_like_dense(k)
    grad_g, gate = grad_k, (q if log_decay is None else log_decay)
    if of_decay:
        width = plan.key_dim if plan.decay == 2 else plan.num_blocks[0]
        grad_g = torch.empty(*k.shape[:3], width, device=k.device, dtype=torch.float32)
    key_gradients[(plan.pairs, plan.num_blocks[0], plan.num_chunks)](
        *(q, k, v, gate, grad_out, states, grad_states, grad_q, grad_k, grad_g),
        *(*q.stride(), *k.stride(), *v.stride(), *gate.stride(), *grad_out.stride()),
        *_sizes(plan),
        GATE_GRADIENT=of_decay,
        **_constants(plan, num_warps=plan.more_warps),
    )
    if log_decay is None or not of_decay:
        return grad_q, grad_k, None
    if plan.decay == 1:
        grad_g = grad_g.sum(dim=-1, keepdim=True)
    return grad_q, grad_k, grad_g.to(log_decay.dtype)


def _value_gradients(
    plan: Plan,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor | None],
    grad_out: Tensor,
    grad_states: Tensor,
) -> Tensor:
    from nas_kernels.linear_attention.triton_kernel import value_gradients

    q, k, v, log_decay = inputs
    grad_v, gate = empty_like_dense(v), (q if log_decay is None else log_decay)
    value_gradients[(plan.pairs, plan.num_blocks[1], plan.num_chunks)](
        *(q, k, gate, grad_out, grad_states, grad_v),
        *(*q.stride(), *k.stride(), *gate.stride(), *grad_out.stride()),
        *_sizes(plan),
        **_constants(plan),
    )
    return grad_v
