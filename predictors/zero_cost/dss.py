"""Diversity of the mixers and saliency of the rest, by a flow of ones through positive weights."""

from __future__ import annotations

from predictors.zero_cost.loss_pass import linears_inside
from predictors.zero_cost.nuclear import nuclear_product
from predictors.zero_cost.probe import Probe
from predictors.zero_cost.synflow import log_flow
from searchspace.sub_blocks import MixerBlock


def dss(probe: Probe) -> float:
    """Return ``log(sum over mixers of ||W||_* ||dR/dW||_* + sum over the rest of |W * dR/dW|)``.

    W are the absolute weights of linear maps; R is the sum of the outputs for an input of ones, and
    the rest are FFNs and the head. The flow is that of `flow_pass.run_flow_pass`: the published
    code keeps LayerNorms, and R of a network that ends in one is constant. The logarithm keeps deep
    networks finite and does not change an order.

    Source: Zhou et al. 2022, "Training-free Transformer Architecture Search", DSS-indicator.
    """
    flow, inside = probe.flow_pass, linears_inside(probe.network, MixerBlock)
    total = 0.0
    for name, weight in flow.weights.items():
        gradient = flow.gradients[name]
        if name in inside:
            total += nuclear_product(weight, gradient)
        else:
            total += float((weight * gradient).abs().sum())
    return log_flow(total, probe) + flow.log_scale
