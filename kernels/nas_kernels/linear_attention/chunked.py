"""The chunked form: matrix products inside chunks, a short recurrence between them.

Shapes: B batch, H query heads, G key/value heads, R = H / G, T tokens, N chunks of C tokens,
K key width, V value width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from nas_kernels.constants import cached_constant

# exp(-cumulative decay) must stay inside fp32: 32 tokens at MIN_LOG_DECAY give exp(64) = 6e27.
CHUNK = 64
CHUNK_WITH_DECAY = 32
MIN_LOG_DECAY = -2.0


@cached_constant
def _causal_mask(chunk: int, repeats: int, device: torch.device) -> Tensor:
    mask_CC = torch.ones(chunk, chunk, dtype=torch.bool, device=device).triu_(1)
    return mask_CC.repeat(repeats, 1)


def linear_attention(
    q_BHTK: Tensor,
    k_BGTK: Tensor,
    v_BGTV: Tensor,
    log_decay_BGTK: Tensor | None = None,
    state_BGKV: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute `recurrent_linear_attention` with matrix products; same arguments and results.

    The log decay is clamped to `MIN_LOG_DECAY` per token (a factor of 0.135), which a gate of
    GLA's form `sigmoid(x)^(1/16)` reaches only at x < -32.

    Source: Yang et al. 2023, "Gated Linear Attention Transformers", section 4 (chunkwise form).
    """
    if q_BHTK.shape[2] == 1:
        return _step(q_BHTK, k_BGTK, v_BGTV, log_decay_BGTK, state_BGKV)
    batch, heads, tokens, key_dim = q_BHTK.shape
    groups, value_dim = k_BGTK.shape[1], v_BGTV.shape[-1]
    repeats = heads // groups
    chunk = min(CHUNK if log_decay_BGTK is None else CHUNK_WITH_DECAY, tokens)
    num_chunks = -(-tokens // chunk)
    pad = (0, 0, 0, num_chunks * chunk - tokens)
    split = (batch, groups, num_chunks, chunk)
    k = F.pad(k_BGTK, pad).reshape(*split, key_dim)
    v = F.pad(v_BGTV, pad).reshape(*split, value_dim)
    q = F.pad(q_BHTK, pad).reshape(batch, groups, repeats, num_chunks, chunk, key_dim)
    q = q.transpose(2, 3)  # (B, G, N, R, C, K): the heads of a group become rows of one matrix
    if log_decay_BGTK is None:
        k_in = k_out = k
        decay = None
    else:
        steps = F.pad(log_decay_BGTK.clamp_min(MIN_LOG_DECAY), pad).reshape(*split, key_dim)
        total = steps.cumsum(dim=3)
        q = q * total.exp()[:, :, :, None]
        k_in = k * (-total).exp()
        k_out = k * (total[:, :, :, -1:] - total).exp()
        decay = total[:, :, :, -1].exp()
    q = q.reshape(batch, groups, num_chunks, repeats * chunk, key_dim)
    scores = q @ k_in.transpose(-1, -2)
    scores = scores.masked_fill(_causal_mask(chunk, repeats, scores.device), 0.0)
    states, last = _chunk_states(k_out.transpose(-1, -2) @ v, decay, state_BGKV)
    out = scores @ v + q @ states
    out = out.reshape(batch, groups, num_chunks, repeats, chunk, value_dim).transpose(2, 3)
    return out.reshape(batch, heads, num_chunks * chunk, value_dim)[:, :, :tokens], last


def _chunk_states(
    update_BGNKV: Tensor, decay_BGNK: Tensor | None, state_BGKV: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the state before every chunk (B, G, N, K, V) and the one after the last."""
    if decay_BGNK is None:
        after = update_BGNKV.cumsum(dim=2)
        if state_BGKV is not None:
            after = after + state_BGKV[:, :, None]
        first = torch.zeros_like(after[:, :, :1]) if state_BGKV is None else state_BGKV[:, :, None]
        return torch.cat([first, after[:, :, :-1]], dim=2), after[:, :, -1]
    state = torch.zeros_like(update_BGNKV[:, :, 0]) if state_BGKV is None else state_BGKV
    before = []
    for n in range(update_BGNKV.shape[2]):
        before.append(state)
        state = state * decay_BGNK[:, :, n, :, None] + update_BGNKV[:, :, n]
    return torch.stack(before, dim=2), state


def _step(
    q_BH1K: Tensor,
    k_BG1K: Tensor,
    v_BG1V: Tensor,
    log_decay_BG1K: Tensor | None,
    state_BGKV: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One token: update the state, then read it."""
    state = k_BG1K.transpose(-1, -2) * v_BG1V
    if state_BGKV is not None:
        if log_decay_BG1K is not None:
            gate = log_decay_BG1K.clamp_min(MIN_LOG_DECAY).exp().transpose(-1, -2)
            state = torch.addcmul(state, state_BGKV, gate)
        else:
            state = state + state_BGKV
    batch, heads, _, key_dim = q_BH1K.shape
    groups = k_BG1K.shape[1]
    out = q_BH1K.reshape(batch, groups, heads // groups, key_dim) @ state
    return out.reshape(batch, heads, 1, -1), state
