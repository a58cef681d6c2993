"""The definition: one token after the other.

Shapes: B batch, H query heads, G key/value heads, T tokens, K key width, V value width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def recurrent_delta_rule(
    q_BHTK: Tensor,
    k_BGTK: Tensor,
    v_BGTV: Tensor,
    beta_BGT: Tensor,
    state_BGKV: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute `S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T` and `o_t = S_t^T q_t`.

    Args:
        q_BHTK: queries; head h reads the state of key/value head `h // (H / G)`.
        k_BGTK: keys, of length 1.
        v_BGTV: values.
        beta_BGT: share of what is stored under the key that the value replaces, in [0, 1].
        state_BGKV: the state before the first token; None means zeros.

    Returns:
        Outputs (B, H, T, V) and the state after the last token (B, G, K, V).

    Source: Yang et al. 2024, "Parallelizing Linear Transformers with the Delta Rule over Sequence
    Length", section 2.2.
    """
    batch, groups, tokens, key_dim = k_BGTK.shape
    repeats = q_BHTK.shape[1] // groups
    state = state_BGKV
    if state is None:
        state = v_BGTV.new_zeros(batch, groups, key_dim, v_BGTV.shape[-1])
    outputs = []
    for t in range(tokens):
        k, v = k_BGTK[:, :, t, :, None], v_BGTV[:, :, t, None, :]
        stored = (state * k).sum(dim=2, keepdim=True)
        state = state + beta_BGT[:, :, t, None, None] * k * (v - stored)
        per_head = state.repeat_interleave(repeats, dim=1)
        outputs.append((q_BHTK[:, :, t, :, None] * per_head).sum(dim=2))
    return torch.stack(outputs, dim=2), state
