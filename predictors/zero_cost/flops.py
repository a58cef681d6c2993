"""The other baseline: work."""

from __future__ import annotations

from predictors.zero_cost.probe import Probe
from searchspace.cost import arch_cost
from searchspace.cost import flops as spec_flops


def flops(probe: Probe) -> float:
    """Return the FLOPs of the matrix products of one forward pass over one of the sequences."""
    tokens = probe.inputs_BT.shape[1]
    return float(arch_cost(probe.arch, lambda spec: spec_flops(spec, tokens)))
