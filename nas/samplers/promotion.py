"""Successive promotion: a training-free score of many, predictors of some, evaluation of few.

Letters: N candidates, G genes, M objectives (minimised).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from nas.pareto import greedy_hypervolume_subset, non_dominated, normalise
from nas.samplers._codec import Codec, IntMatrix, VectorFunction
from nas.samplers._design import row_keys, tilted_levels, total_violation, unique_rows
from nas.samplers._level_sampler import FloatArray, LevelSampler
from nas.samplers._ranking import best_rows
from predictors.encodings import GeneEncoding
from predictors.models.prior_ridge import PriorRidge
from searchspace.errors import UserError


class PromotionSampler(LevelSampler):
    """Every round many candidates compete in three stages, each dearer than the one before.

    First all are judged by `score` in place of one objective, beside the exact objectives; the
    best fronts are promoted. Then regressors fitted on everything evaluated judge these, and the
    greatest gains in predicted hypervolume are evaluated. Before there is anything to learn from,
    the score decides alone, and unknown objectives are left to chance.

    Args:
        score: function from a list of parameter dictionaries to a cheap score of each, shape (n,),
            more is better, such as a training-free metric.
        score_objective: index of the objective that the score stands for.
        num_scored: candidates that are scored per round.
        num_promoted: how many of them the predictors judge.
        batch_size: how many of these are evaluated.
        **options: see `LevelSampler`.

    Raises:
        UserError: without a score, or for numbers that do not shrink from stage to stage.

    Source: the cascade of Abdelfattah et al., "Zero-Cost Proxies for Lightweight NAS" (2021),
        section 5 (warm-up and move proposal by a proxy), with a predictor as the middle stage.
    """

    def __init__(
        self,
        score: VectorFunction | None = None,
        *,
        score_objective: int = 0,
        num_scored: int = 2048,
        num_promoted: int = 256,
        batch_size: int = 8,
        **options: Any,
    ) -> None:
        if score is None:
            raise UserError(
                "sampler 'promotion' got no score; give score=FUNCTION, from a list of parameter "
                "dictionaries to one cheap number each (more is better), such as a training-free "
                "metric"
            )
        if not 1 <= batch_size <= num_promoted <= num_scored:
            raise UserError(
                f"num_scored={num_scored}, num_promoted={num_promoted}, batch_size={batch_size}: "
                "each stage must keep at least 1 and no more than the stage before"
            )
        super().__init__(**options)
        self._score, self._score_objective = score, score_objective
        self._stages = (num_scored, num_promoted, batch_size)

    def _strategy(self, codec: Codec, signs: FloatArray) -> Cascade:
        if not 0 <= self._score_objective < len(signs):
            raise UserError(
                f"score_objective={self._score_objective} is none of {len(signs)} objectives; "
                f"choose 0 to {len(signs) - 1}"
            )
        return Cascade(codec, signs, self._score, self._score_objective, self._stages)


class Cascade:
    """The strategy of `PromotionSampler`."""

    def __init__(
        self,
        codec: Codec,
        signs: FloatArray,
        score: VectorFunction,
        score_objective: int,
        stages: tuple[int, int, int],
    ) -> None:
        self._codec, self._signs, self._score = codec, signs, score
        self._score_objective, self._stages = score_objective, stages
        self._exact = list(codec.exact_indices)
        self._encoding = GeneEncoding(codec.genes)

    def num_used(self, num_evaluated: int) -> int:
        """Predictors learn once per batch."""
        return num_evaluated - num_evaluated % self._stages[2]

    def candidates(
        self, levels: IntMatrix, objectives: FloatArray, rng: np.random.Generator
    ) -> IntMatrix:
        """Return the batch that passed all stages, best first."""
        num_promoted, batch_size = self._stages[1:]
        pool = self._pool(levels, objectives, rng)
        regressors = self._regressors(levels, objectives)
        guess = self._predicted(regressors, pool, rng)
        first = guess.copy()
        if self._score_objective not in self._exact:
            first[:, self._score_objective] = -self._scores(pool)
        promoted = best_rows(first, num_promoted)[:num_promoted]
        judged = (guess if regressors else first)[promoted]
        everything = np.vstack([objectives, judged])
        front = everything[non_dominated(everything)]
        low, high = front.min(axis=0), front.max(axis=0)
        gaining = greedy_hypervolume_subset(
            normalise(objectives, low, high) if len(objectives) else objectives,
            normalise(judged, low, high),
            np.full(len(low), 1.1),
            batch_size,
        )
        rest = [row for row in best_rows(judged, 2 * batch_size) if row not in gaining]
        return np.asarray(pool[promoted[[*gaining, *rest]]])

    def _pool(
        self, levels: IntMatrix, objectives: FloatArray, rng: np.random.Generator
    ) -> IntMatrix:
        """Draw new feasible candidates: spread ones, and children of the front."""
        genes, count = self._codec.genes, self._stages[0]
        drawn = tilted_levels(genes, count, rng)
        if len(levels):
            front = levels[non_dominated(objectives)]
            a, b = (front[rng.integers(0, len(front), count // 2)] for _ in range(2))
            children = np.where(rng.random(a.shape) < 0.5, a, b)
            mutate = rng.random(a.shape) < 2.0 / len(genes)
            drawn[: count // 2] = np.where(mutate, drawn[: count // 2], children)
        pool = unique_rows(self._codec.canonical(drawn))
        known = {key.tobytes() for key in row_keys(levels)}
        keep = np.array([key.tobytes() not in known for key in row_keys(pool)], dtype=bool)
        keep &= total_violation(self._codec, pool) <= 0
        return np.asarray(pool[keep] if keep.any() else pool)

    def _regressors(self, levels: IntMatrix, objectives: FloatArray) -> dict[int, PriorRidge]:
        if len(levels) < 2:
            return {}
        columns = self._encoding.encode(levels)
        prior, groups = self._encoding.prior_scale, self._encoding.groups
        return {
            m: PriorRidge(prior, groups).fit(columns, objectives[:, m])
            for m in range(len(self._signs))
            if m not in self._exact
        }

    def _predicted(
        self, regressors: dict[int, PriorRidge], pool: IntMatrix, rng: np.random.Generator
    ) -> FloatArray:
        """Return exact, predicted or, where nothing is known, random objectives, (N, M)."""
        values = rng.random((len(pool), len(self._signs)))
        if self._exact:
            values[:, self._exact] = self._codec.exact_objectives(pool) * self._signs[self._exact]
        if regressors:
            columns = self._encoding.encode(pool)
            for m, regressor in regressors.items():
                values[:, m] = regressor.predict_mean(columns)
        return values

    def _scores(self, pool: IntMatrix) -> FloatArray:
        scores = np.asarray(self._score(self._codec.to_params(pool)), dtype=np.float64)
        if scores.size != len(pool):
            raise UserError(
                f"score returned shape {scores.shape} for {len(pool)} candidates; return one "
                "number per candidate"
            )
        return np.nan_to_num(scores.reshape(-1), nan=-np.inf)
