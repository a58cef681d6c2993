"""pymoo's algorithms as Optuna samplers, by ask and tell on levels.

Every gene is one integer variable, its level; crossover and mutation work on real numbers and are
rounded. Letters: N candidates, G genes, M objectives (minimised).
"""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from typing import Any

import numpy as np

from nas.samplers._codec import Codec, IntMatrix
from nas.samplers._level_sampler import FloatArray, LevelSampler
from searchspace.errors import UserError


class PymooSampler(LevelSampler):
    """Base of samplers that run an algorithm of pymoo.

    The algorithm is told the study's evaluated candidates, a population at a time, and asked for
    the next ones; what others evaluated counts as its own.

    Args:
        population_size: members of the population, and candidates per generation.
        **options: see `LevelSampler`.

    Raises:
        UserError: for a population below 4.
    """

    def __init__(self, population_size: int = 50, **options: Any) -> None:
        if population_size < 4:
            raise UserError(f"population_size={population_size} is too small; choose at least 4")
        super().__init__(**options)
        self._population_size = population_size

    @abstractmethod
    def _algorithm(self, num_objectives: int) -> Any:
        """Return a new algorithm of pymoo."""

    def _strategy(self, codec: Codec, signs: FloatArray) -> Generations:
        return Generations(self._algorithm(len(signs)), codec, len(signs), self._seed)


class Generations:
    """Asks and tells a generational algorithm.

    Args:
        algorithm: of pymoo, not set up yet.
        codec: the space.
        num_objectives: M.
        seed: of the algorithm.
    """

    def __init__(self, algorithm: Any, codec: Codec, num_objectives: int, seed: int) -> None:
        from pymoo.core.problem import Problem
        from pymoo.core.termination import NoTermination

        limits = np.array([gene.num_levels for gene in codec.genes])
        self._problem = Problem(
            n_var=len(limits), n_obj=num_objectives, xl=np.zeros(len(limits)), xu=limits - 1
        )
        self._codec, self._algorithm = codec, algorithm
        self._algorithm.setup(self._problem, termination=NoTermination(), seed=seed)
        self._told = 0

    def num_used(self, num_evaluated: int) -> int:
        """Only whole generations are told."""
        return num_evaluated - num_evaluated % int(self._algorithm.pop_size)

    def candidates(
        self, levels: IntMatrix, objectives: FloatArray, rng: np.random.Generator
    ) -> IntMatrix:
        """Tell what is new and ask for the next generation."""
        while self._told < len(levels):
            chunk = slice(self._told, self._told + self._chunk_size())
            self._tell(levels[chunk], objectives[chunk])
            self._told = min(chunk.stop, len(levels))
        return self._ask()

    def population(self) -> IntMatrix:
        """Return the members that are alive, shape (population, G)."""
        return _levels(self._algorithm.pop)

    def _chunk_size(self) -> int:
        return int(self._algorithm.pop_size)

    def _ask(self) -> IntMatrix:
        offspring = self._algorithm.ask()
        if offspring is None:
            return np.empty((0, self._problem.n_var), dtype=np.int64)
        return _levels(offspring)

    def _tell(self, levels: IntMatrix, objectives: FloatArray) -> None:
        from pymoo.core.evaluator import Evaluator
        from pymoo.core.population import Population
        from pymoo.problems.static import StaticProblem

        if self._told == 0:
            self._algorithm.ask()  # pymoo starts only when it is asked
        members = Population.new("X", levels.astype(np.float64))
        Evaluator().eval(StaticProblem(self._problem, F=objectives), members)
        with warnings.catch_warnings():
            # Objectives without any spread divide by zero when pymoo scales them.
            warnings.simplefilter("ignore", RuntimeWarning)
            self._algorithm.tell(infills=members)


def _levels(members: Any) -> IntMatrix:
    return np.rint(members.get("X").astype(np.float64)).astype(np.int64)


def integer_operators(
    crossover_prob: float, crossover_eta: float, mutation_eta: float, mutation_prob: float = 0.9
) -> dict[str, Any]:
    """Return pymoo's operators for integers: random start, SBX and polynomial mutation, rounded.

    Without the repair pymoo would truncate, and levels would drift down.

    Args:
        crossover_prob: share of the pairs that are crossed.
        crossover_eta: distribution index of simulated binary crossover.
        mutation_eta: distribution index of polynomial mutation.
        mutation_prob: share of the children that are mutated at all, each gene with 1 / G.

    Source: Deb and Agrawal, "Simulated binary crossover for continuous search space" (1995).
    """
    from pymoo.operators.crossover.sbx import SBX
    from pymoo.operators.mutation.pm import PM
    from pymoo.operators.repair.rounding import RoundingRepair
    from pymoo.operators.sampling.rnd import IntegerRandomSampling

    rounded: dict[str, Any] = {"vtype": float, "repair": RoundingRepair()}
    return {
        "sampling": IntegerRandomSampling(),
        "crossover": SBX(prob=crossover_prob, eta=crossover_eta, **rounded),
        "mutation": PM(prob=mutation_prob, eta=mutation_eta, **rounded),
    }


def reference_directions(num_objectives: int, count: int) -> FloatArray:
    """Return at most `count` weight vectors in even steps over the simplex, shape (K, M).

    Source: Das and Dennis, "Normal-Boundary Intersection" (1998).
    """
    if num_objectives == 1:
        return np.ones((count, 1))
    from pymoo.util.ref_dirs import get_reference_directions

    steps = 1
    while math.comb(num_objectives + steps, steps + 1) <= count:
        steps += 1
    return np.asarray(get_reference_directions("das-dennis", num_objectives, n_partitions=steps))
