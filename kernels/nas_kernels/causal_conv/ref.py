"""The definition: a sum of shifted copies.

Shapes: B batch, T tokens, C channels, W taps, P = W - 1 tokens before.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def causal_conv_reference(
    x_BTC: Tensor,
    weight_CW: Tensor,
    state_BPC: Tensor | None = None,
    bias_C: Tensor | None = None,
    silu: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute `causal_conv` in PyTorch; same arguments and results."""
    tokens, taps = x_BTC.shape[1], weight_CW.shape[1]
    if state_BPC is None:
        state_BPC = x_BTC.new_zeros(x_BTC.shape[0], taps - 1, x_BTC.shape[2])
    padded = torch.cat([state_BPC.to(x_BTC.dtype), x_BTC], dim=1)
    out = x_BTC * weight_CW[:, 0]
    for tap in range(1, taps):
        start = taps - 1 - tap
        out = out + padded[:, start : start + tokens] * weight_CW[:, tap]
    if bias_C is not None:
        out = out + bias_C
    kept_as = torch.promote_types(state_BPC.dtype, x_BTC.dtype)
    after = padded[:, padded.shape[1] - (taps - 1) :].to(kept_as)
    return (F.silu(out) if silu else out), after
