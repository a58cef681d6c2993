"""MOEA/D: one scalar problem per weight vector, neighbours help each other.

Letters: N candidates, G genes, M objectives (minimised), K weight vectors.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from nas.samplers._codec import Codec, IntMatrix
from nas.samplers._design import row_keys
from nas.samplers._level_sampler import FloatArray
from nas.samplers.pymoo_adapter import (
    Generations,
    PymooSampler,
    integer_operators,
    reference_directions,
)
from searchspace.errors import UserError

_CHILDREN = 4


class MoeadSampler(PymooSampler):
    """pymoo's MOEA/D, steady-state: each result may replace the neighbours at once.

    pymoo's version proposes what it has evaluated already (it removes no duplicates); here such a
    proposal is skipped, which costs it no evaluation.

    Args:
        population_size: number of weight vectors.
        num_neighbors: size of a neighbourhood.
        **options: see `PymooSampler`.

    Raises:
        UserError: at the first proposal in a study of one objective.

    Source: Zhang and Li, "MOEA/D: A Multiobjective Evolutionary Algorithm Based on
        Decomposition" (2007), with the Chebyshev approach; penalty boundary intersection from
        three objectives on.
    """

    def __init__(self, population_size: int = 50, num_neighbors: int = 20, **options: Any) -> None:
        super().__init__(population_size, **options)
        self._num_neighbors = min(num_neighbors, population_size)

    def _algorithm(self, num_objectives: int) -> Any:
        if num_objectives < 2:
            raise UserError(
                "sampler 'moead' splits several objectives into weighted ones, but this study has "
                "one; choose regularized_evolution, predictor or tpe"
            )
        from pymoo.algorithms.moo.moead import ParallelMOEAD

        return ParallelMOEAD(
            reference_directions(num_objectives, self._population_size),
            n_neighbors=self._num_neighbors,
            n_offsprings=1,
            **integer_operators(1.0, 20.0, 20.0),
        )

    def _strategy(self, codec: Codec, signs: FloatArray) -> Decomposition:
        return Decomposition(self._algorithm(len(signs)), codec, len(signs), self._seed)


class Decomposition(Generations):
    """Asks for children one at a time and remembers whose child each is.

    Objectives are scaled by their range in the first population, because the weights compare them.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._parent: dict[bytes, int] = {}
        self._low, self._span = np.zeros(1), np.ones(1)

    def num_used(self, num_evaluated: int) -> int:
        """Return all, once there is a first population."""
        return num_evaluated if num_evaluated >= self._algorithm.pop_size else 0

    def _chunk_size(self) -> int:
        return 1 if self._told else int(self._algorithm.pop_size)

    def _ask(self) -> IntMatrix:
        if not self._told:
            return super()._ask()
        rows = []
        for _ in range(_CHILDREN):
            row = self._codec.canonical(super()._ask())
            self._parent[_key(row)] = int(self._algorithm.indices[0])
            rows.append(row)
        return np.vstack(rows)

    def _tell(self, levels: IntMatrix, objectives: FloatArray) -> None:
        if not self._told:
            self._low = objectives.min(axis=0)
            span = objectives.max(axis=0) - self._low
            self._span = np.where(span > 0, span, 1.0)
        unit = (objectives - self._low) / self._span
        if self._told:
            parent = self._parent.pop(_key(levels), None)
            self._algorithm.indices = [self._fitting(unit[0]) if parent is None else parent]
        super()._tell(levels, unit)

    def _fitting(self, unit: FloatArray) -> int:
        """Return the weight vector that a candidate of others serves best."""
        algorithm = self._algorithm
        ideal = np.minimum(algorithm.ideal, unit)
        population = algorithm.pop.get("F")
        gains = [
            algorithm.decomposition.do(
                F, weights=algorithm.ref_dirs, ideal_point=ideal, _type="one_to_one"
            )
            for F in (population, np.repeat(unit[None], len(population), axis=0))
        ]
        return int(np.argmax(np.ravel(gains[0]) - np.ravel(gains[1])))


def _key(levels: IntMatrix) -> bytes:
    return bytes(row_keys(levels)[0].tobytes())
