"""Linear attention that normalises its output instead of dividing by a sum.

Shapes: B batch, T tokens, D d_model, H query heads, K head width.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from searchspace.mixers.base import ATTENTION_AXES
from searchspace.mixers.linear_elu import elu_features
from searchspace.mixers.recurrent import RecurrentMixer, RecurrentState
from searchspace.specs import MixerSpec


class NormLinearAttention(RecurrentMixer):
    """`RMSNorm(phi(Q) (phi(K)^T V))` per head with `phi(x) = 1 + elu(x)`.

    Without a denominator gradients are bounded; the norm takes over its role.

    Source: Qin et al. 2022, "The Devil in Linear Transformer" (TransNormer), section 4.1
    (NormAttention).
    """

    positions: ClassVar[tuple[str, ...]] = ("nope", "rope")
    axes: ClassVar[dict[str, tuple[str, ...]]] = {
        **ATTENTION_AXES,
        "norm_linear_gain": ("num_heads", "head_dim"),
    }

    def __init__(self, spec: MixerSpec) -> None:
        super().__init__(spec)
        self.norm_linear_gain = nn.Parameter(torch.empty(spec.num_heads, spec.head_dim))

    def reset(self, generator: torch.Generator, depth: int) -> None:
        """Initialise; the norms start without a gain."""
        super().reset(generator, depth)
        with torch.no_grad():
            self.norm_linear_gain.fill_(1.0)

    def forward(self, x_BTD: Tensor, state: RecurrentState | None = None) -> Tensor:
        """Mix every token up to and including the own one; bidirectional: every token."""
        q, k, v = self.project_qkv(x_BTD, state)
        q, k = self.rotate(elu_features(q), state), self.rotate(elu_features(k), state)
        out = self.run(q, k, v, None, state)
        gain_H1K = self.norm_linear_gain[:, None]
        out = F.rms_norm(out.to(gain_H1K.dtype), out.shape[-1:], eps=1e-5) * gain_H1K
        return self.o_proj(self.merge_heads(out))
