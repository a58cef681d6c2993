"""Directions that the FFNs use, weighed by size."""

from __future__ import annotations

from predictors.zero_cost.params import params
from predictors.zero_cost.probe import Probe
from predictors.zero_cost.v_pca import v_pca


def w_pca(probe: Probe) -> float:
    """Return `v_pca` times the number of parameters.

    Source: Wang 2025, "W-PCA Based Gradient-Free Proxy for Efficient Search of Lightweight
    Language Models", section on weight-weighted PCA.
    """
    return v_pca(probe) * params(probe)
