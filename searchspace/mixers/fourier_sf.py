"""Attention without softmax whose queries and keys are normalised.

Shapes: B batch, T tokens, D d_model, H query heads, G key/value heads, K head width.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from searchspace.mixers.base import ATTENTION_AXES
from searchspace.mixers.galerkin import head_layer_norm
from searchspace.mixers.recurrent import RecurrentMixer, RecurrentState
from searchspace.specs import MixerSpec


class FourierAttention(RecurrentMixer):
    """`(LN(Q) LN(K)^T) V / n` with a layer norm per head, n tokens.

    Without a softmax the product may be taken from the right, `LN(Q) (LN(K)^T V) / n`, which needs
    no matrix of T x T scores; so it differs from `GalerkinAttention` only in what is normalised:
    queries and keys, so that scores are correlations of standardised features, while values keep
    their size. The causal form sums up to the own token and divides by the tokens so far.

    Source: Cao 2021, "Choose a Transformer: Fourier or Galerkin", section 3 (Fourier-type
    attention).
    """

    axes: ClassVar[dict[str, tuple[str, ...]]] = {
        **ATTENTION_AXES,
        "fourier_q_gain": ("num_heads", "head_dim"),
        "fourier_q_bias": ("num_heads", "head_dim"),
        "fourier_k_gain": ("num_kv_heads", "head_dim"),
        "fourier_k_bias": ("num_kv_heads", "head_dim"),
    }

    def __init__(self, spec: MixerSpec) -> None:
        super().__init__(spec)
        heads, groups, width = spec.num_heads, spec.num_kv_heads, spec.head_dim
        self.fourier_q_gain = nn.Parameter(torch.empty(heads, width))
        self.fourier_q_bias = nn.Parameter(torch.empty(heads, width))
        self.fourier_k_gain = nn.Parameter(torch.empty(groups, width))
        self.fourier_k_bias = nn.Parameter(torch.empty(groups, width))

    def reset(self, generator: torch.Generator, depth: int) -> None:
        """Initialise; the norms start without gain and bias."""
        super().reset(generator, depth)
        with torch.no_grad():
            for gain_HK in (self.fourier_q_gain, self.fourier_k_gain):
                gain_HK.fill_(1.0)
            for bias_HK in (self.fourier_q_bias, self.fourier_k_bias):
                bias_HK.zero_()

    def forward(self, x_BTD: Tensor, state: RecurrentState | None = None) -> Tensor:
        """Mix every token up to and including the own one; bidirectional: every token."""
        q, k, v = self.project_qkv(x_BTD, state)
        q = head_layer_norm(q, self.fourier_q_gain, self.fourier_q_bias)
        k = head_layer_norm(k, self.fourier_k_gain, self.fourier_k_bias)
        # Divided first, so that a sum over many tokens stays in a moderate range.
        out = self.run(q / self.counts(q, state), k, v.to(k.dtype), None, state)
        return self.o_proj(self.merge_heads(out))
