"""Retention: linear attention with a fixed decay per head.

Shapes: B batch, T tokens, D d_model, H query heads, G key/value heads, K head width.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nas_kernels.constants import cached_constant
from searchspace.linear import Linear, project
from searchspace.mixers.base import ATTENTION_AXES
from searchspace.mixers.recurrent import RecurrentMixer, RecurrentState
from searchspace.specs import MixerSpec


@cached_constant
def log_decays(num_kv_heads: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return `log(1 - 2^(-5-g))`, (G, 1, 1): a head's decay does not depend on how many follow."""
    head_G = torch.arange(num_kv_heads, dtype=torch.float64, device=device)
    return torch.log1p(-(2.0 ** (-5.0 - head_G))).to(dtype)[:, None, None]


class Retention(RecurrentMixer):
    """`S_t = gamma S_{t-1} + k_t v_t^T` with a constant gamma per key/value head.

    Queries and keys are rotated by position; the output is normalised per head and gated by
    `silu(W_g x)`. The bidirectional form normalises the mean of both directions, in which a token
    counts by `gamma^|t-s|`. The normalisation of scores in section 2.1 of the paper changes
    nothing before a norm per head, so it is left out. `out_gate` and `head_norm` are shared with
    gated linear attention.

    Source: Sun et al. 2023, "Retentive Network", equations 5-8 (with RoFormer's rotation, not
    xPos); Hatamizadeh et al. 2023, "ViR", for images.
    """

    positions: ClassVar[tuple[str, ...]] = ("rope", "nope")
    ordered: ClassVar[bool] = True
    axes: ClassVar[dict[str, tuple[str, ...]]] = {
        **ATTENTION_AXES,
        "out_gate.weight": ("num_heads*head_dim", "d_model"),
        "head_norm": ("head_dim",),
    }

    def __init__(self, spec: MixerSpec) -> None:
        super().__init__(spec)
        self.out_gate = Linear(spec.d_model, spec.num_heads * spec.head_dim, spec.precision)
        self.head_norm = nn.Parameter(torch.empty(spec.head_dim))

    def reset(self, generator: torch.Generator, depth: int) -> None:
        """Initialise every parameter."""
        super().reset(generator, depth)
        with torch.no_grad():
            self.head_norm.fill_(1.0)

    def input_linears(self) -> list[Linear]:
        """Return every map of the input."""
        return [self.q_proj, self.k_proj, self.v_proj, self.out_gate]

    def forward(self, x_BTD: Tensor, state: RecurrentState | None = None) -> Tensor:
        """Mix every token up to and including the own one; bidirectional: both directions."""
        q, k, v, gate = project(x_BTD, *self.input_linears())
        q, k, v = self.convolve_qkv(q, k, v, state)
        q, k = self.split_heads(q) * self.spec.head_dim**-0.5, self.split_heads(k)
        dtype = torch.promote_types(q.dtype, torch.float32)
        decay = log_decays(self.spec.num_kv_heads, dtype, q.device)
        decay = decay.expand(k.shape[0], -1, k.shape[2], -1)
        q, k = self.rotate(q, state), self.rotate(k, state)
        out = self.run(q, k, self.split_heads(v), decay, state)
        out = F.rms_norm(out.to(self.head_norm.dtype), self.head_norm.shape, self.head_norm, 1e-5)
        return self.o_proj(self.merge_heads(out) * F.silu(gate))
