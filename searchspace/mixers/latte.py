"""Attention from queries to latents and from latents to tokens.

Shapes: B batch, T tokens, D d_model, H query heads, G key/value heads, K head width = latents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nas_kernels.linear_attention import full_linear_attention, latent_attention
from searchspace.mixers.base import MixerState, ProjectedMixer


@dataclass(kw_only=True)
class LatteState(MixerState):
    """What the latents have gathered.

    Args:
        mean_BGKV: the mean value of every latent.
        log_sum_BGK: the log-sum-exp of the logits of the tokens so far.
    """

    mean_BGKV: Tensor
    log_sum_BGK: Tensor


class LatteAttention(ProjectedMixer):
    """`sum over latents l of p(l | t) sum over tokens s of p(s | l) v_s`.

    Every head has as many latents as it is wide: its query holds the logits of `p(l | t)`, a
    softmax over the latents; its key those of `p(s | l)`, a softmax over the tokens (in the causal
    form those up to t). So it uses the projections that attention types share, and a head or a
    feature left out is a head or a latent left out.

    Source: Dolga et al. 2024, "Latte: Latent Attention for Linear Time Transformers", section 3
    (bidirectional and causal form, the latter with running maxima).
    """

    fixed_state: ClassVar[bool] = True

    def init_state(
        self, batch: int, max_tokens: int, device: torch.device | None = None
    ) -> LatteState:
        """Return the empty state; its size does not depend on `max_tokens`."""
        groups, width = self.spec.num_kv_heads, self.spec.head_dim
        return LatteState(
            mean_BGKV=torch.zeros(batch, groups, width, width, device=device),
            log_sum_BGK=torch.zeros(batch, groups, width, device=device),
            conv_BTC=self.init_conv(batch, device),
        )

    def forward(self, x_BTD: Tensor, state: LatteState | None = None) -> Tensor:
        """Mix every token up to and including the own one; bidirectional: every token."""
        q, k, v = self.project_qkv(x_BTD, state)
        dtype = torch.promote_types(q.dtype, torch.float32)
        weight, logits = q.softmax(dim=-1, dtype=dtype), k.to(dtype)
        if not self.causal:
            out = full_linear_attention(weight, logits.softmax(dim=2), v.to(dtype))
            return self.o_proj(self.merge_heads(out))
        before = None
        if state is not None and state.length:
            before = (state.mean_BGKV, state.log_sum_BGK)
        out, after = latent_attention(weight, logits, v.to(dtype), before)
        if state is not None:
            state.mean_BGKV, state.log_sum_BGK = after
            state.length += x_BTD.shape[1]
        return self.o_proj(self.merge_heads(out))
