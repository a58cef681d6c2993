"""Feed-forward networks with polynomial composition activations.

Shapes: B batch, T tokens, F hidden units.

Source: Zhuo et al. 2024, "Polynomial Composition Activations", equations 2-5.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from searchspace.ffn.mlp import FFN
from searchspace.specs import FFNSpec

ORDER = 3
EPS = 1e-6


class PolynomialMLP(FFN):
    """`sum_i a_i f_i(hidden) + a_0` with learned coefficients."""

    coefficients: ClassVar[str]
    """Name of the parameter that holds them."""

    def __init__(self, spec: FFNSpec) -> None:
        super().__init__(spec)
        self.register_parameter(self.coefficients, nn.Parameter(torch.empty(ORDER + 1)))

    def powers(self) -> list[Tensor]:
        """Return the coefficients a_0 ... a_3."""
        return list(self.get_parameter(self.coefficients).unbind())

    def reset(self, generator: torch.Generator, depth: int) -> None:
        """Initialise; every power starts with a third, the constant with 0 (section 4.1)."""
        super().reset(generator, depth)
        with torch.no_grad():
            coefficients = self.get_parameter(self.coefficients)
            coefficients.fill_(1.0 / ORDER)
            coefficients[0] = 0.0


class PolyReluMLP(PolynomialMLP):
    """PolyReLU: `sum_i a_i relu(x)^i`, order 3; equation 4."""

    coefficients = "polyrelu_coefficients"
    axes: ClassVar = {**FFN.axes, "polyrelu_coefficients": ("coefficients",)}

    def activation(self, hidden_BTF: Tensor) -> Tensor:
        """Return the polynomial of relu(hidden), by Horner's rule."""
        a = self.powers()
        x = F.relu(hidden_BTF)
        return a[0] + x * (a[1] + x * (a[2] + x * a[3]))


class PolyNormMLP(PolynomialMLP):
    """PolyNorm: `sum_i a_i x^i / rms(x^i) + a_0`, order 3; equation 5."""

    coefficients = "polynorm_coefficients"
    axes: ClassVar = {**FFN.axes, "polynorm_coefficients": ("coefficients",)}

    def activation(self, hidden_BTF: Tensor) -> Tensor:
        """Return the polynomial of normalised powers; the root mean square is over F."""
        a = self.powers()
        x = hidden_BTF.to(a[0].dtype)
        out, power = a[0], torch.ones_like(x)
        for coefficient in a[1:]:
            power = power * x
            out = out + coefficient * F.rms_norm(power, power.shape[-1:], eps=EPS)
        return out
