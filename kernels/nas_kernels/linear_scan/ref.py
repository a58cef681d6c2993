"""The definition: one token after the other.

Shapes: B batch, T tokens, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor


def recurrent_linear_scan(
    decay_BTC: Tensor, input_BTC: Tensor, state_BC: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute `h_t = decay_t h_{t-1} + input_t`.

    Args:
        decay_BTC: factors of the state before, in [0, 1].
        input_BTC: what is added.
        state_BC: h before the first token; None means zeros.

    Returns:
        Every h (B, T, C) and the last one (B, C).
    """
    state = torch.zeros_like(input_BTC[:, 0]) if state_BC is None else state_BC
    states = []
    for t in range(input_BTC.shape[1]):
        state = decay_BTC[:, t] * state + input_BTC[:, t]
        states.append(state)
    return torch.stack(states, dim=1), state
