"""AGE-MOEA: evolution that estimates the shape of the front it selects on."""

from __future__ import annotations

from typing import Any

import numpy as np

from nas.samplers._age_survival import survival_scores
from nas.samplers.pymoo_adapter import PymooSampler, integer_operators


class AgeMoeaSampler(PymooSampler):
    """AGE-MOEA on pymoo's generational loop, with the operators of pymoo's own version.

    Args:
        population_size: members of the population, and candidates per generation.
        **options: see `PymooSampler`.

    Source: Panichella, "An Adaptive Evolutionary Algorithm based on Non-Euclidean Geometry for
        Many-objective Optimization" (GECCO 2019).
    """

    def _algorithm(self, num_objectives: int) -> Any:
        from pymoo.algorithms.base.genetic import GeneticAlgorithm
        from pymoo.algorithms.moo.nsga2 import binary_tournament
        from pymoo.operators.selection.tournament import TournamentSelection

        algorithm = GeneticAlgorithm(
            pop_size=self._population_size,
            selection=TournamentSelection(func_comp=binary_tournament),
            survival=_AgeSurvival(),
            eliminate_duplicates=True,
            advance_after_initial_infill=True,
            **integer_operators(0.9, 15.0, 20.0),
        )
        algorithm.tournament_type = "comp_by_rank_and_crowding"
        return algorithm


class _AgeSurvival:
    """What pymoo calls to choose who lives: the best by rank, then by survival score."""

    def do(self, problem: Any, pop: Any, *_: Any, n_survive: int | None = None, **__: Any) -> Any:
        ranks, scores = survival_scores(pop.get("F").astype(np.float64))
        pop.set("rank", ranks)
        pop.set("crowding", scores)
        return pop[np.lexsort((-scores, ranks))[:n_survive]]
