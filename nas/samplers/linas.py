"""LINAS: rounds of a predicted evolutionary search, started from scratch each time.

Letters: N candidates, G genes, M objectives (minimised), P columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from nas.samplers._codec import Codec, IntMatrix
from nas.samplers._level_sampler import FloatArray, LevelSampler, uniform_levels
from nas.samplers._linas_predictor import LinasPredictor, one_hot
from nas.samplers._ranking import best_rows
from nas.samplers.pymoo_adapter import Generations, integer_operators, reference_directions
from searchspace.errors import UserError

_UNUSED = np.random.default_rng(0)


class LinasSampler(LevelSampler):
    """Lightweight iterative search as published, for comparison.

    A population of random candidates is evaluated; then, every round, one predictor per objective
    (exact ones are predicted too) is refitted on everything evaluated, NSGA-II searches on the
    predictors from a random population, and its last population is evaluated. The published
    program evaluates members again that it knows; here they are skipped, which only helps it, and
    the round is filled up with the best new candidates that the search passed.

    Args:
        population_size: candidates per round, and the inner population.
        num_predicted: predicted evaluations per round.
        **options: see `LevelSampler`.

    Raises:
        UserError: for a round that is too small, or fewer predicted evaluations than that.

    Source: Cummings et al., "A Hardware-Aware System for Accelerating Deep Neural Network
        Optimization" (2022), section 3 and Algorithm 1, with the settings of its program DyNAS-T.
    """

    def __init__(
        self, population_size: int = 50, num_predicted: int = 10_000, **options: Any
    ) -> None:
        if population_size < 4 or num_predicted < population_size:
            raise UserError(
                f"population_size={population_size} and num_predicted={num_predicted} do not go "
                "together; choose at least 4, and at least one population predicted"
            )
        super().__init__(**options)
        self._sizes = (population_size, num_predicted)

    def _strategy(self, codec: Codec, signs: FloatArray) -> LinasRounds:
        return LinasRounds(codec, len(signs), *self._sizes)


class LinasRounds:
    """The strategy of `LinasSampler`."""

    def __init__(
        self, codec: Codec, num_objectives: int, population_size: int, num_predicted: int
    ) -> None:
        self._codec, self._num_objectives = codec, num_objectives
        self._size, self._num_generations = population_size, num_predicted // population_size

    def num_used(self, num_evaluated: int) -> int:
        """Predictors learn once per round."""
        return num_evaluated - num_evaluated % self._size

    def candidates(
        self, levels: IntMatrix, objectives: FloatArray, rng: np.random.Generator
    ) -> IntMatrix:
        """Return a round: random at first, then the last predicted population."""
        if len(levels) == 0:
            return uniform_levels(self._codec, self._size, rng)
        genes = self._codec.genes
        columns = one_hot(genes, levels)
        predictors = [LinasPredictor().fit(columns, target) for target in objectives.T]

        def predict(rows: IntMatrix) -> FloatArray:
            encoded = one_hot(genes, self._codec.canonical(rows))
            return np.stack([predictor.predict(encoded) for predictor in predictors], axis=1)

        passed, values, last = self._inner_search(predict, int(rng.integers(2**31)))
        known = {row.tobytes() for row in levels}
        chosen = self._codec.canonical(last)
        missing = self._size - len({row.tobytes() for row in chosen} - known)
        if missing > 0:
            new = np.array([row.tobytes() not in known for row in self._codec.canonical(passed)])
            chosen = np.vstack([chosen, passed[new][best_rows(values[new], 2 * self._size)]])
        return chosen

    def _inner_search(
        self, predict: Callable[[IntMatrix], FloatArray], seed: int
    ) -> tuple[IntMatrix, FloatArray, IntMatrix]:
        """Return everything that the inner search predicted, with values, and its last rows."""
        inner = Generations(self._inner_algorithm(), self._codec, self._num_objectives, seed)
        empty = np.empty((0, self._num_objectives))
        rows = inner.candidates(np.empty((0, len(self._codec.genes)), np.int64), empty, _UNUSED)
        passed, values = rows, predict(rows)
        for _ in range(self._num_generations - 1):
            rows = inner.candidates(passed, values, _UNUSED)
            if len(rows) == 0:
                break
            passed = np.vstack([passed, rows])
            values = np.vstack([values, predict(rows)])
        inner.candidates(passed, values, _UNUSED)
        return passed, values, inner.population()

    def _inner_algorithm(self) -> Any:
        operators = integer_operators(0.9, 15.0, 20.0, mutation_prob=0.02)
        if self._num_objectives <= 2:
            from pymoo.algorithms.moo.nsga2 import NSGA2

            return NSGA2(pop_size=self._size, eliminate_duplicates=True, **operators)
        from pymoo.algorithms.moo.unsga3 import UNSGA3

        operators = integer_operators(1.0, 30.0, 20.0, mutation_prob=0.02)
        directions = reference_directions(self._num_objectives, 20)
        return UNSGA3(directions, pop_size=self._size, eliminate_duplicates=True, **operators)
