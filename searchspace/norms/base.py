"""What a normalisation is.

Shapes: B batch, T tokens, D d_model.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

HALF = (torch.bfloat16, torch.float16)


class Norm(nn.Module):
    """A normalisation over the last axis, built at its final size.

    Buffers are running statistics. They may be slices of larger tensors that others share, so they
    are only ever changed in place; at inference they are constants.

    Args:
        d_model: D.
    """

    axes: ClassVar[dict[str, tuple[str, ...]]] = {}
    """Named dimension of every axis of every parameter."""
    buffer_axes: ClassVar[dict[str, tuple[str, ...]]] = {}
    """Named dimension of every axis of every buffer."""
    initial: ClassVar[dict[str, float]] = {"weight": 1.0, "bias": 0.0}
    """Value that parameters and buffers start from; 0 where not given."""
    foldable: ClassVar[bool] = False
    """Whether it is an affine map per channel at inference, which `affine` returns."""

    def __init__(self, d_model: int) -> None:
        super().__init__()

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return the normalised `x_BTD`, same shape and dtype; any leading axes will do."""
        raise NotImplementedError

    def reset(self) -> None:
        """Bring parameters and buffers to their initial values, in place."""
        with torch.no_grad():
            for name in (*self.axes, *self.buffer_axes):
                getattr(self, name).fill_(self.initial.get(name, 0.0))

    def affine(self) -> tuple[Tensor, Tensor]:
        """Return scale and shift (D,): what a foldable norm is at inference."""
        raise NotImplementedError(f"{type(self).__name__} is no affine map at inference")


class BatchStatisticNorm(Norm):
    """A norm that takes statistics over the batch in training, and constants at inference.

    While it `calibrating` it also takes the batch's statistics, and remembers them until
    `finish_calibration`; see `searchspace.norms.calibration.recalibrated`.

    Statistics are per channel, over all other axes, padding included.
    """

    foldable = True
    calibrating = False

    def start_calibration(self) -> None:
        """Forget earlier calibration statistics and take new ones from now on."""
        self.calibrating = True

    def finish_calibration(self) -> None:
        """Put the statistics taken into the buffers, in place; without any, leave the buffers."""
        self.calibrating = False

    def cancel_calibration(self) -> None:
        """Stop taking statistics; the buffers stay as they are."""
        self.calibrating = False


def in_full_precision(x: Tensor) -> Tensor:
    """Return `x` in a dtype that statistics can be taken in: half types become fp32."""
    return x.float() if x.dtype in HALF else x


def apply_affine(x_BTD: Tensor, scale_D: Tensor, shift_D: Tensor) -> Tensor:
    """Return `x * scale + shift` in the dtype of `x`, as one multiply-add."""
    out_BTD = torch.addcmul(shift_D, in_full_precision(x_BTD), scale_D)
    return out_BTD.to(x_BTD.dtype)
