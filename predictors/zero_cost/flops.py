"""The other baseline: work."""

from __future__ import annotations

from predictors.zero_cost.probe import Probe
from searchspace.cost import arch_cost
from searchspace.cost import flops as spec_flops
from searchspace.specs import EndsSpec, SubBlockSpec


def flops(probe: Probe) -> float:
    """Return the FLOPs of the matrix products of one forward pass over one of the sequences."""
    inside = probe.num_tokens
    # The ends put a class token in front themselves.
    outside = inside - probe.arch.family.num_extra_tokens

    def cost(spec: SubBlockSpec) -> float:
        return float(spec_flops(spec, outside if isinstance(spec, EndsSpec) else inside))

    return arch_cost(probe.arch, cost)
