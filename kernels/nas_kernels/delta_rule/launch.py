"""Launching the Triton kernels, forward and backward.

Shapes: B batch, H query heads, G key/value heads, R = H / G, T tokens, N chunks of C tokens,
K key width, V value width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nas_kernels.dispatch import launching_on
from nas_kernels.launching import (
    cdiv,
    dot_dtype,
    dot_precision,
    empty_like_dense,
    power_of_two,
    step_tile,
    tile,
)
from nas_kernels.tiles.types import triton_dtype


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

    (batch, heads, key_dim), (groups, value_dim) = q_BHK.shape, v_BGV.shape[1:]
    out = torch.empty(batch, heads, value_dim, device=q_BHK.device, dtype=torch.float32)
    old = new_state_BGKV if state_BGKV is None else state_BGKV
    block_k, block_v, num_warps = step_tile(key_dim, value_dim)
    tensors = (q_BHK, k_BGK, v_BGV, beta_BG, old, new_state_BGKV)
    with launching_on(q_BHK):
        one_token[(batch * groups, cdiv(value_dim, block_v))](
            *tensors,
            out,
            *(stride for x in tensors for stride in x.stride()),
            *(groups, heads // groups, key_dim, value_dim),
            HAS_STATE=state_BGKV is not None,
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
    chunk: int
    block_k: int
    block_v: int
    dot: torch.dtype
    precision: str

    @property
    def num_chunks(self) -> int:
        return cdiv(self.tokens, self.chunk)

    @property
    def pairs(self) -> int:
        return self.batch * self.groups

    @property
    def repeats(self) -> int:
        return self.heads // self.groups

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.tokens, self.key_dim, self.value_dim

    def constants(self, **others: Any) -> dict[str, Any]:
        """Return the constants that all kernels take, and some that replace or follow them."""
        return {
            "C": self.chunk,
            "BK": self.block_k,
            "BV": self.block_v,
            "DOT": triton_dtype(self.dot),
            "PRECISION": self.precision,
            "num_warps": 4,
            "num_stages": 2,
        } | others

    def inverting(self, **others: Any) -> dict[str, Any]:
        """Return the constants of the kernels that invert a matrix for each chunk."""
        # bf16 inputs have fewer digits than TF32.
        precision = "tf32" if self.dot == torch.bfloat16 else self.precision
        levels = self.chunk.bit_length() - 1
        return self.constants(LEVELS=levels, INVERSE_PRECISION=precision, **others)

    def passing(self) -> dict[str, Any]:
        """Return the constants of the kernels that hold whole columns of the state."""
        block_k = tile(self.key_dim, power_of_two(max(self.key_dim, 16)))
        narrow = block_k > (128 if self.dot == torch.bfloat16 else 64)
        block_v, num_warps = tile(self.value_dim, 16 if narrow else 32), 8 if block_k > 64 else 4
        return self.constants(BK=block_k, BV=block_v, num_warps=num_warps, num_stages=1)

    def empty(self, width: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return memory for a vector of every token, (B, G, T, width)."""
        shape = (self.batch, self.groups, self.tokens, width)
        return torch.empty(shape, device=like.device, dtype=dtype or self.dot)

    def empty_states(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return memory for the states of all chunks (B, G, N + 1, K, V) and one in fp32."""
        shape = (self.batch, self.groups, self.num_chunks + 1, self.key_dim, self.value_dim)
        states = torch.empty(shape, device=like.device, dtype=self.dot)
        return states, torch.empty(shape[:2] + shape[3:], device=like.device, dtype=torch.float32)


def _plan(q: Tensor, k: Tensor, v: Tensor, chunk: int | None) -> _Plan:
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
        chunk=chunk or tile(q.shape[2], side),
        block_k=tile(q.shape[3], side),
        block_v=tile(v.shape[3], side),
        dot=dot,
        precision=dot_precision(q, k, v),
    )


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
        from nas_kernels.linear_attention.triton_kernel import read_outputs

        plan = _plan(q, k, v, chunk)
        states, written, last = _pass_states(plan, k, state, *_prepare(plan, k, v, beta))
        out = torch.empty(*q.shape[:3], v.shape[3], device=q.device, dtype=torch.float32)
        blocks = cdiv(plan.value_dim, plan.block_v)
        read_outputs[(plan.batch * plan.heads, blocks, plan.num_chunks)](
            *(q, k, written, q, states, out),
            *(*q.stride(), *k.stride(), *written.stride(), *q.stride()),
            *(plan.heads, plan.repeats, *plan.sizes, plan.num_chunks, 0.0),
            **plan.constants(DECAY=0),
        )
        ctx.save_for_backward(q, k, v, beta, state)
        ctx.set_materialize_grads(False)
        ctx.plan = plan
        return out, last

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_out: Tensor | None, grad_last: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        q, k, v, beta, state = ctx.saved_tensors
        plan: _Plan = ctx.plan
        if grad_out is None:
            grad_out = q.new_zeros(1).expand(*q.shape[:3], v.shape[3])
        corrections, values = _prepare(plan, k, v, beta)
        grad_states, grad_written, grad_start = _pass_gradients(
            plan, q, k, corrections, grad_out, grad_last
        )
        grad_state = None if state is None else grad_start.to(state.dtype)
        if not any(ctx.needs_input_grad[:4]):
            return None, None, None, None, grad_state, None
        states, written, _ = _pass_states(plan, k, state, corrections, values)
        grad_q, grad_read = _read_gradients(plan, q, k, written, grad_out, states, grad_states)
        grads = _input_gradients(
            plan, (k, v, beta), (corrections, values), states, grad_written, grad_read
        )
        return grad_q, *grads, grad_state, None


def _prepare(plan: _Plan, k: Tensor, v: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Return W (B, G, T, K) and U (B, G, T, V)."""
    from nas_kernels.delta_rule.triton_kernel import prepare_chunks

    corrections, values = plan.empty(plan.key_dim, k), plan.empty(plan.value_dim, k)
    prepare_chunks[(plan.pairs, plan.num_chunks)](
        *(k, v, beta, corrections, values),
        *(*k.stride(), *v.stride(), *beta.stride(), plan.groups, *plan.sizes),
        **plan.inverting(),
    )
    return corrections, values


def _pass_states(
    plan: _Plan, k: Tensor, state: Tensor | None, corrections: Tensor, values: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the states of all chunks, D (B, G, T, V), and the last state in fp32."""
    from nas_kernels.delta_rule.triton_kernel import pass_states

    (states, end), written = plan.empty_states(k), plan.empty(plan.value_dim, k)
    start, constants = (end if state is None else state), plan.passing()
    pass_states[(plan.pairs, cdiv(plan.value_dim, constants["BV"]))](
        *(k, corrections, values, start, states, written, end),
        *(*k.stride(), *start.stride(), plan.groups, *plan.sizes, plan.num_chunks),
        HAS_START=state is not None,
        **constants,
    )
    return states, written, end


def _pass_gradients(
    plan: _Plan,
    q: Tensor,
    k: Tensor,
    corrections: Tensor,
    grad_out: Tensor,
    grad_last: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of all states, of D, and of the state before the first token."""
    from nas_kernels.delta_rule.triton_kernel import pass_gradients

    (states, end), written = plan.empty_states(k), plan.empty(plan.value_dim, k)
    start, constants = (end if grad_last is None else grad_last), plan.passing()
    pass_gradients[(plan.pairs, cdiv(plan.value_dim, constants["BV"]))](
        *(q, k, corrections, grad_out, start, states, written, end),
        *(*q.stride(), *k.stride(), *grad_out.stride(), *start.stride()),
        *(plan.groups, plan.repeats, *plan.sizes, plan.num_chunks),
        HAS_START=grad_last is not None,
        **constants,
    )
    return states, written, end


def _read_gradients(
    plan: _Plan,
    q: Tensor,
    k: Tensor,
    written: Tensor,
    grad_out: Tensor,
    states: Tensor,
    grad_states: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of queries and keys of linear attention with the values D."""
    from nas_kernels.linear_attention.triton_kernel import key_gradients

    grad_q, grad_k = empty_like_dense(q), plan.empty(plan.key_dim, k, torch.float32)
    key_gradients[(plan.pairs, cdiv(plan.key_dim, plan.block_k), plan.num_chunks)](
        *(q, k, written, q, grad_out, states, grad_states, grad_q, grad_k, grad_k),
        *(*q.stride(), *k.stride(), *written.stride(), *q.stride(), *grad_out.stride()),
        *(plan.groups, plan.repeats, *plan.sizes, plan.num_chunks, 0.0),
        **plan.constants(DECAY=0, GATE_GRADIENT=False, num_warps=8),
    )
    return grad_q, grad_k


def _input_gradients(
    plan: _Plan,
    inputs: tuple[Tensor, Tensor, Tensor],
    prepared: tuple[Tensor, Tensor],
    states: Tensor,
    grad_written: Tensor,
    grad_read: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of keys, values and beta."""
    from nas_kernels.delta_rule import triton_kernel

    k, v, beta = inputs
    grad_corrections = plan.empty(plan.key_dim, k)
    grid = (plan.pairs, cdiv(plan.key_dim, plan.block_k), plan.num_chunks)
    triton_kernel.correction_gradients[grid](
        *(grad_written, states, grad_corrections, *plan.sizes, plan.num_chunks),
        **plan.constants(),
    )
    grads = empty_like_dense(k), empty_like_dense(v), empty_like_dense(beta)
    triton_kernel.input_gradients[(plan.pairs, plan.num_chunks)](
        *(*inputs, *prepared, grad_corrections, grad_written, grad_read, *grads),
        *(*k.stride(), *v.stride(), *beta.stride(), plan.groups, *plan.sizes),
        **plan.inverting(num_warps=8),  # with four, registers spill
    )
    return grads
