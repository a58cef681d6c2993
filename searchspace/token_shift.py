"""The token before, or after, each one.

Shapes: B batch, T tokens, D channels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from nas_kernels.constants import cached_constant


def previous_token(x_BTD: Tensor, before_BD: Tensor | None = None) -> Tensor:
    """Return what stands one token earlier; `before_BD` (None: zeros) before the first."""
    if before_BD is None:
        return F.pad(x_BTD[:, :-1], (0, 0, 1, 0))
    return torch.cat([before_BD[:, None].to(x_BTD.dtype), x_BTD[:, :-1]], dim=1)


def next_token(x_BTD: Tensor) -> Tensor:
    """Return what stands one token later; zeros after the last."""
    return F.pad(x_BTD[:, 1:], (0, 0, 0, 1))


@cached_constant
def _even(width: int, device: torch.device) -> Tensor:
    return torch.arange(width, device=device) % 2 == 0


def neighbour_tokens(x_BTD: Tensor) -> Tensor:
    """Return the previous token in even channels and the next one in odd channels.

    Channels alternate so that any leading slice of them looks both ways.

    Source: Duan et al. 2024, "Vision-RWKV", equation 3 (Q-Shift), in one dimension.
    """
    even_D = _even(x_BTD.shape[-1], x_BTD.device)
    return torch.where(even_D, previous_token(x_BTD), next_token(x_BTD))
