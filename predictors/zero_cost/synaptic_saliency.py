"""Connection sensitivity of the feed-forward networks."""

from __future__ import annotations

from predictors.zero_cost.loss_pass import linears_inside
from predictors.zero_cost.probe import Probe
from searchspace.sub_blocks import FFNBlock


def synaptic_saliency(probe: Probe) -> float:
    """Return ``sum |W * dL/dW|`` over the linear maps of all FFNs, for the task loss L.

    A network without any FFN gets 0, the least possible value.

    Source: Zhou et al. 2022, "Training-free Transformer Architecture Search", synaptic saliency of
    multi-layer perceptrons; for language models Serianni and Kalita 2023, "Training-free Neural
    Architecture Search for RNNs and Transformers".
    """
    done = probe.loss_pass
    return sum(
        float((done.weights[name].detach() * done.gradients[name]).double().abs().sum())
        for name in sorted(linears_inside(probe.network, FFNBlock))
    )
