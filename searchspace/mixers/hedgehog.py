"""Linear attention with a learned feature map that imitates softmax.

Shapes: B batch, T tokens, D d_model, H query heads, G key/value heads, K head width.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from searchspace.mixers.base import ATTENTION_AXES
from searchspace.mixers.recurrent import QuotientMixer, QuotientState
from searchspace.specs import MixerSpec


class HedgehogAttention(QuotientMixer):
    """Linear attention with `phi(x) = [softmax(W x), softmax(-W x)]`, softmax over features.

    Every head has its own maps W for queries and keys. The softmax over the features of each half
    is the stabilised form of `[exp(W x), exp(-W x)]`: no feature can overflow.

    Source: Zhang et al. 2024, "The Hedgehog & the Porcupine: Expressive Linear Attentions with
    Softmax Mimicry", section 4.
    """

    axes: ClassVar[dict[str, tuple[str, ...]]] = {
        **ATTENTION_AXES,
        "hedgehog_q": ("num_heads", "head_dim", "head_dim"),
        "hedgehog_k": ("num_kv_heads", "head_dim", "head_dim"),
    }

    def __init__(self, spec: MixerSpec) -> None:
        super().__init__(spec)
        width = spec.head_dim
        self.hedgehog_q = nn.Parameter(torch.empty(spec.num_heads, width, width))
        self.hedgehog_k = nn.Parameter(torch.empty(spec.num_kv_heads, width, width))

    @property
    def key_width(self) -> int:
        """A feature and its negative for every feature of the head."""
        return 2 * self.spec.head_dim

    def reset(self, generator: torch.Generator, depth: int) -> None:
        """Initialise; the feature maps start near the identity, as in the paper."""
        super().reset(generator, depth)
        width = self.spec.head_dim
        with torch.no_grad():
            for map_HKK in (self.hedgehog_q, self.hedgehog_k):
                map_HKK.normal_(0.0, 0.1 / width**0.5, generator=generator)
                map_HKK.diagonal(dim1=1, dim2=2).add_(1.0)

    def forward(self, x_BTD: Tensor, state: QuotientState | None = None) -> Tensor:
        """Attend to every token up to and including the own one; bidirectional: to every token."""
        q, k, v = self.project_qkv(x_BTD, state)
        q, k = hedgehog_features(q, self.hedgehog_q), hedgehog_features(k, self.hedgehog_k)
        return self.o_proj(self.merge_heads(self.quotient(q, k, v, state)))


def hedgehog_features(x_BHTK: Tensor, map_HKK: Tensor) -> Tensor:
    """Return the 2 K features of every token; every half sums up to one."""
    x_BHTK = x_BHTK @ map_HKK
    return torch.cat([x_BHTK.softmax(dim=-1), (-x_BHTK).softmax(dim=-1)], dim=-1)
