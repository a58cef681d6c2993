"""RWKV time mixing: a mean over earlier values whose weights decay per channel.

Shapes: B batch, T tokens, D d_model, C = H * K channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from nas_kernels.precision import at_least_fp32
from nas_kernels.wkv import bidirectional_wkv, wkv
from searchspace.linear import Linear
from searchspace.mixers.base import ATTENTION_AXES, MixerState
from searchspace.mixers.scan import ValueMixer
from searchspace.specs import MixerSpec
from searchspace.token_shift import neighbour_tokens, previous_token


@dataclass(kw_only=True)
class RWKVState(MixerState):
    """The last input, and the sums behind the mean.

    Args:
        token_BD: the last input.
        num_BC: weighted sum of the values, times e^-peak.
        den_BC: sum of the weights, times e^-peak.
        peak_BC: largest logarithm of a weight.
    """

    token_BD: Tensor
    num_BC: Tensor
    den_BC: Tensor
    peak_BC: Tensor


class RWKVTimeMix(ValueMixer):
    """`W_o (sigmoid(r) * wkv(k, v))`, see `nas_kernels.wkv`.

    r, k and v are maps of the input mixed channel by channel with the token before. The
    bidirectional form mixes even channels with the token before and odd ones with the token after,
    and weighs the tokens on both sides in one mean.

    Source: Peng et al. 2023, "RWKV", equations 11-17; Duan et al. 2024, "Vision-RWKV", equations
    2-4 (bidirectional).
    """

    axes: ClassVar[dict[str, tuple[str, ...]]] = {
        **ValueMixer.axes,
        "k_proj.weight": ATTENTION_AXES["k_proj.weight"],
        "rwkv_receptance.weight": ("num_heads*head_dim", "d_model"),
        "rwkv_mix_k": ("d_model",),
        "rwkv_mix_v": ("d_model",),
        "rwkv_mix_r": ("d_model",),
        "rwkv_log_decay": ("num_heads*head_dim",),
        "rwkv_bonus": ("num_heads*head_dim",),
    }

    def __init__(self, spec: MixerSpec) -> None:
        super().__init__(spec)
        self.k_proj = Linear(spec.d_model, self.width, spec.precision)
        self.rwkv_receptance = Linear(spec.d_model, self.width, spec.precision)
        self.rwkv_mix_k = nn.Parameter(torch.empty(spec.d_model))
        self.rwkv_mix_v = nn.Parameter(torch.empty(spec.d_model))
        self.rwkv_mix_r = nn.Parameter(torch.empty(spec.d_model))
        self.rwkv_log_decay = nn.Parameter(torch.empty(self.width))
        self.rwkv_bonus = nn.Parameter(torch.empty(self.width))

    @torch.no_grad()
    def reset(self, generator: torch.Generator, depth: int) -> None:
        """Initialise with the paper's ranges (appendix E), drawn for each channel.

        The paper lets values rise from the first channel to the last; a smaller network, which has
        the first channels only, would then have one end of the range only.
        """
        super().reset(generator, depth)
        for mix_D in (self.rwkv_mix_k, self.rwkv_mix_v, self.rwkv_mix_r):
            mix_D.uniform_(generator=generator)
        self.rwkv_log_decay.uniform_(generator=generator).mul_(8.0).sub_(5.0)
        self.rwkv_bonus.uniform_(-0.5, 0.5, generator=generator).add_(math.log(0.3))

    def init_state(
        self, batch: int, max_tokens: int, device: torch.device | None = None
    ) -> RWKVState:
        """Return the state before the first token; its size does not depend on `max_tokens`."""
        zeros = torch.zeros(batch, self.width, device=device)
        return RWKVState(
            token_BD=torch.zeros(batch, self.spec.d_model, device=device),
            num_BC=zeros,
            den_BC=torch.zeros_like(zeros),
            peak_BC=torch.full_like(zeros, -torch.inf),
        )

    def forward(self, x_BTD: Tensor, state: RWKVState | None = None) -> Tensor:
        """Mix every token up to and including the own one; bidirectional: tokens on both sides."""
        if self.causal:
            beside = previous_token(x_BTD, None if state is None else state.token_BD)
        else:
            beside = neighbour_tokens(x_BTD)
        change = x_BTD - beside
        k = self.k_proj(torch.addcmul(beside, change, self.rwkv_mix_k))
        v = self.v_proj(torch.addcmul(beside, change, self.rwkv_mix_v))
        gate = self.rwkv_receptance(torch.addcmul(beside, change, self.rwkv_mix_r)).sigmoid()
        decay = self.rwkv_log_decay.exp()
        if not self.causal:
            return self.o_proj(gate * bidirectional_wkv(k, v, decay, self.rwkv_bonus))
        before = None if state is None else (state.num_BC, state.den_BC, state.peak_BC)
        out, after = wkv(k, v, decay, self.rwkv_bonus, before)
        if state is not None:
            state.num_BC, state.den_BC, state.peak_BC = after
            state.token_BD = at_least_fp32(x_BTD[:, -1]).clone()
            state.length += x_BTD.shape[1]
        return self.o_proj(gate * out)
