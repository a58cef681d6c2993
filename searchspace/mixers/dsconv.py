"""A gated depthwise separable convolution over time.

Shapes: B batch, T tokens, D d_model, C inner channels, W taps.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from searchspace.convolution import causal_conv, depthwise_conv, reset_conv
from searchspace.linear import Linear, project
from searchspace.mixers.base import ATTENTION_AXES, Mixer, MixerState
from searchspace.specs import MixerSpec


class SeparableConv(Mixer):
    """`W_o conv(W_v x * sigmoid(W_g x))` with a filter of few taps for every channel.

    Source: Wu et al. 2019, "Pay Less Attention with Lightweight and Dynamic Convolutions", section
    2 (depthwise convolution) and figure 2b (linear map, GLU, convolution, linear map). Taps are
    stored by distance (see `_windows`).
    """

    heads: ClassVar = "equal"
    ordered: ClassVar = True
    fixed_state: ClassVar = True
    options: ClassVar[dict[str, Any]] = {"taps": 7}
    option_choices: ClassVar[dict[str, tuple[Any, ...]]] = {"taps": (3, 5, 7, 15, 31)}
    axes: ClassVar = {
        "v_proj.weight": ("num_heads*head_dim", "d_model"),
        "o_proj.weight": ATTENTION_AXES["o_proj.weight"],
        "dsconv_gate.weight": ("num_heads*head_dim", "d_model"),
        "dsconv_taps": ("num_heads*head_dim", "taps"),
    }

    def __init__(self, spec: MixerSpec) -> None:
        super().__init__(spec)
        width = spec.num_heads * spec.head_dim
        self.v_proj = Linear(spec.d_model, width, spec.precision)
        self.o_proj = Linear(width, spec.d_model, spec.precision)
        self.dsconv_gate = Linear(spec.d_model, width, spec.precision)
        self.dsconv_taps = nn.Parameter(torch.empty(width, int(self.option("taps"))))

    def input_linears(self) -> list[Linear]:
        """Return the maps to values and gates."""
        return [self.v_proj, self.dsconv_gate]

    def output_linear(self) -> Linear | None:
        """Return the pointwise map behind the convolution."""
        return self.o_proj

    def reset(self, generator: torch.Generator, depth: int) -> None:
        """Initialise; the convolution starts near the identity."""
        super().reset(generator, depth)
        reset_conv(self.dsconv_taps, generator)

    def init_state(
        self, batch: int, max_tokens: int, device: torch.device | None = None
    ) -> MixerState:
        """Return the zero state: the last inputs of the convolution."""
        width, taps = self.dsconv_taps.shape
        return MixerState(conv_BTC=torch.zeros(batch, taps - 1, width, device=device))

    def forward(self, x_BTD: Tensor, state: MixerState | None = None) -> Tensor:
        """Weigh the tokens of the window."""
        v_BTC, gate_BTC = project(x_BTD, self.v_proj, self.dsconv_gate)
        gated_BTC = v_BTC * torch.sigmoid(gate_BTC)
        if not self.causal:
            return self.o_proj(depthwise_conv(gated_BTC, self.dsconv_taps))
        before = None if state is None else state.conv_BTC
        out_BTC, after = causal_conv(gated_BTC, self.dsconv_taps, before)
        if state is not None:
            state.conv_BTC = after
            state.length += x_BTD.shape[1]
        return self.o_proj(out_BTC)
