"""Norm of the gradient at random weights."""

from __future__ import annotations

from predictors.zero_cost.probe import Probe


def grad_norm(probe: Probe) -> float:
    """Return the sum over linear maps l of ``||dL/dW_l||_2``, for the task loss L.

    Source: Abdelfattah et al. 2021, "Zero-Cost Proxies for Lightweight NAS", section 3.2.
    """
    gradients = probe.loss_pass.gradients.values()
    return sum(float(g.double().square().sum().sqrt()) for g in gradients)
