"""Base of the mixers that attend within segments: their state is the current segment.

Shapes: B batch, T tokens, D d_model, H query heads, G key/value heads, K head width, S keys of the
current segment.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from searchspace.mixers.attention import AttentionMixer
from searchspace.mixers.kv_cache import SegmentCache


class SegmentMixer(AttentionMixer):
    """Attention in which no token sees beyond its segment of `segment_tokens`."""

    ordered: ClassVar[bool] = True

    @property
    def segment_tokens(self) -> int:
        """Tokens of the (largest) segment."""
        raise NotImplementedError

    def attend_segments(self, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor) -> Tensor:
        """Return (B, H, T, K) for tokens whose first one begins a segment."""
        raise NotImplementedError

    def attend_whole(self, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor) -> Tensor:
        """Return (B, H, T, K) within a sequence from its first token on."""
        return self.attend_segments(q_BHTK, k_BGTK, v_BGTK)

    def attend_last(self, q_BH1K: Tensor, k_BGSK: Tensor, v_BGSK: Tensor) -> Tensor:
        """Return (B, H, 1, K) for the newest token, the last of the S of its segment so far."""
        raise NotImplementedError

    def init_state(
        self, batch: int, max_tokens: int, device: torch.device | None = None
    ) -> SegmentCache:
        """Return an empty cache; it never holds more than a segment."""
        held = min(self.segment_tokens, max_tokens)
        shape = (batch, self.spec.num_kv_heads, held, self.spec.head_dim)
        return SegmentCache(
            k_BGSK=torch.zeros(shape, device=device),
            v_BGSK=torch.zeros(shape, device=device),
            segment=self.segment_tokens,
            conv_BTC=self.init_conv(batch, device),
        )

    def forward(self, x_BTD: Tensor, state: SegmentCache | None = None) -> Tensor:
        """Attend within segments, going on from the state where there is one."""
        start = 0 if state is None else state.length
        q, k, v = self.project_qkv(x_BTD, state)
        q, k = self.rotate(q, start), self.rotate(k, start)
        if state is None:
            out = self.attend_segments(q, k, v)
        else:
            held = state.held
            k, v = state.extend(k, v)
            if q.shape[2] == 1:
                out = self.attend_last(q, k, v)
            else:
                # Queries of the tokens held are not needed again; zeros keep their places.
                out = self.attend_segments(F.pad(q, (0, 0, held, 0)), k, v)[:, :, held:]
        return self.o_proj(self.merge_heads(out))
