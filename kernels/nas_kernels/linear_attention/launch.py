"""Launching the Triton kernels, forward and backward.

Shapes: B batch, H query heads, G key/value heads, R = H / G, T tokens, N chunks of C tokens,
K key width, V value width, E = K or 1 features of the decay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nas_kernels.dispatch import launching_on
from nas_kernels.launching import (
    as_autocast,
    cdiv,
    dot_dtype,
    dot_precision,
    empty_like_dense,
    step_tile,
    tile,
)
from nas_kernels.linear_attention.chunked import MIN_LOG_DECAY
from nas_kernels.tiles.types import triton_dtype

MAX_CHUNK = 64
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

    (batch, heads, key_dim), (groups, value_dim) = q_BHK.shape, v_BGV.shape[1:]
    dtype = torch.promote_types(q_BHK.dtype, v_BGV.dtype)
    out = torch.empty(batch, heads, value_dim, device=q_BHK.device, dtype=dtype)
    old = new_state_BGKV if state_BGKV is None else state_BGKV
    decay, floor = _decay_kind(log_decay_BGE)
    gate = q_BHK if log_decay_BGE is None else log_decay_BGE
    block_k, block_v, num_warps = step_tile(key_dim, value_dim)
    tensors = (q_BHK, k_BGK, v_BGV, gate, old, new_state_BGKV)
    with launching_on(q_BHK):
        one_token[(batch * groups, cdiv(value_dim, block_v))](
            *tensors,
            out,
            *(stride for x in tensors for stride in x.stride()),
            *(groups, heads // groups, key_dim, value_dim, floor),
            HAS_STATE=state_BGKV is not None,
            DECAY=decay,
            BK=block_k,
            BV=block_v,
            num_warps=num_warps,
        )
    return out


@dataclass(frozen=True)
class _Plan:
    """What the kernels of one call have in common."""

    batch: int
    heads: int
    groups: int
    tokens: int
    key_dim: int
    value_dim: int
    decay: int
    floor: float
    chunk: int
    block_k: int
    block_v: int
    dot: torch.dtype
    precision: str

    @property
    def num_chunks(self) -> int:
        return cdiv(self.tokens, self.chunk)

    @property
    def blocks(self) -> tuple[int, int]:
        return cdiv(self.key_dim, self.block_k), cdiv(self.value_dim, self.block_v)

    def sizes(self, per_query_head: bool = False) -> tuple[int | float, ...]:
        """Return the numbers that all kernels take, in their order."""
        first = self.heads if per_query_head else self.groups
        repeats = self.heads // self.groups
        shape = (self.tokens, self.key_dim, self.value_dim)
        return (first, repeats, *shape, self.num_chunks, self.floor)

    def constants(self, num_warps: int = 4) -> dict[str, Any]:
        """Return the constants that all kernels take."""
        return {
            "DECAY": self.decay,
            "C": self.chunk,
            "BK": self.block_k,
            "BV": self.block_v,
            "DOT": triton_dtype(self.dot),
            "PRECISION": self.precision,
            "num_warps": num_warps,
            "num_stages": 2,
        }


def _decay_kind(log_decay: Tensor | None) -> tuple[int, float]:
    """Return none, per head or per feature (0, 1, 2), and the lowest log decay of a token."""
    if log_decay is None:
        return 0, 0.0
    return (2, MIN_LOG_DECAY) if log_decay.shape[-1] > 1 else (1, LOWEST_LOG_DECAY)


def _plan(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, chunk: int | None) -> _Plan:
    decay, floor = _decay_kind(log_decay)
    dot = dot_dtype(q, k, v)
    # Tiles in fp32 take twice the shared memory.
    side = 64 if dot == torch.bfloat16 else 32
    return _Plan(
        batch=q.shape[0],
        heads=q.shape[1],
        groups=k.shape[1],
        tokens=q.shape[2],
        key_dim=q.shape[3],
        value_dim=v.shape[3],
        decay=decay,
        floor=floor,
        chunk=chunk or tile(q.shape[2], MAX_CHUNK),
        block_k=tile(q.shape[3], side),
        block_v=tile(v.shape[3], side),
        dot=dot,
        precision=dot_precision(q, k, v),
    )


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
        from nas_kernels.linear_attention.triton_kernel import read_outputs

        plan = _plan(q, k, v, log_decay, chunk)
        states, last = _pass_states(plan, k, v, log_decay, state, backward=False)
        dtype = torch.promote_types(q.dtype, v.dtype)
        out = torch.empty(*q.shape[:3], v.shape[3], device=q.device, dtype=dtype)
        gate = q if log_decay is None else log_decay
        read_outputs[(plan.batch * plan.heads, plan.blocks[1], plan.num_chunks)](
            *(q, k, v, gate, states, out),
            *(*q.stride(), *k.stride(), *v.stride(), *gate.stride()),
            *plan.sizes(per_query_head=True),
            **plan.constants(),
        )
        ctx.save_for_backward(q, k, v, log_decay, state)
        ctx.set_materialize_grads(False)
        ctx.plan = plan
        return out, last

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_out: Tensor | None, grad_last: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        q, k, v, log_decay, state = ctx.saved_tensors
        plan: _Plan = ctx.plan
        if grad_out is None:
            grad_out = q.new_zeros(1).expand(*q.shape[:3], v.shape[3])
        grad_states, grad_start = _pass_states(plan, q, grad_out, log_decay, grad_last, True)
        grad_q = grad_k = grad_v = grad_g = None
        if any(ctx.needs_input_grad[i] for i in (0, 1, 3)):
            states, _ = _pass_states(plan, k, v, log_decay, state, backward=False)
            grad_q, grad_k, grad_g = _key_gradients(
                plan, (q, k, v, log_decay), grad_out, states, grad_states, ctx.needs_input_grad[3]
            )
        if ctx.needs_input_grad[2]:
            grad_v = _value_gradients(plan, (q, k, v, log_decay), grad_out, grad_states)
        grad_state = None if state is None else grad_start.to(state.dtype)
        return grad_q, grad_k, grad_v, grad_g, grad_state, None


def _pass_states(
    plan: _Plan,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor | None,
    start: Tensor | None,
    backward: bool,
) -> tuple[Tensor, Tensor]:
    """Return the states of all chunks (B, G, N + 1, K, V) and the last one computed, in fp32."""
    from nas_kernels.linear_attention.triton_kernel import pass_states

    shape = (plan.batch, plan.groups, plan.num_chunks + 1, plan.key_dim, plan.value_dim)
    states = torch.empty(shape, device=a.device, dtype=plan.dot)
    end = torch.empty(shape[:2] + shape[3:], device=a.device, dtype=torch.float32)
    gate, first = (a if log_decay is None else log_decay), (end if start is None else start)
    constants = plan.constants()
    sizes = plan.sizes()
    if not backward:
        sizes = (sizes[0], 1, *sizes[2:])  # keys and values have one head in each group
    pass_states[(plan.batch * plan.groups, *plan.blocks)](
        *(a, b, gate, first, states, end),
        *(*a.stride(), *b.stride(), *gate.stride(), *first.stride()),
        *sizes,
        HAS_START=start is not None,
        BACKWARD=backward,
        **constants,
    )
    return states, end


def _key_gradients(
    plan: _Plan,
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
        width = plan.key_dim if plan.decay == 2 else plan.blocks[0]
        grad_g = torch.empty(*k.shape[:3], width, device=k.device, dtype=torch.float32)
    key_gradients[(plan.batch * plan.groups, plan.blocks[0], plan.num_chunks)](
        *(q, k, v, gate, grad_out, states, grad_states, grad_q, grad_k, grad_g),
        *(*q.stride(), *k.stride(), *v.stride(), *gate.stride(), *grad_out.stride()),
        *plan.sizes(),
        GATE_GRADIENT=of_decay,
        **plan.constants(num_warps=8),  # with four, registers spill
    )
    if log_decay is None or not of_decay:
        return grad_q, grad_k, None
    if plan.decay == 1:
        grad_g = grad_g.sum(dim=-1, keepdim=True)
    return grad_q, grad_k, grad_g.to(log_decay.dtype)


def _value_gradients(
    plan: _Plan,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor | None],
    grad_out: Tensor,
    grad_states: Tensor,
) -> Tensor:
    from nas_kernels.linear_attention.triton_kernel import value_gradients

    q, k, v, log_decay = inputs
    grad_v, gate = empty_like_dense(v), (q if log_decay is None else log_decay)
    value_gradients[(plan.batch * plan.groups, plan.blocks[1], plan.num_chunks)](
        *(q, k, gate, grad_out, grad_states, grad_v),
        *(*q.stride(), *k.stride(), *gate.stride(), *grad_out.stride()),
        *plan.sizes(),
        **plan.constants(),
    )
    return grad_v
