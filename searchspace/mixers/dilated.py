"""Dilated attention: a mixture of segments that grow and thin out at the same pace.

Shapes: B batch, T tokens, D d_model, H query heads, G key/value heads, K head width, N segments,
R rate, M tokens of a segment that are left of it at that rate, S keys.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from nas_kernels.constants import cached_constant
from searchspace.mixers.attention import apply_mask, at_least_float, sdpa
from searchspace.mixers.segments import SegmentMixer
from searchspace.positions import alibi_bias


class DilatedAttention(SegmentMixer):
    """Exact attention in thinned segments, mixed by the softmax denominators.

    Rate r = 1, 2, 4, ... (`num_rates` of them) cuts the sequence into segments of
    `segment * r` tokens, of which head h keeps every r-th from h mod r on. What a token that is
    not kept would get from a rate has weight 0.

    Source: Ding et al. 2023, "LongNet: Scaling Transformers to 1,000,000,000 Tokens", equations
    3-10 and section 2.2 (offsets of heads).
    """

    options: ClassVar[dict[str, Any]] = {"segment": 64, "num_rates": 3}

    @property
    def rates(self) -> list[int]:
        """Dilation rates, ascending."""
        return [2**power for power in range(int(self.option("num_rates")))]

    @property
    def segment_tokens(self) -> int:
        """Tokens of the largest segment, which is a multiple of all others."""
        return int(self.option("segment")) * self.rates[-1]

    def attend_segments(self, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor) -> Tensor:
        """Attend at every rate and mix."""
        parts = [self._attend_at(q_BHTK, k_BGTK, v_BGTK, rate) for rate in self.rates]
        if len(parts) == 1:
            return parts[0][0]
        # All rates together are one softmax; a rate's share is its part of the denominator.
        share = torch.stack([log_sum for _, log_sum in parts]).softmax(dim=0)
        outs = torch.stack([out for out, _ in parts])
        return (share.to(outs.dtype).unsqueeze(-1) * outs).sum(dim=0)

    def _attend_at(self, q: Tensor, k: Tensor, v: Tensor, rate: int) -> tuple[Tensor, Tensor]:
        """Return (B, H, T, K) and the logarithm of the denominators (B, H, T)."""
        heads, tokens = q.shape[1:3]
        # A sequence shorter than the segment is padded to the next multiple of the rate only.
        width = min(int(self.option("segment")) * rate, -(-tokens // rate) * rate)
        num_segments = -(-tokens // width)
        tail = num_segments * width - tokens
        head_H = torch.arange(heads, device=q.device)
        offset_H, group_H = head_H % rate, head_H // (heads // k.shape[1])

        def thinned(x: Tensor, head: Tensor) -> Tensor:
            folded = F.pad(x, (0, 0, 0, tail)).unflatten(2, (num_segments, -1, rate))
            return folded[:, head, :, :, offset_H]  # (H, B, N, M, K)

        q, k, v = thinned(q, head_H), thinned(k, group_H), thinned(v, group_H)
        scores = at_least_float(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]))
        scores = apply_mask(scores, self._bias(num_segments, width, tokens, rate, heads, q.device))
        weights = scores.softmax(dim=-1)
        thin = weights.to(v.dtype) @ v
        # The largest weight is exp(largest score) / denominator: no second exponential is needed.
        log_sum = scores.amax(dim=-1) - weights.amax(dim=-1).log()
        # What is not kept is filled in by a mask: unlike a write to a view, it is one of few ways
        # that graphs for any number of tokens have.
        own_H11R = (torch.arange(rate, device=q.device) == offset_H[:, None])[:, None, None]
        out = torch.where(own_H11R[..., None], thin.transpose(0, 1).unsqueeze(-2), 0.0)
        spread = torch.where(own_H11R, log_sum.transpose(0, 1).unsqueeze(-1), -math.inf)
        return out.flatten(2, 4)[:, :, :tokens], spread.flatten(2, 4)[:, :, :tokens]

    def _bias(
        self, num_segments: int, width: int, tokens: int, rate: int, heads: int, device: Any
    ) -> Tensor | None:
        mask = _thinned_mask(num_segments, width, tokens, rate, heads, self.causal, device)
        if self.position != "alibi":
            return mask
        kept = width // rate
        bias = rate * alibi_bias(heads, kept, kept, 0, device)[:, None, None]
        return bias if mask is None else bias.masked_fill(~mask, -math.inf)

    def attend_last(self, q_BH1K: Tensor, k_BGSK: Tensor, v_BGSK: Tensor) -> Tensor:
        """Attend once to each key, weighed by the number of rates at which it is visible."""
        heads, num_keys, device = q_BH1K.shape[1], k_BGSK.shape[2], q_BH1K.device
        bias = _log_count(int(self.option("segment")), tuple(self.rates), heads, num_keys, device)
        if self.position == "alibi":
            bias = bias + alibi_bias(heads, 1, num_keys, num_keys - 1, device)
        return sdpa(q_BH1K, k_BGSK, v_BGSK, bias[None])


@cached_constant
def _thinned_mask(
    num_segments: int,
    width: int,
    tokens: int,
    rate: int,
    heads: int,
    causal: bool,
    device: torch.device,
) -> Tensor | None:
    """Return which thinned keys are visible, (M, M) or (H, 1, N, M, M); None for all."""
    index_M = torch.arange(width // rate, device=device)
    if causal:
        # Padding stands behind all tokens: they cannot see it.
        return index_M[:, None] >= index_M
    if num_segments * width == tokens:
        return None
    segment_NM = torch.arange(num_segments, device=device)[:, None] * width + index_M * rate
    offset_H = torch.arange(heads, device=device) % rate
    there_HNM = segment_NM + offset_H[:, None, None] < tokens
    # Padding sees itself: a row without any key would give NaN.
    own_MM = index_M[:, None] == index_M
    return (there_HNM[:, :, None, :] | own_MM)[:, None]


@cached_constant
def _log_count(
    segment: int, rates: tuple[int, ...], heads: int, num_keys: int, device: torch.device
) -> Tensor:
    """Return the logarithm of the number of rates at which the last key sees each one (H, 1, S).

    Keys are those of the largest segment so far, so position 0 begins a segment at every rate.
    """
    key_S, last = torch.arange(num_keys, device=device), num_keys - 1
    offset_H1 = torch.arange(heads, device=device)[:, None]
    count_HS = torch.zeros(heads, num_keys, device=device)
    for rate in rates:
        same_segment = key_S // (segment * rate) == last // (segment * rate)
        kept = (key_S % rate == offset_H1 % rate) & (last % rate == offset_H1 % rate)
        count_HS = count_HS + (same_segment & kept)
    return count_HS.log()[:, None]
