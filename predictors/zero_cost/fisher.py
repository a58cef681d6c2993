"""What the loss would lose with each output channel of the linear maps."""

from __future__ import annotations

from predictors.zero_cost.probe import Probe


def fisher(probe: Probe) -> float:
    """Return ``sum over channels k of mean over sequences n of (sum over t of a_tk g_tk)^2 / 2``.

    a are the outputs of every linear map, the head's included, for sequence n and position t;
    g is the gradient of the task loss, a mean over the batch, by them.

    Source: Theis et al. 2018, "Faster gaze prediction with dense networks and Fisher pruning",
    equation of the pruning signal; outputs of all maps as in Abdelfattah et al. 2021, "Zero-Cost
    Proxies for Lightweight NAS", section 3.2.
    """
    sums = probe.loss_pass.channel_BN.values()
    return sum(float(sum_BN.square().mean(dim=0).sum()) / 2 for sum_BN in sums)
