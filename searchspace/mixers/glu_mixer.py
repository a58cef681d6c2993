"""A gated linear unit in the place of attention.

Shapes: B batch, T tokens, D d_model, C inner channels.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from searchspace.convolution import causal_conv, depthwise_conv, reset_conv
from searchspace.linear import Linear, project
from searchspace.mixers.base import (
    ATTENTION_AXES,
    CONV_AXES,
    Mixer,
    MixerState,
)
from searchspace.specs import MixerSpec


class GluMixer(Mixer):
    """`W_o (gelu(W_g x) * W_v x)`, each token on its own as the paper's formula has it.

    Its option `qkv_dconv` (taps, 0 for none) puts a depthwise convolution over time behind the maps
    to gates and values, as it does in attention, so that tokens see their neighbours. A network
    whose mixers are all of this type without it sees one token at a time.

    Source: Abdelrahman et al. 2024, "Activator: GLU Activations as The Core Functions of a Vision
    Transformer" (the formula, without a convolution); Shazeer 2020, "GLU Variants Improve
    Transformer", equation 5 (GEGLU).
    """

    heads: ClassVar = "equal"
    fixed_state: ClassVar = True
    options: ClassVar[dict[str, Any]] = {"qkv_dconv": 0}
    option_choices: ClassVar[dict[str, tuple[Any, ...]]] = {"qkv_dconv": (0, 2, 3, 4)}
    axes: ClassVar = {
        "v_proj.weight": ("num_heads*head_dim", "d_model"),
        "o_proj.weight": ATTENTION_AXES["o_proj.weight"],
        "glu_gate.weight": ("num_heads*head_dim", "d_model"),
    }

    def __init__(self, spec: MixerSpec) -> None:
        super().__init__(spec)
        width = spec.num_heads * spec.head_dim
        self.v_proj = Linear(spec.d_model, width, spec.precision)
        self.o_proj = Linear(width, spec.d_model, spec.precision)
        self.glu_gate = Linear(spec.d_model, width, spec.precision)
        self.num_taps = int(self.option("qkv_dconv"))
        if self.num_taps:
            self.v_conv = nn.Parameter(torch.empty(width, self.num_taps))
            self.glu_conv = nn.Parameter(torch.empty(width, self.num_taps))

    @classmethod
    def param_axes(cls, spec: MixerSpec) -> dict[str, tuple[str, ...]]:
        """Return the axes, those of the convolutions only where they are there."""
        if not cls.option_of(spec, "qkv_dconv"):
            return cls.axes
        return {**cls.axes, "v_conv": CONV_AXES["v_conv"], "glu_conv": CONV_AXES["q_conv"]}

    def input_linears(self) -> list[Linear]:
        """Return the maps to values and gates."""
        return [self.v_proj, self.glu_gate]

    def output_linear(self) -> Linear | None:
        """Return the output projection."""
        return self.o_proj

    def reset(self, generator: torch.Generator, depth: int) -> None:
        """Initialise; convolutions start near the identity."""
        super().reset(generator, depth)
        if self.num_taps:
            for weight_CW in (self.v_conv, self.glu_conv):
                reset_conv(weight_CW, generator)

    def init_state(
        self, batch: int, max_tokens: int, device: torch.device | None = None
    ) -> MixerState:
        """Return the zero state: the last inputs of the convolutions, nothing without them."""
        if not self.num_taps:
            return MixerState()
        width = 2 * self.spec.num_heads * self.spec.head_dim
        return MixerState(conv_BTC=torch.zeros(batch, self.num_taps - 1, width, device=device))

    def forward(self, x_BTD: Tensor, state: MixerState | None = None) -> Tensor:
        """Gate the values."""
        v_BTC, gate_BTC = project(x_BTD, self.v_proj, self.glu_gate)
        if self.num_taps:
            both_BTC = self._convolve(torch.cat([v_BTC, gate_BTC], dim=-1), state)
            v_BTC, gate_BTC = both_BTC.chunk(2, dim=-1)
        if state is not None:
            state.length += x_BTD.shape[1]
        return self.o_proj(F.gelu(gate_BTC) * v_BTC)

    def _convolve(self, x_BTC: Tensor, state: MixerState | None) -> Tensor:
        weight_CW = torch.cat([self.v_conv, self.glu_conv])
        if not self.causal:
            return depthwise_conv(x_BTC, weight_CW)
        before = None if state is None else state.conv_BTC
        out_BTC, after = causal_conv(x_BTC, weight_CW, before)
        if state is not None:
            state.conv_BTC = after
        return out_BTC
