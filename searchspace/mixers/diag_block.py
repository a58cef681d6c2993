"""Softmax attention within blocks that do not overlap.

Shapes: B batch, T tokens, D d_model, H query heads, G key/value heads, K head width, N blocks,
W tokens of a block.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from nas_kernels.block_attention import Pattern, block_attention
from nas_kernels.dispatch import TRITON
from searchspace.mixers.attention import causal_mask, runs_by_tiles, sdpa
from searchspace.mixers.segments import SegmentMixer


class BlockAttention(SegmentMixer):
    """Softmax attention in which a token sees its own block of `block` tokens only.

    Source: Qin et al. 2022, "The Devil in Linear Transformer", section 4.2 (DiagAttention).
    """

    options: ClassVar[dict[str, Any]] = {"block": 64}

    @property
    def segment_tokens(self) -> int:
        """Tokens of a block."""
        return int(self.option("block"))

    def attend_segments(self, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor) -> Tensor:
        """Attend within full blocks, then within what is left over."""
        block, tokens = self.segment_tokens, q_BHTK.shape[2]
        if isinstance(tokens, torch.SymInt):
            return self._attend_padded(q_BHTK, k_BGTK, v_BGTK)
        if self.position != "alibi" and runs_by_tiles(q_BHTK, k_BGTK, v_BGTK):
            pattern = Pattern(self.causal, segment=block)
            return block_attention(q_BHTK, k_BGTK, v_BGTK, pattern, implementation=TRITON)[0]
        num_full = tokens // block
        full = num_full * block
        parts = []
        if num_full:
            q, k, v = (_blocks(x[:, :, :full], block) for x in (q_BHTK, k_BGTK, v_BGTK))
            out = self._attend_block(q, k, v).unflatten(0, (-1, num_full))
            parts.append(out.transpose(1, 2).flatten(2, 3))
        if full < tokens:
            q, k, v = (x[:, :, full:] for x in (q_BHTK, k_BGTK, v_BGTK))
            parts.append(self._attend_block(q, k, v))
        return torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]

    def _attend_block(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tokens = q.shape[2]
        if self.position != "alibi":
            return sdpa(q, k, v, None, is_causal=self.causal and tokens > 1)
        mask = causal_mask(0, tokens, tokens, q.device) if self.causal else None
        return sdpa(q, k, v, self.with_alibi(mask, q, tokens, 0))

    def _attend_padded(self, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor) -> Tensor:
        """Attend within full blocks, the last one padded: for a graph for any number of tokens."""
        block, (batch, _, tokens, _) = self.segment_tokens, q_BHTK.shape
        num_blocks, device = -(-tokens // block), q_BHTK.device
        padding = (0, 0, 0, num_blocks * block - tokens)
        q, k, v = (_blocks(F.pad(x, padding), block) for x in (q_BHTK, k_BGTK, v_BGTK))
        if self.causal:
            out = self._attend_block(q, k, v)
        else:
            there_NW = (torch.arange(num_blocks * block, device=device) < tokens).unflatten(
                0, (num_blocks, block)
            )
            mask = there_NW[:, None, None].expand(-1, -1, block, -1)
            mask = self.with_alibi(mask, q, block, 0)
            out = sdpa(q, k, v, mask.repeat(batch, 1, 1, 1))
        out = out.unflatten(0, (batch, num_blocks)).transpose(1, 2).flatten(2, 3)
        return out[:, :, :tokens]

    def attend_last(self, q_BH1K: Tensor, k_BGSK: Tensor, v_BGSK: Tensor) -> Tensor:
        """Attend to the block so far."""
        num_keys = k_BGSK.shape[2]
        return sdpa(q_BH1K, k_BGSK, v_BGSK, self.with_alibi(None, q_BH1K, num_keys, num_keys - 1))


def _blocks(x_BHTK: Tensor, block: int) -> Tensor:
    """Bring (B, H, N * W, K) to (B * N, H, W, K)."""
    return x_BHTK.unflatten(2, (-1, block)).transpose(1, 2).flatten(0, 1)
