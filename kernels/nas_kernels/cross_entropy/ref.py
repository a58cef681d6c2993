"""The definition: all logits, then their cross-entropy.

Shapes: d <= D inputs and v <= V classes, out of those of the maximal weight.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from nas_kernels.precision import at_least_fp32


def linear_cross_entropy_ref(
    x: Tensor,
    weight_VD: Tensor,
    targets: Tensor,
    bias_V: Tensor | None = None,
    num_classes: int | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Compute `nas_kernels.cross_entropy.linear_cross_entropy`; same arguments."""
    bias_v = None if bias_V is None else bias_V[:num_classes]
    logits = F.linear(x, weight_VD[:num_classes, : x.shape[-1]], bias_v)
    return F.cross_entropy(
        at_least_fp32(logits).flatten(0, -2),
        targets.flatten(),
        ignore_index=ignore_index,
        reduction=reduction,
    )
