"""Which layers a shallower network leaves out.

Scores of single skipped layers do not add up: of two layers that do each other's work either can
go, but not both. So depth is not left to the integer programme. For every depth the layers to skip
are fixed before, and the loss without all of them together is evaluated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from nas.evaluation import EvaluationFailed
from searchspace.subnet import Subnet

ORDERS = ("best", "influence", "skip-loss", "greedy", "additive")
"""The best of the next three; least block influence; least loss without the layer alone; least loss
without it and those that went before; left to the programme after all."""
LossWithout = Callable[[frozenset[int]], float]
"""The loss of the largest network with slots skipped; infinite where it cannot be evaluated."""


def block_influence(before_BTD: Tensor, after_BTD: Tensor) -> float:
    """Return the mean over tokens of 1 minus the cosine similarity of the residual stream.

    Args:
        before_BTD: residual stream that goes into a layer.
        after_BTD: residual stream that comes out.

    Raises:
        EvaluationFailed: when it is not a number.

    Source: Men et al. 2024, "ShortGPT: Layers in Large Language Models are More Redundant Than
    You Expect", equation 1.
    """
    similarity = torch.cosine_similarity(before_BTD.double(), after_BTD.double(), dim=-1)
    influence = 1.0 - similarity.mean().item()
    if influence != influence:
        raise EvaluationFailed("the block influence is not a number")
    return influence


def run_layer(network: Subnet, slot: int, x_BTD: Tensor) -> Tensor:
    """Return what one layer of a network makes of the residual stream."""
    for name, block in network.blocks.items():
        if name.startswith(f"layer{slot}_"):
            x_BTD = block(x_BTD)
    return x_BTD


def skipped_by_depth(
    order: str,
    influence: Sequence[float],
    skip_losses: Sequence[float],
    min_depth: int,
    loss_without: LossWithout,
) -> Iterator[frozenset[int]]:
    """Yield the slots to skip for every depth, from all layers on down to `min_depth`.

    Args:
        order: one of `ORDERS`, but ``"additive"``.
        influence: block influence of every slot.
        skip_losses: loss increase without each slot alone.
        min_depth: fewest layers that stay.
        loss_without: is asked by ``"best"`` and ``"greedy"``.
    """
    gone: frozenset[int] = frozenset()
    yield gone
    for num in range(1, len(influence) - min_depth + 1):
        proposals = []
        if order in ("best", "influence"):
            proposals.append(_least(influence, num))
        if order in ("best", "skip-loss"):
            proposals.append(_least(skip_losses, num))
        if order in ("best", "greedy"):
            left = [slot for slot in range(len(influence)) if slot not in gone]
            gone = min((gone | {slot} for slot in left), key=loss_without)
            proposals.append(gone)
        yield min(proposals, key=loss_without) if len(proposals) > 1 else proposals[0]


def _least(values: Sequence[float], num: int) -> frozenset[int]:
    return frozenset(sorted(range(len(values)), key=lambda slot: values[slot])[:num])
