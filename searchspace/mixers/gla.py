"""Gated linear attention.

Shapes: B batch, T tokens, D d_model, H query heads, G key/value heads, K head width.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from searchspace.linear import Linear, project
from searchspace.mixers.base import ATTENTION_AXES
from searchspace.mixers.recurrent import RecurrentMixer, RecurrentState
from searchspace.specs import MixerSpec

GATE_RANK = 16
GATE_TEMPERATURE = 16.0


class GatedLinearAttention(RecurrentMixer):
    """Linear attention whose state decays by a data-dependent gate per key feature.

    `S_t = diag(a_t) S_{t-1} + k_t v_t^T` with `a_t = sigmoid(W2 W1 x_t + b)^(1/16)`; the output is
    normalised per head and gated by `silu(W_g x)`. The bidirectional form normalises the mean of
    the forward and the backward recurrence.

    Source: Yang et al. 2023, "Gated Linear Attention Transformers with Hardware-Efficient
    Training", equations 3-4 and section 4.4.
    """

    ordered: ClassVar[bool] = True
    axes: ClassVar[dict[str, tuple[str, ...]]] = {
        **ATTENTION_AXES,
        "decay_down.weight": ("decay_rank", "d_model"),
        "decay_up.weight": ("num_kv_heads*head_dim", "decay_rank"),
        "decay_bias": ("num_kv_heads*head_dim",),
        "out_gate.weight": ("num_heads*head_dim", "d_model"),
        "head_norm": ("head_dim",),
    }

    def __init__(self, spec: MixerSpec) -> None:
        super().__init__(spec)
        kv_width = spec.num_kv_heads * spec.head_dim
        self.decay_down = Linear(spec.d_model, GATE_RANK, spec.precision)
        # 16 inputs: int8 would save nothing, and the decay is the part that must stay precise.
        self.decay_up = Linear(GATE_RANK, kv_width, "fp32")
        self.decay_bias = nn.Parameter(torch.zeros(kv_width))
        self.out_gate = Linear(spec.d_model, spec.num_heads * spec.head_dim, spec.precision)
        self.head_norm = nn.Parameter(torch.ones(spec.head_dim))

    def reset(self, generator: torch.Generator, depth: int) -> None:
        """Initialise; the bias spreads the time constants from about 20 to 2000 tokens."""
        super().reset(generator, depth)
        with torch.no_grad():
            self.decay_bias.uniform_(-0.1, 4.8, generator=generator)
            self.head_norm.fill_(1.0)

    def input_linears(self) -> list[Linear]:
        """Return every map of the input."""
        return [self.q_proj, self.k_proj, self.v_proj, self.decay_down, self.out_gate]

    def forward(self, x_BTD: Tensor, state: RecurrentState | None = None) -> Tensor:
        """Mix every token up to and including the own one; bidirectional: both directions."""
        q, k, v, low, gate = project(x_BTD, *self.input_linears())
        q, k, v = self.convolve_qkv(q, k, v, state)
        log_decay = F.logsigmoid(self.decay_up(low) + self.decay_bias) / GATE_TEMPERATURE
        out = self.run(
            self.split_heads(q) * self.spec.head_dim**-0.5,
            self.split_heads(k),
            self.split_heads(v),
            self.split_heads(log_decay),
            state,
        )
        out = F.rms_norm(out.to(self.head_norm.dtype), self.head_norm.shape, self.head_norm, 1e-5)
        return self.o_proj(self.merge_heads(out) * F.silu(gate))
