"""The definition: one token after the other.

Shapes: B batch, H query heads, G key/value heads, T tokens, K key width, V value width,
E = K or 1 features of the decay.
"""

from __future__ import annotations

import torch
from torch import Tensor


def recurrent_linear_attention(
    q_BHTK: Tensor,
    k_BGTK: Tensor,
    v_BGTV: Tensor,
    log_decay_BGTE: Tensor | None = None,
    state_BGKV: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute `S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T` and `o_t = S_t^T q_t`.

    Args:
        q_BHTK: queries; head h reads the state of key/value head `h // (H / G)`.
        k_BGTK: keys.
        v_BGTV: values.
        log_decay_BGTE: g_t <= 0, per key feature or one per head; None means no decay.
        state_BGKV: the state before the first token; None means zeros.

    Returns:
        Outputs (B, H, T, V) and the state after the last token (B, G, K, V).

    Source: Katharopoulos et al. 2020, equations 16-20; Yang et al. 2023 (GLA), equation 3.
    """
    batch, groups, _, key_dim = k_BGTK.shape
    repeats = q_BHTK.shape[1] // groups
    state = (
        v_BGTV.new_zeros(batch, groups, key_dim, v_BGTV.shape[-1])
        if state_BGKV is None
        else state_BGKV
    )
    outputs = []
    for t in range(q_BHTK.shape[2]):
        if log_decay_BGTE is not None:
            state = state * log_decay_BGTE[:, :, t, :, None].exp()
        state = state + k_BGTK[:, :, t, :, None] * v_BGTV[:, :, t, None, :]
        per_head = state.repeat_interleave(repeats, dim=1)
        outputs.append((q_BHTK[:, :, t, :, None] * per_head).sum(dim=2))
    return torch.stack(outputs, dim=2), state
