"""What is left of a foldable norm that has no linear map to be folded into.

Shapes: B batch, T tokens, D d_model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from searchspace.norms.base import apply_affine


class Affine(nn.Module):
    """`x * scale + shift` per channel, one multiply-add; made by `searchspace.rewrites.fold_norms`.

    Args:
        scale_D: the scale.
        shift_D: the shift.
    """

    def __init__(self, scale_D: Tensor, shift_D: Tensor) -> None:
        super().__init__()
        self.scale = nn.Parameter(scale_D.detach().clone(memory_format=torch.contiguous_format))
        self.shift = nn.Parameter(shift_D.detach().clone(memory_format=torch.contiguous_format))

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return the scaled and shifted `x_BTD`, same shape and dtype."""
        return apply_affine(x_BTD, self.scale, self.shift)
