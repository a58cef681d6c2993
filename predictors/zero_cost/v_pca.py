"""How many directions the hidden units of the FFNs use."""

from __future__ import annotations

from predictors.zero_cost.probe import Probe


def v_pca(probe: Probe) -> float:
    """Return the sum over FFNs of the number of principal components that hold 99 % of variance.

    The components are those of what the FFN's first map returns (both maps of a gated one), tokens
    x hidden units, before the nonlinearity. At most `2 d_model` and 512 tokens spread over the
    batch are looked at, padding left out: there can be no more than `d_model` components. A network
    without FFNs has the least value, 0.

    Source: Wang 2025, "W-PCA Based Gradient-Free Proxy for Efficient Search of Lightweight
    Language Models", section on vanilla PCA (eta = 0.99). The number is a fraction here, see
    `num_components`.
    """
    return sum(probe.forward_pass.ffn_components.values())
