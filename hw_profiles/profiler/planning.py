"""What to measure first: the sub-blocks that random archs are made of most often."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from searchspace.space import SearchSpace
from searchspace.specs import FFNSpec, SubBlockSpec

SAMPLED_ARCHS = 1024


def by_information(
    space: SearchSpace, specs: Sequence[SubBlockSpec], seed: int
) -> list[SubBlockSpec]:
    """Return sub-blocks with the most informative first.

    What nothing can be interpolated from comes before inner FFN widths; within both, what more
    random archs contain comes first.
    """
    rng = np.random.default_rng(seed)
    counts: Counter[SubBlockSpec] = Counter()
    for row in space.sample_genotypes(rng, SAMPLED_ARCHS):
        counts.update(space.decode(row).sub_blocks())
    essential = set(without_inner_widths(specs))
    order = rng.permutation(len(specs)).tolist()
    ranked = sorted(range(len(specs)), key=lambda i: (-counts[specs[i]], order[i]))
    return sorted((specs[i] for i in ranked), key=lambda spec: spec not in essential)


def without_inner_widths(specs: Sequence[SubBlockSpec]) -> list[SubBlockSpec]:
    """Keep the smallest, the middle and the largest width of FFNs that are otherwise equal."""
    widths: dict[object, list[int]] = {}
    for spec in specs:
        if isinstance(spec, FFNSpec):
            widths.setdefault(_family(spec), []).append(spec.intermediate_size)
    keep = {family: {min(w), sorted(w)[len(w) // 2], max(w)} for family, w in widths.items()}
    return [
        spec
        for spec in specs
        if not isinstance(spec, FFNSpec) or spec.intermediate_size in keep[_family(spec)]
    ]


def _family(spec: FFNSpec) -> object:
    return replace(spec, intermediate_size=0)
