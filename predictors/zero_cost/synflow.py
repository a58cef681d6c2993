"""Synaptic flow: how much signal positive weights carry from end to end."""

from __future__ import annotations

import math

from predictors.zero_cost.probe import Probe
from searchspace.errors import UserError


def synflow(probe: Probe) -> float:
    """Return ``log sum |W * dR/dW|``: R the sum of the outputs for an input of ones, W := |W|.

    The flow is that of `predictors.zero_cost.flow_pass.run_flow_pass`, without norms.

    Source: Tanaka et al. 2020, "Pruning neural networks without any data", equation 1 and
    algorithm 1; sum over the network and logarithm as in Abdelfattah et al. 2021.
    """
    flow = probe.flow_pass
    saliency = sum(
        float((weight * flow.gradients[name]).abs().sum()) for name, weight in flow.weights.items()
    )
    return log_flow(saliency, probe) + flow.log_scale


def log_flow(saliency: float, probe: Probe) -> float:
    """Return the logarithm of what is summed over a flow.

    Raises:
        UserError: when nothing flows, or more than a number can hold.
    """
    if not math.isfinite(saliency) or saliency <= 0:
        mixers = ", ".join(dict.fromkeys(layer.mixer for layer in probe.arch.layers))
        raise UserError(
            f"the flow through positive weights is {saliency}, which has no logarithm (mixers: "
            f"{mixers}); leave the metric out of search.metrics"
        )
    return math.log(saliency)
