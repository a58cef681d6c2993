"""How the loss answers when all weights grow together."""

from __future__ import annotations

import torch

from predictors.zero_cost.probe import Probe


def plain(probe: Probe) -> float:
    """Return ``sum W * dL/dW`` over all linear maps, for the task loss L.

    Maps in front of a norm hardly count: the loss does not depend on their scale.

    Source: Mozer and Smolensky 1988, "Skeletonization" (relevance of a unit); summed up with this
    sign as in Abdelfattah et al. 2021, "Zero-Cost Proxies for Lightweight NAS".
    """
    done = probe.loss_pass
    pairs = ((done.weights[name].detach(), grad) for name, grad in done.gradients.items())
    return sum(float((weight * grad).sum(dtype=torch.float64)) for weight, grad in pairs)
