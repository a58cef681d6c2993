"""Gated feed-forward networks.

Shapes: B batch, T tokens, D d_model, F hidden units.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional as F

from searchspace.ffn.mlp import FFN
from searchspace.linear import Linear, fusable, fused_linear, project
from searchspace.specs import FFNSpec


class GLU(FFN):
    """`down_proj(activation(gate_proj(x)) * up_proj(x))`.

    Source: Shazeer 2020, "GLU Variants Improve Transformer", equations 5-6.
    """

    axes: ClassVar = {**FFN.axes, "gate_proj.weight": ("intermediate_size", "d_model")}

    def __init__(self, spec: FFNSpec) -> None:
        super().__init__(spec)
        self.gate_proj = self.linear(spec.d_model, spec.intermediate_size)

    def forward(self, x_BTD: Tensor, state: Any = None) -> Tensor:
        """Map each token on its own, same shape."""
        if self.fused and fusable(x_BTD, self.up_proj, self.gate_proj):
            hidden = fused_linear(x_BTD, self.fused, self.up_proj, self.gate_proj)
            return self.down_proj(hidden)
        up, gate = project(x_BTD, self.up_proj, self.gate_proj)
        return self.down_proj(self.activation(gate) * up)

    def input_linears(self) -> list[Linear]:
        """Return both projections of the input."""
        return [self.up_proj, self.gate_proj]


class SwiGLU(GLU):
    """Gated by SiLU; equation 6 with beta = 1."""

    fused: ClassVar[str] = "swiglu"

    def activation(self, hidden_BTF: Tensor) -> Tensor:
        """Return silu(gate)."""
        return F.silu(hidden_BTF)


class GeGLU(GLU):
    """Gated by GELU (tanh form); equation 6."""

    fused: ClassVar[str] = "geglu"

    def activation(self, hidden_BTF: Tensor) -> Tensor:
        """Return gelu(gate)."""
        return F.gelu(hidden_BTF, approximate="tanh")


class ReGLU(GLU):
    """Gated by ReLU; equation 6."""

    fused: ClassVar[str] = "reglu"

    def activation(self, hidden_BTF: Tensor) -> Tensor:
        """Return relu(gate)."""
        return F.relu(hidden_BTF)
