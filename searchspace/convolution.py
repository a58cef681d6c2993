"""Depthwise convolutions over time.

Taps are stored from the own token outward: in causal convolutions the own token's, then those of
the tokens 1, 2, ... back; in the others the own token's, then one ahead, one back, two ahead, ...
So the leading taps of a wide convolution are a narrow one, as weight sharing needs it.

Shapes: B batch, T tokens, C channels, W taps.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from nas_kernels.causal_conv import causal_conv, weighted_sum

__all__ = ["causal_conv", "depthwise_conv", "outward_offsets", "reset_conv"]


def depthwise_conv(x_BTC: Tensor, weight_CW: Tensor) -> Tensor:
    """Weigh the tokens around each one, (W - 1) // 2 before and W // 2 after, zeros outside."""
    taps = weight_CW.shape[1]
    before = (taps - 1) // 2
    places = [before + offset for offset in outward_offsets(taps)]
    return weighted_sum(F.pad(x_BTC, (0, 0, before, taps // 2)), weight_CW, places)


def outward_offsets(num_taps: int) -> list[int]:
    """Return 0, 1, -1, 2, -2, ...: where each stored tap looks when both sides are seen."""
    return [(i + 1) // 2 if i % 2 else -(i // 2) for i in range(num_taps)]


def reset_conv(weight_CW: Tensor, generator: torch.Generator) -> None:
    """Initialise taps in place, near the identity."""
    with torch.no_grad():
        weight_CW.normal_(0.0, 0.1, generator=generator)
        weight_CW[:, 0] += 1.0
