"""Regularised evolution: tournaments in a population whose oldest member dies.

Letters: N candidates, G genes, M objectives (minimised), S sampled members.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from nas.samplers._codec import Codec, IntMatrix
from nas.samplers._level_sampler import FloatArray, LevelSampler, uniform_levels
from nas.samplers._ranking import crowding, front_ranks
from searchspace.errors import UserError

_CHILDREN = 8


class RegularizedEvolutionSampler(LevelSampler):
    """Aging evolution for one or more objectives.

    The population is the latest `population_size` evaluated candidates: who is older is dead,
    however good. A tournament draws `sample_size` members; the one of the lowest non-dominated
    rank within the population wins, between equals the one with more room around it (crowding
    distance), so that with one objective it is the published tournament. The winner's child
    differs in one gene.

    Args:
        population_size: members that are alive, and random candidates at the start.
        sample_size: members per tournament; None takes a quarter of the population, as published.
        **options: see `LevelSampler`.

    Raises:
        UserError: for a tournament that is empty or larger than the population.

    Source: Real et al., "Regularized Evolution for Image Classifier Architecture Search" (2019),
        Algorithm 1; Deb et al., "NSGA-II" (2002), section III, for rank and crowding.
    """

    def __init__(
        self, population_size: int = 50, sample_size: int | None = None, **options: Any
    ) -> None:
        sample_size = max(1, population_size // 4) if sample_size is None else sample_size
        if not 1 <= sample_size <= population_size:
            raise UserError(
                f"sample_size={sample_size} does not fit population_size={population_size}; "
                "choose 1 to population_size"
            )
        super().__init__(**options)
        self._sizes = (population_size, sample_size)

    def _strategy(self, codec: Codec, signs: FloatArray) -> Aging:
        return Aging(codec, *self._sizes)


class Aging:
    """The strategy of `RegularizedEvolutionSampler`."""

    def __init__(self, codec: Codec, population_size: int, sample_size: int) -> None:
        self._codec, self._size, self._sample_size = codec, population_size, sample_size

    def num_used(self, num_evaluated: int) -> int:
        """Every evaluation counts at once."""
        return num_evaluated

    def candidates(
        self, levels: IntMatrix, objectives: FloatArray, rng: np.random.Generator
    ) -> IntMatrix:
        """Return children of tournament winners, or random ones while the population grows."""
        if len(levels) < self._size:
            return uniform_levels(self._codec, _CHILDREN, rng)
        alive, values = levels[-self._size :], objectives[-self._size :]
        ranks = front_ranks(values)
        order = np.lexsort((-crowding(values, ranks), ranks))
        place = np.empty(len(order), dtype=np.int64)
        place[order] = np.arange(len(order))
        sampled = np.array(
            [rng.choice(self._size, self._sample_size, replace=False) for _ in range(_CHILDREN)]
        )
        parents = sampled[np.arange(_CHILDREN), place[sampled].argmin(axis=1)]
        return self._mutated(alive[parents], rng)

    def _mutated(self, parents: IntMatrix, rng: np.random.Generator) -> IntMatrix:
        """Change one gene per row that changes the canonical candidate, where one is found."""
        limits = np.array([gene.num_levels for gene in self._codec.genes])
        free = np.flatnonzero(limits > 1)
        children = parents.copy()
        same = np.ones(len(parents), dtype=bool)
        for _ in range(16):
            rows = np.flatnonzero(same)
            if len(rows) == 0 or len(free) == 0:
                break
            genes = rng.choice(free, len(rows))
            tried = parents[rows].copy()
            shift = rng.integers(1, limits[genes])
            tried[np.arange(len(rows)), genes] += shift
            tried[np.arange(len(rows)), genes] %= limits[genes]
            children[rows] = self._codec.canonical(tried)
            same = (children == parents).all(axis=1)
        return children
