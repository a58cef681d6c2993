"""Attention without softmax whose keys and values are normalised.

Shapes: B batch, T tokens, D d_model, H query heads, G key/value heads, K head width.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from searchspace.mixers.base import ATTENTION_AXES
from searchspace.mixers.recurrent import RecurrentMixer, RecurrentState
from searchspace.specs import MixerSpec


class GalerkinAttention(RecurrentMixer):
    """`Q (LN(K)^T LN(V)) / n` with a layer norm per head, n tokens.

    The causal form sums up to the own token and divides by the number of tokens so far.

    Source: Cao 2021, "Choose a Transformer: Fourier or Galerkin", section 3 (Galerkin-type
    attention).
    """

    axes: ClassVar[dict[str, tuple[str, ...]]] = {
        **ATTENTION_AXES,
        "galerkin_k_gain": ("num_kv_heads", "head_dim"),
        "galerkin_k_bias": ("num_kv_heads", "head_dim"),
        "galerkin_v_gain": ("num_kv_heads", "head_dim"),
        "galerkin_v_bias": ("num_kv_heads", "head_dim"),
    }

    def __init__(self, spec: MixerSpec) -> None:
        super().__init__(spec)
        groups, width = spec.num_kv_heads, spec.head_dim
        self.galerkin_k_gain = nn.Parameter(torch.empty(groups, width))
        self.galerkin_k_bias = nn.Parameter(torch.empty(groups, width))
        self.galerkin_v_gain = nn.Parameter(torch.empty(groups, width))
        self.galerkin_v_bias = nn.Parameter(torch.empty(groups, width))

    def reset(self, generator: torch.Generator, depth: int) -> None:
        """Initialise; the norms start without gain and bias."""
        super().reset(generator, depth)
        with torch.no_grad():
            for gain_GK in (self.galerkin_k_gain, self.galerkin_v_gain):
                gain_GK.fill_(1.0)
            for bias_GK in (self.galerkin_k_bias, self.galerkin_v_bias):
                bias_GK.zero_()

    def forward(self, x_BTD: Tensor, state: RecurrentState | None = None) -> Tensor:
        """Mix every token up to and including the own one; bidirectional: every token."""
        q, k, v = self.project_qkv(x_BTD, state)
        k = head_layer_norm(k, self.galerkin_k_gain, self.galerkin_k_bias)
        v = head_layer_norm(v, self.galerkin_v_gain, self.galerkin_v_bias)
        # Divided first, so that a sum over many tokens stays in a moderate range.
        out = self.run(q.to(k.dtype) / self.counts(q, state), k, v, None, state)
        return self.o_proj(self.merge_heads(out))


def head_layer_norm(x_BHTK: Tensor, gain_HK: Tensor, bias_HK: Tensor) -> Tensor:
    """Normalise every head of every token on its own."""
    x_BHTK = F.layer_norm(x_BHTK.to(gain_HK.dtype), x_BHTK.shape[-1:])
    return torch.addcmul(bias_HK[:, None], x_BHTK, gain_HK[:, None])
