"""Softmax attention to a fixed number of learned mixtures of tokens.

Shapes: B batch, T tokens, D d_model, H query heads, G key/value heads, K head width, R rank,
M most tokens.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from searchspace.errors import UserError
from searchspace.mixers.attention import grouped_scores, sdpa
from searchspace.mixers.base import ATTENTION_AXES, ProjectedMixer, SharedKV
from searchspace.specs import MixerSpec


class LinformerAttention(ProjectedMixer):
    """`softmax(Q (E K)^T / sqrt(K)) F V` with learned E and F of `rank` rows, linear in T.

    All heads share E and F (the paper's headwise sharing); a sequence shorter than `max_tokens`
    uses their leading columns. They mix all positions, so there is no causal form, and they tell
    positions apart, so there is no other position encoding.

    Source: Wang et al. 2020, "Linformer: Self-Attention with Linear Complexity", equation 7 and
    section 4.
    """

    directions: ClassVar[tuple[str, ...]] = ("bidirectional",)
    ordered: ClassVar[bool] = True
    bounded: ClassVar[bool] = True
    options: ClassVar[dict[str, Any]] = {"rank": 32}
    axes: ClassVar[dict[str, tuple[str, ...]]] = {
        **ATTENTION_AXES,
        "linformer_k": ("rank", "max_tokens"),
        "linformer_v": ("rank", "max_tokens"),
    }

    def __init__(self, spec: MixerSpec) -> None:
        super().__init__(spec)
        shape = (int(self.option("rank")), spec.max_tokens)
        self.linformer_k = nn.Parameter(torch.empty(shape))
        self.linformer_v = nn.Parameter(torch.empty(shape))

    def reset(self, generator: torch.Generator, depth: int) -> None:
        """Initialise; mixtures of as many tokens as can come keep their variance."""
        super().reset(generator, depth)
        std = 1.0 / math.sqrt(max(self.spec.max_tokens, 1))
        with torch.no_grad():
            for mixture_RM in (self.linformer_k, self.linformer_v):
                mixture_RM.normal_(0.0, std, generator=generator)

    def forward(self, x_BTD: Tensor, state: Any = None) -> Tensor:
        """Attend to the mixtures.

        Raises:
            UserError: when more tokens come than E and F have columns.
        """
        tokens = x_BTD.shape[1]
        if tokens > self.spec.max_tokens:
            raise UserError(
                f"linformer was made for max_tokens={self.spec.max_tokens}, {tokens} were given; "
                "give shorter sequences or a family with a larger max_tokens"
            )
        q, k, v = self.project_qkv(x_BTD)
        k, v = self.linformer_k[:, :tokens] @ k, self.linformer_v[:, :tokens] @ v
        return self.o_proj(self.merge_heads(sdpa(q, k, v, None)))

    def attention_probs(self, x_BTD: Tensor, shared: SharedKV | None = None) -> Tensor | None:
        """Return the weights (B, H, T, R) of the mixtures of tokens."""
        q, k, _ = self.project_qkv(x_BTD)
        return grouped_scores(q, self.linformer_k[:, : x_BTD.shape[1]] @ k).softmax(dim=-1)
