"""Recurrences as one operator each: what a graph for any number of tokens is recorded with.

PyTorch runs a recurrence as a loop, and a graph that is recorded from one has as many steps as the
recording had. Inside `one_operator_each` the kernels call the operators below instead, which a
runtime that has loops of its own can take as they are.

Shapes: B batch, G key/value heads, N chunks of C tokens, K key width, V value width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch import Tensor

SUM, MAX, LOG_SUM = "sum", "max", "log_sum"
"""`f h + x`, `max(h + f, x)` and `log(exp(h + f) + exp(x))`."""
STEPS = 16
"""Tokens that `in_two_levels` puts in a chunk."""

_recorded: ContextVar[bool] = ContextVar("recorded", default=False)


@contextlib.contextmanager
def one_operator_each() -> Iterator[None]:
    """Have recurrences called as operators within."""
    token = _recorded.set(True)
    try:
        yield
    finally:
        _recorded.reset(token)


def recorded() -> bool:
    """Whether recurrences are to be called as operators."""
    return _recorded.get()


@torch.library.custom_op("hwnas::recurrence", mutates_args=())
def recurrence(kind: str, factor: Tensor, added: Tensor, start: Tensor, dim: int) -> Tensor:
    """Return every state of `h_t = f_t h_{t-1} + x_t`, or of another kind of recurrence.

    Args:
        kind: ``"sum"``, ``"max"`` or ``"log_sum"``.
        factor: f, as many as there are steps along `dim`, or one for all; broadcast to a state.
        added: x.
        start: h before the first step, which has no axis `dim`.
        dim: the axis of time, not negative.

    Returns:
        The states after every step, of the shape of `added`.
    """
    state, states = start, []
    for step in range(added.shape[dim]):
        f = factor.select(dim, step if factor.shape[dim] > 1 else 0)
        state = _step(kind, f, added.select(dim, step), state)
        states.append(state)
    return torch.stack(states, dim=dim)


@recurrence.register_fake
def _(kind: str, factor: Tensor, added: Tensor, start: Tensor, dim: int) -> Tensor:
    return torch.empty_like(added)


def _step(kind: str, factor: Tensor, added: Tensor, state: Tensor) -> Tensor:
    if kind == SUM:
        return torch.addcmul(added, factor, state)
    return (torch.maximum if kind == MAX else torch.logaddexp)(state + factor, added)


@torch.library.custom_op("hwnas::delta_states", mutates_args=())
def delta_states(
    keys_BGNKC: Tensor, corrections_BGNCK: Tensor, values_BGNCV: Tensor, start_BGKV: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute `W_n = U_n - C_n S_n`, `S_{n+1} = S_n + K_n W_n` from chunk to chunk.

    Returns:
        Every S after its chunk (B, G, N, K, V) and every W (B, G, N, C, V).
    """
    state, states, written = start_BGKV, [], []
    for n in range(values_BGNCV.shape[2]):
        written.append(values_BGNCV[:, :, n] - corrections_BGNCK[:, :, n] @ state)
        state = state + keys_BGNKC[:, :, n] @ written[-1]
        states.append(state)
    return torch.stack(states, dim=2), torch.stack(written, dim=2)


@delta_states.register_fake
def _(
    keys_BGNKC: Tensor, corrections_BGNCK: Tensor, values_BGNCV: Tensor, start_BGKV: Tensor
) -> tuple[Tensor, Tensor]:
    num_chunks = values_BGNCV.shape[2]
    states = start_BGKV[:, :, None].expand(-1, -1, num_chunks, -1, -1)
    return torch.empty_like(states, memory_format=torch.contiguous_format), torch.empty_like(
        values_BGNCV
    )


def before_each(states: Tensor, start: Tensor, dim: int) -> Tensor:
    """Return the state before every step, given those after it and the first one."""
    earlier = states.narrow(dim, 0, states.shape[dim] - 1)
    return torch.cat([start.unsqueeze(dim), earlier], dim=dim)


def in_two_levels(kind: str, factor_BTC: Tensor, added_BTC: Tensor, start_BC: Tensor) -> Tensor:
    """Return `recurrence` over axis 1 in `STEPS` + T / `STEPS` steps.

    All chunks go through their tokens side by side, then hand on what they come to.

    Args:
        kind: ``"sum"`` with factors (B, T, C), or ``"max"`` with one factor for all, (1, 1, C).
        factor_BTC: f.
        added_BTC: x.
        start_BC: h before the first token.
    """
    tokens = added_BTC.shape[1]
    num_chunks = -(-tokens // STEPS)
    tail = num_chunks * STEPS - tokens
    lowest = 0.0 if kind == SUM else -torch.inf
    added = _chunked(added_BTC, tail, num_chunks, lowest)
    own_start = added.new_full((1, 1, 1), lowest).expand(added[:, :, 0].shape)
    if kind == SUM:
        factor = _chunked(factor_BTC, tail, num_chunks, 0.0)
        ones, nothing = torch.ones_like(factor[:, :, 0]), factor.new_zeros(1, 1, 1, 1)
        # The product of the factors so far: a recurrence in which nothing is added.
        product = recurrence(SUM, factor, nothing.expand(factor.shape), ones, 2)
    else:
        factor = factor_BTC[:, :, None]
        number = torch.arange(1, STEPS + 1, device=added.device, dtype=added.dtype)
        product = factor * number[:, None]
    own = recurrence(kind, factor, added, own_start, 2)
    ends, whole = own[:, :, -1], product[:, :, -1]
    handed = before_each(recurrence(kind, whole, ends, start_BC, 1), start_BC, 1)[:, :, None]
    if kind == SUM:
        states = torch.addcmul(own, product, handed)
    else:
        states = torch.maximum(handed + product, own)
    return states.flatten(1, 2)[:, :tokens]


def _chunked(x_BTC: Tensor, tail: int, num_chunks: int, value: float) -> Tensor:
    padded = torch.nn.functional.pad(x_BTC, (0, 0, 0, tail), value=value)
    return padded.unflatten(1, (num_chunks, STEPS))
