"""Padded batches of encoders.

Shapes: B batch, T tokens, V classes, N rows of equal length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from searchspace.subnet import Subnet


def classify_rows(network: Subnet, input_ids: Tensor, mask_BT: Tensor | None) -> Tensor:
    """Return the logits (B, V) of every row, whatever the others are.

    A network with a pad token was trained on rows that have it behind their tokens, up to its full
    length; its rows get that form. One without was trained without padding: its rows of equal
    length run together, without padding.

    Args:
        network: an encoder.
        input_ids: token ids (B, T).
        mask_BT: 0 where there is padding; without it nothing is changed about `input_ids`.
    """
    if mask_BT is None:
        return network(input_ids)
    there_BT = mask_BT.to(input_ids.device) != 0
    count_B = there_BT.sum(dim=1)
    if network.arch.family.pad_token >= 0:
        return network(_padded(network, input_ids, there_BT, count_B))
    rows, logits = [], []
    for count in count_B.unique().tolist():
        rows_N = (count_B == count).nonzero()[:, 0]
        rows.append(rows_N)
        logits.append(network(input_ids[rows_N][there_BT[rows_N]].view(len(rows_N), count)))
    return torch.cat(logits)[torch.cat(rows).argsort()]


def _padded(network: Subnet, input_ids: Tensor, there_BT: Tensor, count_B: Tensor) -> Tensor:
    """Return the tokens in front and the pad token behind them, at the network's full length."""
    family = network.arch.family
    length = max(family.max_tokens, int(count_B.max()))
    padded = input_ids.new_full((len(input_ids), length), family.pad_token)
    padded[torch.arange(length, device=input_ids.device) < count_B[:, None]] = input_ids[there_BT]
    return padded
