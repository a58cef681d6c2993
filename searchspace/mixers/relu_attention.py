"""Attention with ReLU in place of softmax.

Shapes: B batch, T tokens, H query heads, G key/value heads, K head width, S keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nas_kernels.constants import cached_constant
from searchspace.mixers.attention import (
    AttentionMixer,
    apply_mask,
    grouped_scores,
    grouped_sum,
    in_query_chunks,
)
from searchspace.mixers.base import SharedKV


class ReluAttention(AttentionMixer):
    """Weights `relu(q k / sqrt(K)) / L`, with L the number of keys that a query sees.

    That is the sequence's length in the bidirectional form. ALiBi is added inside of the ReLU.

    Source: Wortsman et al. 2023, "Replacing softmax with ReLU in Vision Transformers", section 3.
    """

    def attention_probs(self, x_BTD: Tensor, shared: SharedKV | None = None) -> Tensor | None:
        """Return None: the weights are no softmax."""
        return None

    def attend(self, q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, start: int) -> Tensor:
        """Weigh the visible keys."""
        return in_query_chunks(self._attend, q_BHTK, k_BGSK, v_BGSK, start, self.causal)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
        tokens, num_keys = q.shape[2], k.shape[2]
        weights = apply_mask(grouped_scores(q, k), self.full_mask(q, num_keys, start)).relu()
        out = grouped_sum(weights, v)
        return out / (num_visible(start, tokens, q.device).to(out) if self.causal else num_keys)


@cached_constant
def num_visible(start: int, tokens: int, device: torch.device) -> Tensor:
    """Return how many tokens each query of a causal form sees, itself counted, (T, 1)."""
    return torch.arange(start + 1, start + tokens + 1, device=device)[:, None]
