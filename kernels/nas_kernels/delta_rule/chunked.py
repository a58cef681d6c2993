"""The chunked form: matrix products inside chunks, a short recurrence between them.

Shapes: B batch, H query heads, G key/value heads, R = H / G, T tokens, N chunks of C tokens,
K key width, V value width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from nas_kernels.constants import cached_constant
from nas_kernels.precision import at_least_fp32, without_autocast
from nas_kernels.recurrence import before_each, delta_states, recorded

CHUNK = 32


@cached_constant
def _later(chunk: int, repeats: int, own: bool, device: torch.device) -> Tensor:
    """Return where a key comes after a query, or (`own`) at the same place; (R * C, C)."""
    mask_CC = torch.ones(chunk, chunk, dtype=torch.bool, device=device).triu_(0 if own else 1)
    return mask_CC.repeat(repeats, 1)


def delta_rule(
    q_BHTK: Tensor,
    k_BGTK: Tensor,
    v_BGTV: Tensor,
    beta_BGT: Tensor,
    state_BGKV: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute `recurrent_delta_rule` with matrix products; same arguments and results.

    Everything is computed in fp32 or wider, also under autocast: errors of one token's correction
    go into all later ones.

    Source: Yang et al. 2024, "Parallelizing Linear Transformers with the Delta Rule over Sequence
    Length", equations 8-11 (chunkwise UT form).
    """
    with without_autocast(q_BHTK):
        q, k, v, beta = (at_least_fp32(x) for x in (q_BHTK, k_BGTK, v_BGTV, beta_BGT))
        if state_BGKV is None:
            state = v.new_zeros(*k.shape[:2], k.shape[-1], v.shape[-1])
        else:
            state = state_BGKV.to(v.dtype)
        if q.shape[2] == 1:
            return _step(q, k, v, beta, state)
        return _chunks(q, k, v, beta, state)


def _chunks(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    (batch, heads, tokens, key_dim), groups = q.shape, k.shape[1]
    repeats = heads // groups
    chunk = CHUNK if recorded() else min(CHUNK, 1 << (tokens - 1).bit_length())
    num_chunks = -(-tokens // chunk)
    # Padded tokens have beta = 0 and k = 0: they change nothing.
    pad = num_chunks * chunk - tokens
    k, v = (F.pad(x, (0, 0, 0, pad)).unflatten(2, (num_chunks, chunk)) for x in (k, v))
    beta = F.pad(beta, (0, pad)).unflatten(2, (num_chunks, chunk))[..., None]
    q = F.pad(q, (0, 0, 0, pad)).reshape(batch, groups, repeats, num_chunks, chunk, key_dim)
    # The heads of a group become rows of one matrix.
    q = q.transpose(2, 3).reshape(batch, groups, num_chunks, repeats * chunk, key_dim)
    k_beta, k_KC = k * beta, k.transpose(-1, -2)
    overlap = (k_beta @ k_KC).masked_fill(_later(chunk, 1, True, q.device), 0.0)
    inverse = _unit_lower_inverse(overlap)
    corrections, values = inverse @ k_beta, inverse @ (v * beta)
    before, written, last = _chunk_states(k_KC, corrections, values, state)
    scores = (q @ k_KC).masked_fill(_later(chunk, repeats, False, q.device), 0.0)
    out = q @ before + scores @ written
    out = out.unflatten(3, (repeats, chunk)).transpose(2, 3)
    return out.reshape(batch, heads, num_chunks * chunk, -1)[:, :, :tokens], last


def _chunk_states(
    k_KC: Tensor, corrections: Tensor, values: Tensor, state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the states before every chunk, what each writes, and the state after the last."""
    if recorded():
        states, all_written = delta_states(k_KC, corrections, values, state)
        return before_each(states, state, 2), all_written, states[:, :, -1]
    before, written = [], []
    for n in range(values.shape[2]):
        before.append(state)
        written.append(values[:, :, n] - corrections[:, :, n] @ state)
        state = state + k_KC[:, :, n] @ written[-1]
    return torch.stack(before, dim=2), torch.stack(written, dim=2), state


def _unit_lower_inverse(lower_CC: Tensor) -> Tensor:
    """Return the inverse of I + L for strictly lower triangular L (..., C, C), C a power of 2.

    Neighbouring diagonal blocks, inverted already, are merged until one is left:
    `[[A, 0], [L, B]]^-1 = [[A^-1, 0], [-B^-1 L A^-1, B^-1]]`. That needs matrix products only.
    """
    chunk, size = lower_CC.shape[-1], 1
    inverse = torch.ones_like(lower_CC[..., :1, None])
    while size < chunk:
        pairs = (chunk // (2 * size), 2 * size)
        blocks = lower_CC.unflatten(-1, pairs).unflatten(-3, pairs).diagonal(dim1=-4, dim2=-2)
        below = blocks.movedim(-1, -3)[..., size:, :size]
        first, second = inverse.unflatten(-3, (-1, 2)).unbind(-3)
        corner = -(second @ below @ first)
        top = torch.cat([first, torch.zeros_like(first)], dim=-1)
        inverse = torch.cat([top, torch.cat([corner, second], dim=-1)], dim=-2)
        size *= 2
    return inverse.squeeze(-3)


def _step(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token: correct the state, then read it."""
    batch, heads, _, key_dim = q.shape
    groups = k.shape[1]
    state = state + (beta[..., None] * k).transpose(-1, -2) * (v - k @ state)
    out = q.reshape(batch, groups, heads // groups, key_dim) @ state
    return out.reshape(batch, heads, 1, -1), state
