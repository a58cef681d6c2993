"""RWKV channel mixing: an FFN that also sees the token before.

Shapes: B batch, T tokens, D d_model, F hidden units.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nas_kernels.precision import at_least_fp32
from searchspace.ffn.mlp import FFN
from searchspace.linear import Linear
from searchspace.mixers.base import MixerState
from searchspace.specs import FFNSpec
from searchspace.token_shift import previous_token


@dataclass(kw_only=True)
class ChannelMixState(MixerState):
    """The last input.

    Args:
        token_BD: the last input; zeros before the first.
    """

    token_BD: Tensor


class RWKVChannelMix(FFN):
    """`sigmoid(W_r x_r) * W_v relu(W_k x_k)^2`; x_r and x_k are mixed with the token before.

    `up_proj` is W_k and `down_proj` W_v, shared by name with other FFNs. It looks back in encoders
    too: the mixers see to it that later tokens are seen.

    Source: Peng et al. 2023, "RWKV", equations 18-20.
    """

    stateful: ClassVar[bool] = True
    axes: ClassVar[dict[str, tuple[str, ...]]] = {
        **FFN.axes,
        "channelmix_receptance.weight": ("d_model", "d_model"),
        "channelmix_mix_k": ("d_model",),
        "channelmix_mix_r": ("d_model",),
    }

    def __init__(self, spec: FFNSpec) -> None:
        super().__init__(spec)
        self.channelmix_receptance = self.linear(spec.d_model, spec.d_model)
        self.channelmix_mix_k = nn.Parameter(torch.empty(spec.d_model))
        self.channelmix_mix_r = nn.Parameter(torch.empty(spec.d_model))

    def reset(self, generator: torch.Generator, depth: int) -> None:
        """Initialise every parameter; each channel draws its own mix."""
        super().reset(generator, depth)
        # Not the `output_linear`, but what is added to the residual stream all the same.
        self.down_proj.reset(generator, 1.0 / math.sqrt(2 * max(depth, 1)))
        with torch.no_grad():
            self.channelmix_mix_k.uniform_(generator=generator)
            self.channelmix_mix_r.uniform_(generator=generator)

    def input_linears(self) -> list[Linear]:
        """Return nothing: the input is also kept for the next token."""
        return []

    def output_linear(self) -> Linear | None:
        """Return None: the result of `down_proj` is gated."""
        return None

    def init_state(
        self, batch: int, max_tokens: int, device: torch.device | None = None
    ) -> ChannelMixState:
        """Return the state before the first token; its size does not depend on `max_tokens`."""
        return ChannelMixState(token_BD=torch.zeros(batch, self.spec.d_model, device=device))

    def forward(self, x_BTD: Tensor, state: ChannelMixState | None = None) -> Tensor:
        """Map each token together with the one before it; the state is updated in place."""
        before = previous_token(x_BTD, None if state is None else state.token_BD)
        change = x_BTD - before
        hidden = self.up_proj(torch.addcmul(before, change, self.channelmix_mix_k))
        gate = self.channelmix_receptance(torch.addcmul(before, change, self.channelmix_mix_r))
        if state is not None:
            state.token_BD = at_least_fp32(x_BTD[:, -1]).clone()
            state.length += x_BTD.shape[1]
        return gate.sigmoid() * self.down_proj(F.relu(hidden).square())
