"""Convolutions over time with filters as long as the sequence.

Shapes: B batch, T tokens, C channels, S tokens so far, L filter length.
"""

from __future__ import annotations

import torch
from torch import Tensor


def long_conv(x_BTC: Tensor, filter_LC: Tensor) -> Tensor:
    """Convolve every channel with a filter of its own.

    The transforms run in float64: in float32 the rounding of large later tokens would reach
    earlier ones, which must not depend on them.

    Args:
        x_BTC: the tokens.
        filter_LC: for distances 0 to T - 1 (L = T) or -(T - 1) to T - 1 (L = 2T - 1); a positive
            distance lies in the past.

    Returns:
        The result (B, T, C), in float32 at least.
    """
    tokens = x_BTC.shape[1]
    length = fast_length(2 * tokens - 1)
    # The time axis last and contiguous: up to twice as fast.
    layout = torch.contiguous_format
    x_BCT = x_BTC.transpose(1, 2).to(torch.float64, memory_format=layout)
    filter_CL = filter_LC.t().to(torch.float64, memory_format=layout)
    product = torch.fft.rfft(x_BCT, n=length) * torch.fft.rfft(filter_CL, n=length)
    out_BCT = torch.fft.irfft(product, n=length)
    # Of two-sided filters only the head of the result is wrapped around, which is not wanted.
    first = filter_LC.shape[0] - tokens
    dtype = torch.promote_types(x_BTC.dtype, torch.float32)
    return out_BCT[..., first : first + tokens].transpose(1, 2).to(dtype, memory_format=layout)


def long_conv_step(history_BSC: Tensor, reversed_LC: Tensor) -> Tensor:
    """Return the convolution's result for the newest token only, (B, 1, C).

    Args:
        history_BSC: all tokens so far.
        reversed_LC: the filter for distances L - 1 to 0, with L >= S.
    """
    weight_SC = reversed_LC[reversed_LC.shape[0] - history_BSC.shape[1] :]
    return (history_BSC * weight_SC).sum(dim=1, keepdim=True)


def fast_length(at_least: int) -> int:
    """Return the smallest length 2^n or 3 * 2^n that is large enough: both transform fast."""
    power = 1 << (at_least - 1).bit_length()
    return power // 4 * 3 if power // 4 * 3 >= at_least else power
