"""bf16 weights, multiplied in bf16 where the device does that fast."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nas_kernels.bf16_linear import bf16_linear, fake_round_bf16
from searchspace.precisions.activations import FLOAT, Activations
from searchspace.precisions.base import Runtime


class BF16:
    """Half the bytes; the result is cast back to the input's dtype."""

    name = "bf16"
    bits = 16
    activations: Activations = FLOAT

    def fake_weight(self, weight_NK: Tensor) -> Tensor:
        """Round to bf16."""
        return fake_round_bf16(weight_NK)

    def pack(self, weight_NK: Tensor) -> dict[str, Tensor]:
        """Return the bf16 weight."""
        weight = weight_NK.detach().contiguous()
        return {"weight": weight.to(torch.bfloat16, copy=True)}

    def run(self, x: Tensor, stored: Mapping[str, Tensor], runtime: Runtime) -> Tensor:
        """Return `x @ weight.T`."""
        return bf16_linear(x, stored["weight"])
