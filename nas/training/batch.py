"""A batch where it is trained on, with what is scored of it found out beforehand.

Which targets are scored is looked up on the host, where batches are made: asked on a GPU it would
make the host wait at every arch.

Shapes: B batch, T tokens, N scored positions (all positions in the static form).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nas.training.losses import Scored


@dataclass(frozen=True)
class Batch:
    """One batch on the training's device.

    Args:
        inputs: token ids (B, T) or images.
        targets: (B, T) or (B,).
        scored: which of the targets count.
    """

    inputs: Tensor
    targets: Tensor
    scored: Scored

    @staticmethod
    def on(device: torch.device, inputs: Tensor, targets: Tensor, static: bool = False) -> Batch:
        """Return a batch on a device; copies to a GPU go on while the host does other things.

        Args:
            device: where it is wanted.
            inputs: a task's.
            targets: theirs.
            static: keep all positions, so that shapes do not depend on how many are scored.

        Raises:
            UserError: when nothing is scored.
        """
        scored = Scored.of(targets)
        if static and isinstance(scored.rows, Tensor):
            weight_N = torch.zeros(targets.numel())
            weight_N[scored.rows] = 1.0 / len(scored.rows)
            scored = Scored(slice(None), moved(weight_N, device))
        elif isinstance(scored.rows, Tensor):
            scored = Scored(moved(scored.rows, device))
        return Batch(moved(inputs, device), moved(targets, device), scored)


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device, by way of pinned memory to a GPU; itself where it is there."""
    if tensor.device == device:
        return tensor
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
