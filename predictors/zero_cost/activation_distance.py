"""How many hidden units of the FFNs agree in sign on two tokens."""

from __future__ import annotations

from predictors.zero_cost.probe import Probe


def activation_distance(probe: Probe) -> float:
    """Return the sum over FFNs of all entries of ``K = x x^T + (1 - x)(1 - x)^T``.

    The rows of x are the tokens of one sequence (padding left out), its columns the hidden units
    of an FFN behind its nonlinearity (each of them in a stack), its entries 1 where the activation
    (of a gated FFN: the product) is positive. So K counts the units on which two tokens agree; its
    sum is ``sum_f p_f^2 + (n - p_f)^2`` with p_f of n tokens positive in unit f. The mean over
    sequences is taken, where the source looks at the first. Nothing is normalised, as in the
    source, and a network without FFNs has the least value, 0.

    Source: Mellor et al. 2021, "Neural Architecture Search without Training", equation 2; Serianni
    and Kalita 2023, "Training-free Neural Architecture Search for RNNs and Transformers", whose
    code has tokens in place of samples and the sum in place of the determinant.
    """
    return sum(probe.forward_pass.ffn_agreement.values())
