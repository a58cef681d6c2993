"""The frozen teacher of the second stage.

Source: Wang et al. 2022, "LightHuBERT: Lightweight and Configurable Speech Representation Learning
with Once-for-All Hidden-Unit BERT", two-stage distillation.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nas.training.batch import Batch
from nas.training.losses import SoftTargets, predict, soft_targets
from searchspace.norms import PRepBN
from searchspace.supernet import Supernet

BLEND = "norm_blend"
"""Beside the weights, what annealed norms computed when the teacher was frozen."""


class Teacher:
    """A frozen copy of a supernet's largest network.

    Args:
        supernet: its present weights are copied.
        with_hidden: give final hidden states too.
    """

    def __init__(self, supernet: Supernet, with_hidden: bool) -> None:
        self._with_hidden = with_hidden
        self._model = supernet.extract(supernet.space.largest())
        self._model.eval().requires_grad_(False)
        self._blend = supernet.norm_blend

    @torch.no_grad()
    def __call__(self, batch: Batch) -> SoftTargets:
        """Return what it says at the scored positions of a batch."""
        given = self._model, batch.inputs, batch.targets
        return soft_targets(predict(*given, self._with_hidden, batch.scored))

    def state_dict(self) -> dict[str, Tensor]:
        """Return its tensors by name, for a checkpoint."""
        blend = torch.tensor(self._blend, dtype=torch.float64)
        return {**self._model.state_dict(), BLEND: blend}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the tensors of a checkpoint."""
        weights = dict(tensors)
        self._blend = weights.pop(BLEND).item()
        self._model.load_state_dict(weights)
        for module in self._model.modules():
            if isinstance(module, PRepBN):
                module.blend = self._blend
