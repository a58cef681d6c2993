"""Two-matrix feed-forward networks."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from searchspace.linear import Linear
from searchspace.specs import FFNSpec


class FFN(nn.Module):
    """`down_proj(activation(up_proj(x)))`, built at its final size.

    Widths are nested: a smaller network uses the leading rows of `up_proj` and the leading
    columns of `down_proj`.

    Source: Vaswani et al. 2017, equation 2; Devvrit et al. 2023, "MatFormer", section 3.1.
    """

    axes: ClassVar[dict[str, tuple[str, ...]]] = {
        "up_proj.weight": ("intermediate_size", "d_model"),
        "down_proj.weight": ("d_model", "intermediate_size"),
    }

    def __init__(self, spec: FFNSpec) -> None:
        super().__init__()
        self.spec = spec
        self.up_proj = Linear(spec.d_model, spec.intermediate_size, spec.precision)
        self.down_proj = Linear(spec.intermediate_size, spec.d_model, spec.precision)

    def activation(self, hidden: Tensor) -> Tensor:
        """Return the nonlinearity of the hidden units, same shape."""
        raise NotImplementedError

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Map each token on its own, same shape."""
        return self.down_proj(self.activation(self.up_proj(x_BTD)))

    def reset(self, generator: torch.Generator, depth: int) -> None:
        """Initialise every parameter; the output projection shrinks with the `depth`."""
        for name, module in self.named_children():
            if isinstance(module, Linear):
                gain = 1.0 / math.sqrt(2 * max(depth, 1)) if name == "down_proj" else 1.0
                module.reset(generator, gain)


class GeluMLP(FFN):
    """GELU, tanh form. Source: Hendrycks and Gimpel 2016, section 2."""

    def activation(self, hidden: Tensor) -> Tensor:
        """Return gelu(hidden)."""
        return F.gelu(hidden, approximate="tanh")


class SquaredReluMLP(FFN):
    """Squared ReLU. Source: So et al. 2021, "Primer", section 3.1."""

    def activation(self, hidden: Tensor) -> Tensor:
        """Return relu(hidden)^2."""
        return F.relu(hidden).square()
