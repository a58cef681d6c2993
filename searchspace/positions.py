"""Position information: rotary embeddings, or none.

Shapes: B batch, H heads, T tokens, K head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nas_kernels.constants import cached_constant

THETA = 10_000.0


@cached_constant
def _rope_table(head_dim: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    inverse_K = THETA ** (-torch.arange(0, head_dim, 2, device=device) / head_dim)
    angle_TK = torch.arange(length, device=device)[:, None] * inverse_K
    angle_TK = torch.cat([angle_TK, angle_TK], dim=1)
    sin_TK = angle_TK.sin()
    # The sign of rotate-half is folded into the table: it saves a negation per call.
    sin_TK[:, : head_dim // 2].neg_()
    return angle_TK.cos(), sin_TK


def apply_rope(x_BHTK: Tensor, start: int) -> Tensor:
    """Rotate `x_BHTK`, whose first token stands at position `start`.

    Source: Su et al. 2021, "RoFormer", equation 34, in the half-split form of GPT-NeoX.
    """
    tokens, head_dim = x_BHTK.shape[-2], x_BHTK.shape[-1]
    end = start + tokens
    # Tables grow in powers of two, so decoding does not build one for every length.
    cos, sin = _rope_table(head_dim, 1 << max(end - 1, 63).bit_length(), x_BHTK.device)
    rolled = torch.roll(x_BHTK, head_dim // 2, dims=-1)
    cos, sin = cos[start:end].to(x_BHTK.dtype), sin[start:end].to(x_BHTK.dtype)
    return torch.addcmul(x_BHTK * cos, rolled, sin)
