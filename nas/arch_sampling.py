"""Which archs a training step trains. To add a strategy: a function here, a line in the registry.

A strategy is set up once per training and then gives the archs of every step from that step's
generator alone, so training that was interrupted goes on with the same archs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from searchspace.errors import UserError, unknown

if TYPE_CHECKING:
    from searchspace.arch import Arch
    from searchspace.space import SearchSpace

LARGEST, SMALLEST, RANDOM = "largest", "smallest", "random"
NUM_BINS = 20
POOL = 128
"""Genotypes that `by_size` draws per step to choose from."""


@dataclass(frozen=True)
class StepArch:
    """One arch of a step.

    Args:
        role: name of its loss in the log. The arch whose role is `LARGEST` comes first and teaches
            the others of its step.
        arch: what is trained.
        weight: of its loss in the sum over the step.
    """

    role: str
    arch: Arch
    weight: float = 1.0


StepArchs = Callable[[np.random.Generator], list[StepArch]]
"""Draws the archs of one step."""


def sandwich(space: SearchSpace, num_random: int) -> StepArchs:
    """Train the largest, the smallest and random archs.

    Source: Yu et al. 2020, "BigNAS", section 3.1 (sandwich rule).
    """
    anchors = [StepArch(LARGEST, space.largest()), StepArch(SMALLEST, space.smallest())]
    randoms = uniform(space, num_random) if num_random else None
    return lambda rng: anchors + (randoms(rng) if randoms else [])


def fair(space: SearchSpace, num_random: int) -> StepArchs:
    """Train random archs that use every operator equally often.

    In each slot the mixers (and the FFN kinds) of a step's archs are drawn without replacement,
    all alike, as long as they last; other genes are spread as in `uniform`. For spaces with many
    operators: there the other strategies, which keep to the first choice more often, train the
    rest too little to rank them.

    Source: Chu, Zhang and Xu 2021, "FairNAS", section 3.2 (strict fairness).
    """
    _require_random("fair", num_random)

    def draw(rng: np.random.Generator) -> list[StepArch]:
        genotypes = space.sample_genotypes(rng, num_random)
        for name, choices in space.genes.items():
            if name.endswith((".mixer", ".ffn")):
                rounds = -(-num_random // len(choices))
                drawn = np.concatenate([rng.permutation(len(choices)) for _ in range(rounds)])
                genotypes[:, space.columns[name]] = drawn[:num_random]
        return [StepArch(RANDOM, space.decode(row)) for row in genotypes]

    return draw


def uniform(space: SearchSpace, num_random: int) -> StepArchs:
    """Train random archs only.

    Source: Guo et al. 2020, "Single Path One-Shot NAS with Uniform Sampling", section 3.2.
    """
    _require_random("uniform", num_random)
    return lambda rng: [StepArch(RANDOM, space.sample(rng)) for _ in range(num_random)]


def matformer(space: SearchSpace, num_random: int) -> StepArchs:
    """Train the same layers with each FFN width of the space, all in every step.

    The loss of a step is the mean over the widths, each with weight 1/g; nothing is drawn.

    Source: Devvrit et al. 2023, "MatFormer", section 3.2 (joint optimisation over the g
    granularities).
    """
    largest, *narrower = sorted(space.intermediate_size, reverse=True)
    share = 1.0 / len(space.intermediate_size)
    archs = [StepArch(LARGEST, space.uniform(intermediate_size=largest), share)]
    for width in narrower:
        archs.append(StepArch(f"ffn_{width}", space.uniform(intermediate_size=width), share))
    return lambda rng: archs


def by_size(space: SearchSpace, num_random: int) -> StepArchs:
    """Train random archs whose parameter counts are spread evenly over the space's range.

    Every arch first draws one of `NUM_BINS` equal bins of the parameter count, then an arch in it:
    random genotypes alone are many near the middle and few near the ends.
    """
    from searchspace.cost import CostTable, num_params

    _require_random("by_size", num_random)
    table = CostTable(space, num_params)
    ends = np.stack([space.encode(space.smallest()), space.encode(space.largest())])
    low, high = table.of(ends)

    def draw(rng: np.random.Generator) -> list[StepArch]:
        # The two ends stand in where the pool has nothing near them.
        pool = np.concatenate([space.sample_genotypes(rng, POOL), ends])
        position = (table.of(pool) - low) / max(high - low, 1.0) * NUM_BINS
        bins = np.clip(position, 0, NUM_BINS - 1).astype(int)
        archs = []
        for wanted in rng.integers(NUM_BINS, size=num_random):
            distance = np.abs(bins - wanted)
            nearest = np.flatnonzero(distance == distance.min())
            archs.append(StepArch(RANDOM, space.decode(pool[rng.choice(nearest)])))
        return archs

    return draw


ARCH_SAMPLINGS: dict[str, Callable[[SearchSpace, int], StepArchs]] = {
    "sandwich": sandwich,
    "fair": fair,
    "uniform": uniform,
    "matformer": matformer,
    "by_size": by_size,
}
"""Every strategy by name: given a space and a number of random archs, it gives `StepArchs`."""


class ArchSampler:
    """The archs of every step of a training.

    Args:
        sampling: a name in `ARCH_SAMPLINGS`.
        space: the search space.
        num_random: random archs per step.
        seed: of the training.

    Raises:
        UserError: for an unknown name, or a strategy that needs at least one random arch.
    """

    def __init__(self, sampling: str, space: SearchSpace, num_random: int, seed: int) -> None:
        if sampling not in ARCH_SAMPLINGS:
            raise unknown("train.sampling", sampling, ARCH_SAMPLINGS)
        self._draw = ARCH_SAMPLINGS[sampling](space, num_random)
        self._seed = seed

    def archs(self, step: int) -> list[StepArch]:
        """Return the archs of a step; the same for the same seed and step."""
        return self._draw(np.random.default_rng([self._seed, step]))


def _require_random(sampling: str, num_random: int) -> None:
    if num_random < 1:
        raise UserError(
            f"train.sampling={sampling!r} trains random archs only, but train.num_random="
            f"{num_random}; choose at least 1"
        )
