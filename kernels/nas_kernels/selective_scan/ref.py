"""The definition: one token after the other.

Shapes: B batch, T tokens, C channels, S numbers of state per channel.
"""

from __future__ import annotations

import torch
from torch import Tensor


def recurrent_selective_scan(
    x_BTC: Tensor,
    delta_BTC: Tensor,
    a_CS: Tensor,
    write_BTS: Tensor,
    read_BTS: Tensor,
    state_BCS: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute `h_t = exp(delta_t a) h_{t-1} + delta_t x_t B_t` and `y_t = h_t C_t`.

    Args:
        x_BTC: inputs.
        delta_BTC: step sizes, > 0.
        a_CS: diagonal state matrix, < 0.
        write_BTS: B, how an input enters the state.
        read_BTS: C, how the state is read.
        state_BCS: h before the first token; None means zeros.

    Returns:
        y (B, T, C) and the state after the last token (B, C, S).

    Source: Gu and Dao 2023, "Mamba", equation 2 and algorithm 2, with A discretised by zero-order
    hold (equation 4) and B by Euler's rule, as section 3.6 and the authors' experiments do.
    """
    batch, tokens, channels = x_BTC.shape
    state = x_BTC.new_zeros(batch, channels, a_CS.shape[1]) if state_BCS is None else state_BCS
    outputs = []
    for t in range(tokens):
        added = (delta_BTC[:, t] * x_BTC[:, t])[:, :, None] * write_BTS[:, t, None, :]
        state = (delta_BTC[:, t, :, None] * a_CS).exp() * state + added
        outputs.append((state * read_BTS[:, t, None, :]).sum(dim=-1))
    return torch.stack(outputs, dim=1), state
