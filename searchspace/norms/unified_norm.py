"""Unified normalisation: channel scales smoothed over the last batches.

Shapes: B batch, T tokens, D d_model, W window.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from searchspace.norms.base import BatchStatisticNorm, apply_affine, in_full_precision

WINDOW = 4
MOMENTUM = 0.1
"""Weight of the newest value in the running statistics."""


class UnifiedNorm(BatchStatisticNorm):
    """`weight * x / sqrt(s + eps) + bias` per channel, with a smoothed mean square s.

    In training, s is the geometric mean of the mean squares of the last `WINDOW` batches, and the
    gradient through s is smoothed over as many batches. Where a batch is an outlier, or while the
    window fills, the batch's own statistic and its exact gradient are used. At inference s is a
    running average.

    The outlier test is made for every channel on its own: one decision for all of them would make
    nearly every batch an outlier once there are some hundred channels, and would let the width of
    a subnetwork decide for channels it shares. The long fixed warm-up of the authors' code is left
    out: the window's own filling takes its place.

    Source: Yang et al. 2022, "Unified Normalization for Accelerating and Stabilizing Transformers",
    sections on fluctuation smoothing (forward and backward) and adaptive outlier filtration.
    """

    axes: ClassVar = {"weight": ("d_model",), "bias": ("d_model",)}
    buffer_axes: ClassVar = {
        "running_square": ("d_model",),
        "running_slope": ("d_model",),
        "squares": ("window", "d_model"),
        "slopes": ("window", "d_model"),
    }
    initial: ClassVar = {"weight": 1.0, "running_square": 1.0}
    eps = 1e-5

    running_square: Tensor
    running_slope: Tensor
    squares: Tensor
    slopes: Tensor

    def __init__(self, d_model: int) -> None:
        super().__init__(d_model)
        self.weight = nn.Parameter(torch.ones(d_model))
        self.bias = nn.Parameter(torch.zeros(d_model))
        self.register_buffer("running_square", torch.ones(d_model))
        self.register_buffer("running_slope", torch.zeros(d_model))
        # Oldest batch first. A mean square of 0 is an entry that is not there yet.
        self.register_buffer("squares", torch.zeros(WINDOW, d_model))
        self.register_buffer("slopes", torch.zeros(WINDOW, d_model))
        self._log_squares: list[Tensor] = []

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return the normalised `x_BTD`, same shape and dtype; training moves the statistics."""
        if not (self.training or self.calibrating):
            return apply_affine(x_BTD, *self.affine())
        full_BTD = in_full_precision(x_BTD)
        with torch.no_grad():
            square_D = full_BTD.square().flatten(0, -2).mean(dim=0)
        if self.calibrating:
            self._log_squares.append(_log(square_D))
            return apply_affine(x_BTD, *self._map(square_D))
        with torch.no_grad():
            square_D, smoothed_D, outlier_D = self._smooth(square_D)
        out_BTD: Tensor = _SmoothedScale.apply(
            full_BTD, self.weight, self.bias, square_D + self.eps, smoothed_D, outlier_D,
            self.slopes, self.running_slope,
        )  # fmt: skip
        return out_BTD.to(x_BTD.dtype)

    def _smooth(self, square_D: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Take a batch's mean square in.

        A batch is an outlier where the arithmetic mean of the window exceeds the geometric one by
        more than `WINDOW` times the variance of the roots before it came: for values like the
        earlier ones the difference cannot be larger.

        Returns:
            The statistic to use (D,); where it is smoothed; where the batch is an outlier.
        """
        spread_D = self.squares.sqrt().var(dim=0)
        window_WD = torch.cat([self.squares[1:], square_D.to(self.squares.dtype)[None]])
        geometric_D = _log(window_WD).mean(dim=0).exp()
        full_D = (window_WD > 0).all(dim=0)
        outlier_D = full_D & (window_WD.mean(dim=0) - geometric_D > WINDOW * spread_D)
        smoothed_D = full_D & ~outlier_D
        window_WD[-1] = torch.where(outlier_D, self.running_square, window_WD[-1])
        self.squares.copy_(window_WD)
        used_D = torch.where(smoothed_D, geometric_D, square_D)
        self.running_square.lerp_(used_D.to(self.running_square.dtype), MOMENTUM)
        return used_D, smoothed_D, outlier_D

    def _map(self, square_D: Tensor) -> tuple[Tensor, Tensor]:
        return self.weight * torch.rsqrt(square_D + self.eps), self.bias

    def affine(self) -> tuple[Tensor, Tensor]:
        """Return scale and shift (D,) of inference."""
        return self._map(self.running_square)

    def start_calibration(self) -> None:
        """Forget earlier calibration statistics and take new ones from now on."""
        super().start_calibration()
        self._log_squares = []

    def finish_calibration(self) -> None:
        """Put the geometric mean over all batches seen into the running mean square, in place.

        It is the training statistic with a window as long as the calibration.
        """
        super().finish_calibration()
        if self._log_squares:
            self.running_square.copy_(torch.stack(self._log_squares).mean(dim=0).exp())


def _log(square: Tensor) -> Tensor:
    return square.clamp_min(torch.finfo(square.dtype).tiny).log()


class _SmoothedScale(torch.autograd.Function):
    """`weight * z + bias` with `z = x / sqrt(square)`, and a smoothed gradient through `square`.

    The exact gradient of normalising by the batch's own mean square is
    `(g - mean(g z) z) / sqrt(square)` with g the gradient of z. The slope `mean(g z)` is what is
    smoothed: averaged over the window, then as a running average.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_BTD: Tensor,
        weight_D: Tensor,
        bias_D: Tensor,
        square_D: Tensor,
        smoothed_D: Tensor,
        outlier_D: Tensor,
        slopes_WD: Tensor,
        running_slope_D: Tensor,
    ) -> Tensor:
        inverse_D = torch.rsqrt(square_D)
        z_BTD = x_BTD * inverse_D
        ctx.save_for_backward(z_BTD, weight_D, inverse_D, smoothed_D, outlier_D)
        # Changed by the backward pass itself, so they are no saved tensors.
        ctx.slopes_WD, ctx.running_slope_D = slopes_WD, running_slope_D
        return torch.addcmul(bias_D, z_BTD, weight_D)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTD: Tensor) -> tuple[Tensor | None, ...]:
        z_BTD, weight_D, inverse_D, smoothed_D, outlier_D = ctx.saved_tensors
        slopes_WD, running_slope_D = ctx.slopes_WD, ctx.running_slope_D
        product_D = (grad_BTD * z_BTD).flatten(0, -2)
        slope_D = product_D.mean(dim=0) * weight_D
        newest_D = torch.where(outlier_D, running_slope_D, slope_D.to(slopes_WD.dtype))
        slopes_WD.copy_(torch.cat([slopes_WD[1:], newest_D[None]]))
        mean_D = torch.where(smoothed_D, slopes_WD.mean(dim=0), slope_D.to(slopes_WD.dtype))
        running_slope_D.lerp_(mean_D, MOMENTUM)
        used_D = torch.where(smoothed_D, running_slope_D.to(slope_D.dtype), slope_D)
        grad_x_BTD = (grad_BTD * weight_D - used_D * z_BTD) * inverse_D
        grad_bias_D = grad_BTD.flatten(0, -2).sum(dim=0)
        return grad_x_BTD, product_D.sum(dim=0), grad_bias_D, None, None, None, None, None
