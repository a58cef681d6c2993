"""Training-free scores as a first guess of quality, for every candidate of a space.

A metric costs a forward and a backward pass, so only a pool of archs is scored. The aggregated
scores are then learned from the genes, and that cheap predictor gives the quality regressor one
more feature for hundreds of thousands of candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from nas.candidates import genes_of
from nas.progress import Reporter
from predictors.encodings import GeneEncoding
from predictors.models.prior_ridge import PriorRidge
from predictors.rank_aggregation import rank_aggregate
from searchspace.files import read_json, write_json
from searchspace.space import SearchSpace
from searchspace.space.canonical import Genotypes

Floats = NDArray[np.float64]


class TrainingFreeScore:
    """The rank-aggregated training-free score of any genotype, learned from a scored pool."""

    def __init__(self, space: SearchSpace, pool: Genotypes, scores: Floats) -> None:
        self._encoding = GeneEncoding(genes_of(space))
        regressor = PriorRidge(self._encoding.prior_scale, self._encoding.groups)
        self._regressor = regressor.fit(self._encoding.encode(pool), scores)

    def __call__(self, genotypes: Genotypes) -> Floats:
        """Return the predicted score of canonical genotypes (N, G), shape (N, 1)."""
        return self._regressor.predict_mean(self._encoding.encode(genotypes))[:, None]


def training_free_score(
    space: SearchSpace,
    names: Sequence[str],
    pool_size: int,
    batch: tuple[Tensor, Tensor],
    path: Path,
    *,
    seed: int,
    reporter: Reporter,
) -> TrainingFreeScore | None:
    """Score a pool of archs, or read the scores `path` already holds; None without metrics.

    Args:
        space: the search space.
        names: metrics, as in `predictors.zero_cost.METRICS`.
        pool_size: archs to score.
        batch: inputs and targets (B, T).
        path: JSON file of genotypes and scores.
        seed: of the pool and of the weights.
        reporter: shows the progress.

    Raises:
        UserError: for an unknown metric.
    """
    from predictors.zero_cost import get_metric, score_archs

    for name in names:
        get_metric(name)
    if not names or pool_size < 2:
        return None
    pool = space.sample_genotypes(np.random.default_rng([seed, 7]), pool_size)
    wanted = {"metrics": list(names), "pool": pool.tolist()}
    stored: dict[str, Any] = read_json(path, "metric scores") if path.exists() else {}
    if {key: stored.get(key) for key in wanted} != wanted:
        archs = [space.decode(row) for row in pool]
        with reporter.bar("training-free metrics") as bar:
            scores = score_archs(
                names, archs, batch, seed, lambda done, total: bar.update(done / total)
            )
        stored = {**wanted, "scores": {name: values.tolist() for name, values in scores.items()}}
        write_json(path, stored)
    values = {name: np.array(stored["scores"][name], dtype=np.float64) for name in names}
    return TrainingFreeScore(space, pool, rank_aggregate(values))
