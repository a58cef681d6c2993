"""Attention with normalised scores in place of softmax.

Shapes: B batch, T tokens, H query heads, G key/value heads, K head width, S keys.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from searchspace.mixers.attention import (
    AttentionMixer,
    at_least_float,
    causal_mask,
    grouped_scores,
    grouped_sum,
    in_query_chunks,
)
from searchspace.mixers.base import ATTENTION_AXES, SharedKV
from searchspace.mixers.relu_attention import num_visible
from searchspace.specs import MixerSpec

EPS = 1e-5


class NormAttention(AttentionMixer):
    """Scores of a query brought to zero mean and unit variance over the keys it sees.

    Weights are `gain_h * normalised + bias_h`, which may be negative. The sum over n keys is
    divided by `sqrt(n)`, so that its size does not grow with the sequence.

    Source: Richter and Wattenhofer 2020, "Normalized Attention Without Probability Cage", section
    3; the division is ours.
    """

    axes: ClassVar[dict[str, tuple[str, ...]]] = {
        **ATTENTION_AXES,
        "norm_attention_gain": ("num_heads",),
        "norm_attention_bias": ("num_heads",),
    }

    def __init__(self, spec: MixerSpec) -> None:
        super().__init__(spec)
        self.norm_attention_gain = nn.Parameter(torch.empty(spec.num_heads))
        self.norm_attention_bias = nn.Parameter(torch.empty(spec.num_heads))

    def reset(self, generator: torch.Generator, depth: int) -> None:
        """Initialise; every head starts with gain 1 and bias 0."""
        super().reset(generator, depth)
        nn.init.ones_(self.norm_attention_gain)
        nn.init.zeros_(self.norm_attention_bias)

    def attention_probs(self, x_BTD: Tensor, shared: SharedKV | None = None) -> Tensor | None:
        """Return None: the weights are no softmax."""
        return None

    def attend(self, q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, start: int) -> Tensor:
        """Weigh the visible keys."""
        return in_query_chunks(self._attend, q_BHTK, k_BGSK, v_BGSK, start, self.causal)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
        tokens, num_keys = q.shape[2], k.shape[2]
        scores = grouped_scores(q, k)
        bias = self.with_alibi(None, q, num_keys, start)
        if bias is not None:
            scores = scores + bias.to(scores.dtype)
        hidden, count = None, scores.new_full((1, 1), num_keys)
        sum_BG1K = at_least_float(v).sum(dim=2, keepdim=True)
        if self.causal and tokens > 1:
            hidden = ~causal_mask(start, tokens, num_keys, q.device)
            count = num_visible(start, tokens, q.device).to(scores)
            sum_BG1K = at_least_float(v).cumsum(dim=2)[:, :, start:]
        mean = _zero(scores, hidden).sum(dim=-1, keepdim=True) / count
        centred = _zero(scores - mean, hidden)
        variance = centred.square().sum(dim=-1, keepdim=True) / count
        # Gain, bias and deviation are the same for all keys of a query, so they come after the sum.
        # Of a single key only the bias is left: its normalised score is 0.
        gain, shift = (
            p[:, None, None] for p in (self.norm_attention_gain, self.norm_attention_bias)
        )
        normalised = grouped_sum(centred, v) * (gain / (variance + EPS).sqrt())
        sum_BH1K = sum_BG1K.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
        return ((normalised + shift * sum_BH1K) / count.sqrt()).to(v.dtype)


def _zero(x_BHTS: Tensor, hidden_TS: Tensor | None) -> Tensor:
    """Set what belongs to hidden keys to 0."""
    return x_BHTS if hidden_TS is None else x_BHTS.masked_fill(hidden_TS, 0.0)
