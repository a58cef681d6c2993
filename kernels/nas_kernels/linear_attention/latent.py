"""Causal attention through latents whose weights over the tokens are a running softmax.

Shapes: B batch, H query heads, G key/value heads, R = H / G, T tokens, N chunks of C tokens,
L latents, V value width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from nas_kernels.linear_attention.chunked import CHUNK, causal_mask, chunk_states
from nas_kernels.recurrence import LOG_SUM, before_each, recorded, recurrence

# Inside a chunk `exp(logit - total)` is the product of two factors around a reference between the
# log-sum at the chunk's first token and its end. They stay inside fp32 (also 64 of them summed) and
# the product is exact while the log-sum rises by up to MAX_ABOVE + MAX_SHIFT = 150 in one chunk. In
# a steeper rise only the tokens after it are wrong: no token ever depends on a later one.
MAX_ABOVE = 70.0
MAX_SHIFT = 80.0


def latent_attention(
    weight_BHTL: Tensor,
    logit_BGTL: Tensor,
    v_BGTV: Tensor,
    state: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Compute `o_t = sum_l w_tl sum_{s<=t} softmax_{s<=t}(logit_sl) v_s`.

    Args:
        weight_BHTL: of the latents for every query; head h reads group `h // (H / G)`.
        logit_BGTL: of the tokens for every latent.
        v_BGTV: values.
        state: mean value of every latent (B, G, L, V) and its log-sum-exp (B, G, L) before the
            first token; None where there are no earlier tokens.

    Returns:
        Outputs (B, H, T, V) and the state after the last token.

    Source: Dolga et al. 2024, "Latte: Latent Attention for Linear Time Transformers", causal form.
    """
    batch, heads, tokens, latents = weight_BHTL.shape
    groups, value_dim = v_BGTV.shape[1], v_BGTV.shape[-1]
    repeats, chunk = heads // groups, min(CHUNK, tokens)
    num_chunks = -(-tokens // chunk)
    pad = (0, 0, 0, num_chunks * chunk - tokens)
    split = (batch, groups, num_chunks, chunk)
    # exp() of it is zero; minus infinity would turn gradients into NaN.
    lowest = torch.finfo(logit_BGTL.dtype).min / 4
    logits = F.pad(logit_BGTL, pad, value=lowest)
    total = _running_log_sum(logits, chunk, lowest) if recorded() else logits.logcumsumexp(dim=2)
    if state is not None:
        total = torch.logaddexp(total, state[1][:, :, None])
    logits, total = logits.reshape(*split, latents), total.reshape(*split, latents)
    v = F.pad(v_BGTV, pad).reshape(*split, value_dim)
    end, first = total[:, :, :, -1], total[:, :, :, :1]
    before = torch.full_like(end[:, :, :1], lowest) if state is None else state[1][:, :, None]
    before = torch.cat([before, end[:, :, :-1]], dim=2)

    weight = F.pad(weight_BHTL, pad).reshape(batch, groups, repeats, num_chunks, chunk, latents)
    weight = weight.transpose(2, 3)  # (B, G, N, R, C, L): heads become rows of one matrix
    rows = (batch, groups, num_chunks, repeats * chunk, latents)
    shift = (end[:, :, :, None] - first - MAX_ABOVE).clamp(0.0, MAX_SHIFT).detach()
    middle = first + shift
    inside = (weight * (middle - total).exp()[:, :, :, None]).reshape(rows)
    scores = inside @ (logits - middle).clamp_max(MAX_ABOVE).exp().transpose(-1, -2)
    scores = scores.masked_fill(causal_mask(chunk, repeats, scores.device), 0.0)
    update = (logits - end[:, :, :, None]).exp().transpose(-1, -2) @ v
    means, last = chunk_states(update, (before - end).exp(), None if state is None else state[0])
    earlier = (weight * (before[:, :, :, None] - total).exp()[:, :, :, None]).reshape(rows)
    out = scores @ v.to(scores.dtype) + earlier @ means.to(earlier.dtype)
    out = out.reshape(batch, groups, num_chunks, repeats, chunk, value_dim).transpose(2, 3)
    out = out.reshape(batch, heads, num_chunks * chunk, value_dim)[:, :, :tokens]
    return out, (last, end[:, :, -1])


def _running_log_sum(logits_BGTL: Tensor, chunk: int, lowest: float) -> Tensor:
    """Return `logcumsumexp` over whole chunks of tokens, of any number."""
    own = logits_BGTL.unflatten(2, (-1, chunk)).logcumsumexp(dim=3)
    ends = own[:, :, :, -1]
    start = torch.full_like(ends[:, :, 0], lowest)
    ends = recurrence(LOG_SUM, ends.new_zeros(1, 1, 1, 1), ends, start, 2)
    handed = before_each(ends, start, 2)[:, :, :, None]
    return torch.logaddexp(own, handed).flatten(2, 3)
