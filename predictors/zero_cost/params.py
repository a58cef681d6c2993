"""The baseline every other metric has to beat: size."""

from __future__ import annotations

from predictors.zero_cost.probe import Probe
from searchspace.cost import arch_cost, num_params


def params(probe: Probe) -> float:
    """Return the number of parameters, embedding and head included."""
    return float(arch_cost(probe.arch, num_params))
