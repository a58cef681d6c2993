"""Linear attention mixers: a matrix-valued state instead of a growing cache.

Shapes: B batch, T tokens, D d_model, H query heads, G key/value heads, K head width, V value width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nas_kernels.linear_attention import linear_attention
from searchspace.mixers.base import ProjectedMixer


@dataclass
class RecurrentState:
    """The running sum of (decayed) key-value products of each key/value head."""

    sum_BGKV: Tensor
    length: int = 0

    def tensors(self) -> dict[str, Tensor]:
        """Return the state tensor."""
        return {"sum": self.sum_BGKV}


class RecurrentMixer(ProjectedMixer):
    """Base of the mixers whose state is a sum over tokens of `k v^T`."""

    @property
    def value_width(self) -> int:
        """Columns of the state; the head width unless a subclass carries more."""
        return self.spec.head_dim

    def init_state(
        self, batch: int, max_tokens: int, device: torch.device | None = None
    ) -> RecurrentState:
        """Return the zero state; its size does not depend on `max_tokens`."""
        shape = (batch, self.spec.num_kv_heads, self.spec.head_dim, self.value_width)
        return RecurrentState(torch.zeros(shape, device=device))

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, state: RecurrentState | None
    ) -> Tensor:
        """Run the recurrence from `state` (updated in place) and return (B, H, T, V)."""
        before = state.sum_BGKV if state is not None and state.length else None
        out_BHTV, after = linear_attention(q, k, v, decay, before)
        if state is not None:
            state.sum_BGKV = after
            state.length += q.shape[2]
        return out_BHTV
