"""Connection sensitivity at random weights."""

from __future__ import annotations

from predictors.zero_cost.probe import Probe


def snip(probe: Probe) -> float:
    """Return ``sum |W * dL/dW|`` over all linear maps, for the task loss L.

    Source: Lee et al. 2019, "SNIP", equation 4; summed up as in Abdelfattah et al. 2021.
    """
    done = probe.loss_pass
    pairs = ((done.weights[name].detach(), grad) for name, grad in done.gradients.items())
    return sum(float((weight * grad).double().abs().sum()) for weight, grad in pairs)
