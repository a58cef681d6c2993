"""Gated feed-forward networks."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from searchspace.ffn.mlp import FFN
from searchspace.linear import Linear, project
from searchspace.specs import FFNSpec


class SwiGLU(FFN):
    """`down_proj(silu(gate_proj(x)) * up_proj(x))`.

    Source: Shazeer 2020, "GLU Variants Improve Transformer", equation 6.
    """

    axes: ClassVar = {**FFN.axes, "gate_proj.weight": ("intermediate_size", "d_model")}

    def __init__(self, spec: FFNSpec) -> None:
        super().__init__(spec)
        self.gate_proj = Linear(spec.d_model, spec.intermediate_size, spec.precision)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Map each token on its own, same shape."""
        up, gate = project(x_BTD, self.up_proj, self.gate_proj)
        return self.down_proj(F.silu(gate) * up)
