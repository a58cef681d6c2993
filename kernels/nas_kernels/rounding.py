"""What every fake quantiser shares."""

from __future__ import annotations

import torch
from torch import Tensor

# Keeps the scale of an all-zero row finite; far below any scale that occurs.
TINY = 1e-12


def straight_through(value: Tensor, rounded: Tensor) -> Tensor:
    """Return `rounded` in the forward pass with the gradient of `value`.

    Source: Bengio et al. 2013, "Estimating or Propagating Gradients Through Stochastic Neurons",
    section 4 (straight-through estimator).
    """
    with torch.no_grad():
        error = rounded - value
    return value + error
