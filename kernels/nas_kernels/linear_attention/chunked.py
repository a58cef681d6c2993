"""The chunked form: matrix products inside chunks, a short recurrence between them.

Shapes: B batch, H query heads, G key/value heads, R = H / G, T tokens, N chunks of C tokens,
K key width, V value width, E = K or 1 features of the decay.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from nas_kernels.constants import cached_constant
from nas_kernels.recurrence import SUM, before_each, recorded, recurrence

# exp(-cumulative decay) must stay inside fp32: 32 tokens at MIN_LOG_DECAY give exp(64) = 6e27.
CHUNK = 64
CHUNK_WITH_DECAY = 32
MIN_LOG_DECAY = -2.0


@cached_constant
def causal_mask(chunk: int, repeats: int, device: torch.device) -> Tensor:
    """Return what a token must not see, (repeats * C, C)."""
    mask_CC = torch.ones(chunk, chunk, dtype=torch.bool, device=device).triu_(1)
    return mask_CC.repeat(repeats, 1)


def linear_attention(
    q_BHTK: Tensor,
    k_BGTK: Tensor,
    v_BGTV: Tensor,
    log_decay_BGTE: Tensor | None = None,
    state_BGKV: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute `recurrent_linear_attention` with matrix products; same arguments and results.

    A decay per feature is clamped to `MIN_LOG_DECAY` per token (a factor of 0.135), which a gate
    of GLA's form `sigmoid(x)^(1/16)` reaches only at x < -32. A decay per head (one column) may be
    anything up to 0. The state is kept in fp32 or wider.

    Source: Yang et al. 2023, "Gated Linear Attention Transformers", section 4 (chunkwise form);
    Dao and Gu 2024, "Transformers are SSMs", section 6 (decay per head).
    """
    batch, heads, tokens, key_dim = q_BHTK.shape
    groups, value_dim = k_BGTK.shape[1], v_BGTV.shape[-1]
    wide = log_decay_BGTE is not None and log_decay_BGTE.shape[-1] > 1
    if log_decay_BGTE is not None and wide:
        log_decay_BGTE = log_decay_BGTE.clamp_min(MIN_LOG_DECAY)
    if tokens == 1:
        return _step(q_BHTK, k_BGTK, v_BGTV, log_decay_BGTE, state_BGKV)
    repeats = heads // groups
    chunk = max(min(CHUNK_WITH_DECAY if wide else CHUNK, tokens), 1)
    num_chunks = max(-(-tokens // chunk), 1)
    pad = (0, 0, 0, num_chunks * chunk - tokens)
    split = (batch, groups, num_chunks, chunk)
    k = F.pad(k_BGTK, pad).reshape(*split, key_dim)
    v = F.pad(v_BGTV, pad).reshape(*split, value_dim)
    q = F.pad(q_BHTK, pad).reshape(batch, groups, repeats, num_chunks, chunk, key_dim)
    q = q.transpose(2, 3)  # (B, G, N, R, C, K): the heads of a group become rows of one matrix
    q_scores, k_scores, k_out, decay, weight = q, k, k, None, None
    if log_decay_BGTE is not None:
        total = F.pad(log_decay_BGTE, pad).reshape(*split, -1).cumsum(dim=3)
        decay = total[:, :, :, -1].exp()
        k_out = (k * (total[:, :, :, -1:] - total).exp()).to(k.dtype)
        q = (q * total.exp()[:, :, :, None]).to(q.dtype)
        if wide:
            q_scores, k_scores = q, (k * (-total).exp()).to(k.dtype)
        else:
            weight = _segment_decay(total)
    rows = (batch, groups, num_chunks, repeats * chunk)
    scores = q_scores.reshape(*rows, key_dim) @ k_scores.transpose(-1, -2)
    if weight is not None:
        scores = (scores.unflatten(3, (repeats, chunk)) * weight[:, :, :, None]).flatten(3, 4)
        scores = scores.to(v.dtype)
    else:
        scores = scores.masked_fill(causal_mask(chunk, repeats, scores.device), 0.0)
    states, last = chunk_states(k_out.transpose(-1, -2) @ v, decay, state_BGKV)
    out = scores @ v + q.reshape(*rows, key_dim) @ states.to(q.dtype)
    out = out.reshape(batch, groups, num_chunks, repeats, chunk, value_dim).transpose(2, 3)
    return out.reshape(batch, heads, num_chunks * chunk, value_dim)[:, :, :tokens], last


def full_linear_attention(q_BHTK: Tensor, k_BGSK: Tensor, v_BGSV: Tensor) -> Tensor:
    """Return `q (sum over all S tokens of k v^T)`, (B, H, T, V): the bidirectional form."""
    batch, heads, tokens, key_dim = q_BHTK.shape
    groups = k_BGSK.shape[1]
    state_BGKV = k_BGSK.transpose(-1, -2) @ v_BGSV
    out = q_BHTK.reshape(batch, groups, heads // groups * tokens, key_dim) @ state_BGKV
    return out.reshape(batch, heads, tokens, v_BGSV.shape[-1])


def _segment_decay(total_BGNC1: Tensor) -> Tensor:
    """Return the decay from token s to token t (B, G, N, C, C), zero where t comes before s."""
    mask = causal_mask(total_BGNC1.shape[3], 1, total_BGNC1.device)
    return (total_BGNC1 - total_BGNC1.transpose(-1, -2)).masked_fill(mask, -torch.inf).exp()


def chunk_states(
    update_BGNKV: Tensor, decay_BGNE: Tensor | None, state_BGKV: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the state before every chunk (B, G, N, K, V) and the one after the last.

    Args:
        update_BGNKV: what every chunk adds.
        decay_BGNE: factors on the state from the start to the end of every chunk.
        state_BGKV: the state before the first chunk; None means zeros.
    """
    update_BGNKV = update_BGNKV.to(torch.promote_types(update_BGNKV.dtype, torch.float32))
    if decay_BGNE is None:
        after = update_BGNKV.cumsum(dim=2)
        if state_BGKV is not None:
            after = after + state_BGKV[:, :, None]
        first = torch.zeros_like(after[:, :, :1]) if state_BGKV is None else state_BGKV[:, :, None]
        return torch.cat([first, after[:, :, :-1]], dim=2), after[:, :, -1]
    state = torch.zeros_like(update_BGNKV[:, :, 0]) if state_BGKV is None else state_BGKV
    if recorded():
        states = recurrence(SUM, decay_BGNE[..., None], update_BGNKV, state, 2)
        return before_each(states, state, 2), states[:, :, -1]
    before = []
    for n in range(update_BGNKV.shape[2]):
        before.append(state)
        state = state * decay_BGNE[:, :, n, :, None] + update_BGNKV[:, :, n]
    return torch.stack(before, dim=2), state


def _step(
    q_BH1K: Tensor,
    k_BG1K: Tensor,
    v_BG1V: Tensor,
    log_decay_BG1E: Tensor | None,
    state_BGKV: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One token: update the state, then read it."""
    dtype = torch.promote_types(v_BG1V.dtype, torch.float32)
    state = k_BG1K.transpose(-1, -2).to(dtype) * v_BG1V
    if state_BGKV is not None:
        if log_decay_BG1E is not None:
            gate = log_decay_BG1E.exp().transpose(-1, -2)
            state = state + state_BGKV * gate
        else:
            state = state + state_BGKV
    batch, heads, _, key_dim = q_BH1K.shape
    groups = k_BG1K.shape[1]
    out = q_BH1K.reshape(batch, groups, heads // groups, key_dim) @ state.to(q_BH1K.dtype)
    return out.reshape(batch, heads, 1, -1), state
