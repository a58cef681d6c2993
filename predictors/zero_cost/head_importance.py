"""What the loss would lose with each head of the mixers."""

from __future__ import annotations

from predictors.zero_cost.probe import Probe


def head_importance(probe: Probe) -> float:
    """Return ``sum over heads of mean over sequences of |sum of c * dL/dc|``.

    c is what a head hands to the output projection, at all positions of a sequence; of recurrences,
    gates and convolutions it is the head's share of the inner width. Mixers without heads or
    without an output projection add nothing: a network of these gets 0, the least possible value.

    Source: Michel et al. 2019, "Are Sixteen Heads Really Better than One?", equation 2; as a score
    of architectures Serianni and Kalita 2023, "Training-free Neural Architecture Search for RNNs
    and Transformers" (whose code sums |W * dL/dW| of wide maps instead).
    """
    sums = probe.loss_pass.head_BH.values()
    return sum(float(sum_BH.abs().mean(dim=0).sum()) for sum_BH in sums)
