"""The definition: one token after the other.

Shapes: B batch, T tokens, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor


def recurrent_wkv(
    k_BTC: Tensor,
    v_BTC: Tensor,
    decay_C: Tensor,
    bonus_C: Tensor,
    state: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Compute the mean of values, weighted by `e^(k_i - (t-1-i) w)` and, for i = t, `e^(u + k_t)`.

    Args:
        k_BTC: logarithms of the weights.
        v_BTC: values.
        decay_C: w > 0, what a logarithm loses per token.
        bonus_C: u, what the own token's logarithm gets on top.
        state: numerator and denominator (B, C), both times e^-peak, and the peak (B, C); None
            means that no token came before.

    Returns:
        The means (B, T, C) and the state after the last token.

    Source: Peng et al. 2023, "RWKV", equation 16, and appendix D (numerically stable form).
    """
    if state is None:
        zero = torch.zeros_like(v_BTC[:, 0])
        state = (zero, zero, torch.full_like(zero, -torch.inf))
    num, den, peak = state
    outputs = []
    for t in range(k_BTC.shape[1]):
        k, v = k_BTC[:, t], v_BTC[:, t]
        top = torch.maximum(peak, bonus_C + k)
        old, own = (peak - top).exp(), (bonus_C + k - top).exp()
        outputs.append((old * num + own * v) / (old * den + own))
        top = torch.maximum(peak - decay_C, k)
        old, own = (peak - decay_C - top).exp(), (k - top).exp()
        num, den, peak = old * num + own * v, old * den + own, top
    return torch.stack(outputs, dim=1), (num, den, peak)
