"""Batch normalisation that training grows out of layer normalisation.

Shapes: B batch, T tokens, D d_model.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from searchspace.errors import UserError
from searchspace.norms.base import BatchStatisticNorm, apply_affine, in_full_precision
from searchspace.norms.calibration import Moments


class PRepBN(BatchStatisticNorm):
    """`blend * LN(x) + (1 - blend) * (BN(x) + eta * x)`; an affine map once `blend` is 0.

    `blend` is set from outside: the training schedule moves it from 1 to 0. Layer and batch norm
    share one scale and shift, so that nothing trained is dropped when the layer norm goes.

    Source: Guo et al. 2024, "SLAB", section on progressive
    re-parameterized batch norm (there `blend` is lambda).
    """

    axes: ClassVar = {"weight": ("d_model",), "bias": ("d_model",), "eta": ("one",)}
    buffer_axes: ClassVar = {"running_mean": ("d_model",), "running_var": ("d_model",)}
    initial: ClassVar = {"weight": 1.0, "eta": 1.0, "running_var": 1.0}
    eps = 1e-5
    momentum = 0.1
    """Weight of the newest batch in the running statistics."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, d_model: int) -> None:
        super().__init__(d_model)
        self.blend = 0.0
        self.weight = nn.Parameter(torch.ones(d_model))
        self.bias = nn.Parameter(torch.zeros(d_model))
        self.eta = nn.Parameter(torch.ones(1))
        self.register_buffer("running_mean", torch.zeros(d_model))
        self.register_buffer("running_var", torch.ones(d_model))
        self._moments = Moments()

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return the normalised `x_BTD`, same shape and dtype.

        In training it needs at least two tokens, and moves the running statistics.
        """
        if self.training or self.calibrating:
            out_BTD = self._batch_norm(in_full_precision(x_BTD)).to(x_BTD.dtype)
        else:
            out_BTD = apply_affine(x_BTD, *self._inference_map())
        if self.blend == 0.0:
            return out_BTD
        layer = F.layer_norm(x_BTD, self.weight.shape, self.weight, self.bias, self.eps)
        return torch.lerp(out_BTD, layer.to(out_BTD.dtype), self.blend)

    def _batch_norm(self, x_BTD: Tensor) -> Tensor:
        """Return BN(x) + eta * x with the batch's statistics."""
        mean_D: Tensor | None = self.running_mean
        var_D: Tensor | None = self.running_var
        if self.calibrating:
            self._moments.add(x_BTD)
            mean_D = var_D = None
        rows = F.batch_norm(
            x_BTD.flatten(0, -2), mean_D, var_D, self.weight, self.bias, True, self.momentum,
            self.eps,
        )  # fmt: skip
        return torch.addcmul(rows.view(x_BTD.shape), x_BTD, self.eta)

    def _inference_map(self) -> tuple[Tensor, Tensor]:
        scale_D = self.weight * torch.rsqrt(self.running_var + self.eps)
        return scale_D + self.eta, self.bias - self.running_mean * scale_D

    def affine(self) -> tuple[Tensor, Tensor]:
        """Return scale and shift (D,) of inference.

        Raises:
            UserError: when layer norm is still mixed in.
        """
        if self.blend != 0.0:
            raise UserError(
                f"prepbn with blend={self.blend} still mixes layer norm in and cannot be folded; "
                "train until its blend is 0 before packing or exporting"
            )
        return self._inference_map()

    def start_calibration(self) -> None:
        """Forget earlier calibration statistics and take new ones from now on."""
        super().start_calibration()
        self._moments = Moments()

    def finish_calibration(self) -> None:
        """Put mean and variance of all tokens seen into the buffers, in place."""
        super().finish_calibration()
        mean_D, deviations_D = self._moments.mean_D, self._moments.deviations_D
        if mean_D is not None and deviations_D is not None:
            self.running_mean.copy_(mean_D)
            self.running_var.copy_(deviations_D / max(self._moments.count - 1, 1))
