"""Weights as they are trained."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.nn import functional as F

from searchspace.precisions.activations import FLOAT, Activations
from searchspace.precisions.base import Runtime


class FP32:
    """No rounding: the trained weight is stored and run."""

    name = "fp32"
    bits = 32
    activations: Activations = FLOAT

    def fake_weight(self, weight_NK: Tensor) -> Tensor:
        """Return the weight."""
        return weight_NK

    def pack(self, weight_NK: Tensor) -> dict[str, Tensor]:
        """Return nothing: the weight stays a parameter, so an export can be trained on."""
        return {}

    def run(self, x: Tensor, stored: Mapping[str, Tensor], runtime: Runtime) -> Tensor:
        """Return `x @ weight.T`."""
        return F.linear(x, stored["weight"])
