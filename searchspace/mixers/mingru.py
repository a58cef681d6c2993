"""Minimal GRU and LSTM: gates that look at the input only, so that time can be parallel.

Shapes: B batch, T tokens, D d_model, C = H * K channels.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nas_kernels.precision import at_least_fp32
from searchspace.linear import Linear, project
from searchspace.mixers.scan import ScanMixer, ScanState, reset_memory
from searchspace.specs import MixerSpec


class MinGRU(ScanMixer):
    """`h_t = (1 - z_t) h_{t-1} + z_t g(W_h x_t)` with `z_t = sigmoid(W_z x_t + b)`.

    The paper scans logarithms, which needs positive candidates, hence g. Here the same recurrence
    is scanned as it is: products of numbers in (0, 1) are just as stable. It starts from zero.

    Source: Feng et al. 2024, "Were RNNs All We Needed?", section 3.1 and appendix B.
    """

    axes: ClassVar[dict[str, tuple[str, ...]]] = {
        **ScanMixer.axes,
        "mingru_gate.weight": ("num_heads*head_dim", "d_model"),
        "mingru_bias": ("num_heads*head_dim",),
    }

    def __init__(self, spec: MixerSpec) -> None:
        super().__init__(spec)
        self.mingru_gate = Linear(spec.d_model, self.width, spec.precision)
        self.mingru_bias = nn.Parameter(torch.empty(self.width))

    def reset(self, generator: torch.Generator, depth: int) -> None:
        """Initialise every parameter."""
        super().reset(generator, depth)
        reset_memory(self.mingru_bias, generator, sign=-1.0)

    def input_linears(self) -> list[Linear]:
        """Return every map of the input."""
        return [self.v_proj, self.mingru_gate]

    def forward(self, x_BTD: Tensor, state: ScanState | None = None) -> Tensor:
        """Mix every token up to and including the own one; bidirectional: both directions."""
        candidate, gate = project(x_BTD, *self.input_linears())
        gate = at_least_fp32(gate) + self.mingru_bias
        added = gate.sigmoid() * positive(at_least_fp32(candidate))
        return self.o_proj(self.scan((-gate).sigmoid(), added, state))


class MinLSTM(ScanMixer):
    """`h_t = f' h_{t-1} + i' g(W_h x_t)` with `f' = f / (f + i)`, `i' = i / (f + i)`.

    `f = sigmoid(W_f x_t + b_f)` and `i = sigmoid(W_i x_t + b_i)`; see `MinGRU`.

    Source: Feng et al. 2024, "Were RNNs All We Needed?", section 3.2 and appendix B.
    """

    axes: ClassVar[dict[str, tuple[str, ...]]] = {
        **ScanMixer.axes,
        "minlstm_forget.weight": ("num_heads*head_dim", "d_model"),
        "minlstm_input.weight": ("num_heads*head_dim", "d_model"),
        "minlstm_forget_bias": ("num_heads*head_dim",),
        "minlstm_input_bias": ("num_heads*head_dim",),
    }

    def __init__(self, spec: MixerSpec) -> None:
        super().__init__(spec)
        self.minlstm_forget = Linear(spec.d_model, self.width, spec.precision)
        self.minlstm_input = Linear(spec.d_model, self.width, spec.precision)
        self.minlstm_forget_bias = nn.Parameter(torch.empty(self.width))
        self.minlstm_input_bias = nn.Parameter(torch.empty(self.width))

    def reset(self, generator: torch.Generator, depth: int) -> None:
        """Initialise every parameter; the input gate opens as far as the forget gate closes."""
        super().reset(generator, depth)
        reset_memory(self.minlstm_forget_bias, generator)
        with torch.no_grad():
            self.minlstm_input_bias.copy_(-self.minlstm_forget_bias)

    def input_linears(self) -> list[Linear]:
        """Return every map of the input."""
        return [self.v_proj, self.minlstm_forget, self.minlstm_input]

    def forward(self, x_BTD: Tensor, state: ScanState | None = None) -> Tensor:
        """Mix every token up to and including the own one; bidirectional: both directions."""
        candidate, forget, enter = project(x_BTD, *self.input_linears())
        forget = F.logsigmoid(at_least_fp32(forget) + self.minlstm_forget_bias)
        enter = F.logsigmoid(at_least_fp32(enter) + self.minlstm_input_bias)
        # f / (f + i) = sigmoid(log f - log i): no quotient of two tiny numbers.
        balance = forget - enter
        added = (-balance).sigmoid() * positive(at_least_fp32(candidate))
        return self.o_proj(self.scan(balance.sigmoid(), added, state))


def positive(x: Tensor) -> Tensor:
    """Return `x + 0.5` from 0 on and `sigmoid(x)` below: continuous, positive, unbounded.

    Source: Feng et al. 2024, "Were RNNs All We Needed?", appendix B.2.1 (g).
    """
    return torch.where(x >= 0, x + 0.5, x.sigmoid())
