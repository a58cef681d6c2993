"""Mamba: a state space per channel whose step size, input and readout depend on the token.

Shapes: B batch, T tokens, D d_model, C = H * K channels, S numbers of state per channel, W taps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nas_kernels.precision import at_least_fp32
from nas_kernels.selective_scan import selective_scan
from searchspace.convolution import causal_conv, reset_conv
from searchspace.linear import Linear, project
from searchspace.mixers.base import MixerState
from searchspace.mixers.scan import ValueMixer, both_ways
from searchspace.specs import MixerSpec

STEP_RANK = 16
NUM_TAPS = 4
MIN_STEP, MAX_STEP = 1e-3, 1e-1


@dataclass(kw_only=True)
class MambaState(MixerState):
    """The state space of every channel, and the convolution's last inputs (`conv_BTC`).

    Args:
        hidden_BCS: `d_state` numbers per channel.
    """

    hidden_BCS: Tensor


class Mamba(ValueMixer):
    """`h_t = exp(d_t A) h_{t-1} + d_t B_t x_t`, `y_t = C_t h_t + D x_t`, gated by `silu(W_z x)`.

    `x` is `v_proj` of the input after a convolution of 4 taps and `silu`; the step `d_t`, `B_t` and
    `C_t` are maps of x. The inner width is that of all heads. The bidirectional form is the mean of
    the forward and the backward pass, convolution included.

    Source: Gu and Dao 2023, "Mamba", algorithm 2, sections 3.4 and 3.6, appendix E.2 (initial
    values); Wang et al. 2024, "The Mamba in the Llama", section 2, for sharing `v_proj` and
    `o_proj` with attention.
    """

    options: ClassVar[dict[str, Any]] = {"d_state": 16}
    axes: ClassVar[dict[str, tuple[str, ...]]] = {
        **ValueMixer.axes,
        "mamba_gate.weight": ("num_heads*head_dim", "d_model"),
        "mamba_conv": ("num_heads*head_dim", "mamba_taps"),
        "mamba_conv_bias": ("num_heads*head_dim",),
        "mamba_step_down.weight": ("mamba_step_rank", "num_heads*head_dim"),
        "mamba_step_up.weight": ("num_heads*head_dim", "mamba_step_rank"),
        "mamba_step_bias": ("num_heads*head_dim",),
        "mamba_write.weight": ("d_state", "num_heads*head_dim"),
        "mamba_read.weight": ("d_state", "num_heads*head_dim"),
        "mamba_log_a": ("num_heads*head_dim", "d_state"),
        "mamba_skip": ("num_heads*head_dim",),
    }

    def __init__(self, spec: MixerSpec) -> None:
        super().__init__(spec)
        width, self.d_state = self.width, int(self.option("d_state"))
        self.mamba_gate = Linear(spec.d_model, width, spec.precision)
        self.mamba_conv = nn.Parameter(torch.empty(width, NUM_TAPS))
        self.mamba_conv_bias = nn.Parameter(torch.empty(width))
        self.mamba_step_down = Linear(width, STEP_RANK, spec.precision)
        # 16 inputs: other precisions would save nothing, and the step must stay precise.
        self.mamba_step_up = Linear(STEP_RANK, width, "fp32")
        self.mamba_step_bias = nn.Parameter(torch.empty(width))
        self.mamba_write = Linear(width, self.d_state, spec.precision)
        self.mamba_read = Linear(width, self.d_state, spec.precision)
        self.mamba_log_a = nn.Parameter(torch.empty(width, self.d_state))
        self.mamba_skip = nn.Parameter(torch.empty(width))

    @torch.no_grad()
    def reset(self, generator: torch.Generator, depth: int) -> None:
        """Initialise: A is S4D-Real's -1, -2, ...; steps are log-uniform from 0.001 to 0.1."""
        super().reset(generator, depth)
        self.mamba_step_up.reset(generator, gain=1 / math.sqrt(3))
        reset_conv(self.mamba_conv, generator)
        self.mamba_conv_bias.zero_()
        bias_C = self.mamba_step_bias.uniform_(generator=generator)
        step_C = (bias_C * math.log(MAX_STEP / MIN_STEP) + math.log(MIN_STEP)).exp()
        # The inverse of softplus.
        bias_C.copy_(step_C + torch.log(-torch.expm1(-step_C)))
        numbers_S = torch.arange(1, self.d_state + 1, device=bias_C.device, dtype=bias_C.dtype)
        self.mamba_log_a.copy_(numbers_S.log().expand_as(self.mamba_log_a))
        self.mamba_skip.fill_(1.0)

    def input_linears(self) -> list[Linear]:
        """Return the maps of the input."""
        return [self.v_proj, self.mamba_gate]

    def init_state(
        self, batch: int, max_tokens: int, device: torch.device | None = None
    ) -> MambaState:
        """Return the zero state; its size does not depend on `max_tokens`."""
        return MambaState(
            hidden_BCS=torch.zeros(batch, self.width, self.d_state, device=device),
            conv_BTC=torch.zeros(batch, NUM_TAPS - 1, self.width, device=device),
        )

    def forward(self, x_BTD: Tensor, state: MambaState | None = None) -> Tensor:
        """Mix every token up to and including the own one; bidirectional: both directions."""
        x_BTC, gate = project(x_BTD, *self.input_linears())
        if self.causal:
            out_BTC = self._mix(x_BTC, state)
        else:
            forward, backward = self._mix(both_ways(x_BTC), None).chunk(2)
            out_BTC = (forward + backward.flip(1)) / 2
        return self.o_proj(out_BTC * F.silu(gate))

    def _mix(self, x_BTC: Tensor, state: MambaState | None) -> Tensor:
        before = None if state is None else state.conv_BTC
        x, after = causal_conv(x_BTC, self.mamba_conv, before)
        x = F.silu(x + self.mamba_conv_bias)
        low, write, read = project(x, self.mamba_step_down, self.mamba_write, self.mamba_read)
        step = F.softplus(at_least_fp32(self.mamba_step_up(low)) + self.mamba_step_bias)
        hidden = None if state is None else state.hidden_BCS
        out, last = selective_scan(x, step, -self.mamba_log_a.exp(), write, read, hidden)
        if state is not None:
            state.hidden_BCS, state.conv_BTC = last, at_least_fp32(after)
            state.length += x.shape[1]
        return torch.addcmul(out, x, self.mamba_skip)
