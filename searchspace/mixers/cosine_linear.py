"""Linear attention with cosine similarity as the score.

Shapes: B batch, T tokens, D d_model, H query heads, K head width.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from searchspace.mixers.base import ATTENTION_AXES
from searchspace.mixers.recurrent import RecurrentMixer, RecurrentState
from searchspace.specs import MixerSpec


class CosineAttention(RecurrentMixer):
    """`sum of cos(q, k) v / n^sigmoid(m)`, n tokens summed over, m learned per head.

    The causal form divides by the number of tokens so far.

    Source: Mongaras, Dohm and Larson 2024, "Cottention: Linear Transformers With Cosine
    Attention", section 3 (cosine attention and its stabilisation).
    """

    positions: ClassVar[tuple[str, ...]] = ("nope", "rope")
    axes: ClassVar[dict[str, tuple[str, ...]]] = {
        **ATTENTION_AXES,
        "cosine_exponent": ("num_heads",),
    }

    def __init__(self, spec: MixerSpec) -> None:
        super().__init__(spec)
        self.cosine_exponent = nn.Parameter(torch.empty(spec.num_heads))

    def reset(self, generator: torch.Generator, depth: int) -> None:
        """Initialise; the exponents start at sigmoid(0.5), as in the paper."""
        super().reset(generator, depth)
        with torch.no_grad():
            self.cosine_exponent.fill_(0.5)

    def forward(self, x_BTD: Tensor, state: RecurrentState | None = None) -> Tensor:
        """Mix every token up to and including the own one; bidirectional: every token."""
        q, k, v = self.project_qkv(x_BTD, state)
        q, k = F.normalize(q, dim=-1, eps=1e-6), F.normalize(k, dim=-1, eps=1e-6)
        q, k = self.rotate(q, state), self.rotate(k, state)
        count_T1 = self.counts(q, state)
        scale_HT1 = count_T1 ** -torch.sigmoid(self.cosine_exponent)[:, None, None]
        out = self.run(q, k, v, None, state) * scale_HT1
        return self.o_proj(self.merge_heads(out))
