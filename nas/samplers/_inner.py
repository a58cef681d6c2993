"""Search on the predictors: an evolving archive of predicted fronts, then a batch chosen from it.

Letters: N candidates, G genes, D posterior draws, M objectives (minimised).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nas.pareto import greedy_hypervolume_subset, non_dominated, normalise
from nas.samplers._codec import IntMatrix
from nas.samplers._design import distinct_rows, row_keys
from nas.samplers._model import Surrogate
from predictors.encodings import Gene

FloatArray = NDArray[np.float64]

_CHUNK = 1500
_MANY_LEVELS = 12
_LEAST_KEPT = 64
_MOST_KEPT = {2: 1500, 3: 400, 4: 400}
_FEWEST_BOXES = 8


@dataclass
class Pool:
    """Distinct candidates with predictions.

    Attributes:
        levels: shape (N, G).
        values: predictions, shape (1 + D, N, M).
        num_scored: how many candidates were scored in all, repeats included.
    """

    levels: IntMatrix
    values: FloatArray
    num_scored: int = 0

    def merge(self, levels: IntMatrix, values: FloatArray, scored: int) -> None:
        """Add candidates and keep what is on the front of the mean or of a draw."""
        self.num_scored += scored
        self.levels = np.vstack([self.levels, levels])
        self.values = np.concatenate([self.values, values], axis=1)
        self._keep(distinct_rows(self.levels))
        keep = np.zeros(len(self.levels), dtype=bool)
        for sheet in self.values:
            keep[_best_of(sheet)] = True
        self._keep(np.flatnonzero(keep))

    def _keep(self, rows: NDArray[np.int64]) -> None:
        self.levels, self.values = self.levels[rows], self.values[:, rows]


def search(surrogate: Surrogate, starts: IntMatrix, budget: int, rng: np.random.Generator) -> Pool:
    """Optimise the predictors and return the candidates on any predicted front.

    The whole front is the population: with exact arithmetic at a microsecond a candidate, an
    archive that forgets good points to stay small is what limits the search, not the operators.

    Args:
        surrogate: fitted predictors.
        starts: good and varied candidates to start from, shape (N, G).
        budget: how many candidates to score.
        rng: generator.

    Source: Laumanns et al., "Combining convergence and diversity in evolutionary multiobjective
        optimization" (2002), for archives that neither shrink nor wander.
    """
    pool = Pool(starts[:0], np.empty((1 + surrogate.num_draws, 0, len(surrogate.signs))))
    _score(surrogate, starts, pool)
    while pool.num_scored < budget and len(pool.levels):
        _score(surrogate, _children(surrogate, pool, _CHUNK, rng), pool)
    return pool


def choose_batch(
    pool: Pool,
    front: FloatArray,
    batch_size: int,
    known: set[bytes],
    rng: np.random.Generator,
) -> IntMatrix:
    """Pick a batch by greedy predicted hypervolume gain; where none is left, by a lucky draw.

    Args:
        pool: scored candidates.
        front: evaluated and pending objective values, shape (K, M).
        batch_size: how many to pick.
        known: keys of candidates not to propose again.
        rng: generator.
    """
    fresh = np.array([key.tobytes() not in known for key in row_keys(pool.levels)], dtype=bool)
    levels, values = pool.levels[fresh], pool.values[:, fresh]
    if len(levels) == 0:
        return np.asarray(levels)
    ideal, nadir = _scale(np.vstack([front, values[0][non_dominated(values[0])]]))
    units = np.stack([normalise(sheet, ideal, nadir) for sheet in values])
    have = normalise(front, ideal, nadir) if len(front) else np.empty((0, values.shape[2]))
    reference = np.full(values.shape[2], 1.1)
    picked: list[int] = []
    for _ in range(min(batch_size, len(levels))):
        row = _best_gain(have, units[0], picked, reference)
        if row is None:
            row = _most_promising(have, units, picked, rng)
        picked.append(row)
    return np.asarray(levels[picked])


def _best_gain(
    have: FloatArray, unit: FloatArray, picked: list[int], reference: FloatArray
) -> int | None:
    candidates = unit.copy()
    candidates[picked] = np.nan
    existing = np.vstack([have, unit[picked]])
    rows = np.flatnonzero(non_dominated(candidates))
    best = greedy_hypervolume_subset(existing, candidates[rows], reference, 1)
    return int(rows[best[0]]) if best else None


def _most_promising(
    have: FloatArray, units: FloatArray, picked: list[int], rng: np.random.Generator
) -> int:
    """When nothing promises a gain: the candidate whose luckiest draw is furthest ahead."""
    lucky = units.min(axis=0)
    lead = np.full(len(lucky), np.inf)
    if len(have):
        front = have[non_dominated(have)]
        lead = np.max(front[None] - lucky[:, None], axis=2).min(axis=1)
    lead = lead + 1e-9 * rng.random(len(lead))
    lead[picked] = -np.inf
    return int(np.argmax(lead))


def _score(surrogate: Surrogate, levels: IntMatrix, pool: Pool) -> None:
    """Predict the feasible ones into the pool."""
    feasible = levels[surrogate.violation(levels) <= 0]
    values = surrogate.predict(feasible) if len(feasible) else pool.values[:, :0]
    pool.merge(feasible, values, len(levels))


def _children(surrogate: Surrogate, pool: Pool, count: int, rng: np.random.Generator) -> IntMatrix:
    """Cross neighbours along a front, uniformly or at one point, and change a few genes."""
    num_genes = pool.levels.shape[1]
    sheet, objective = rng.integers(0, [len(pool.values), pool.values.shape[2]])
    parents = pool.levels[np.argsort(pool.values[sheet, :, objective], kind="stable")]
    reach = max(1, len(parents) // 8)
    first = rng.integers(0, len(parents), count)
    away = rng.integers(1, reach + 1, count) * rng.choice([-1, 1], count)
    a, b = parents[first], parents[np.clip(first + away, 0, len(parents) - 1)]
    uniform = rng.random((count, num_genes)) < 0.5
    one_point = np.arange(num_genes) < rng.integers(0, num_genes + 1, (count, 1))
    from_a = np.where(rng.random((count, 1)) < 0.5, uniform, one_point)
    from_a |= rng.random((count, 1)) < 0.3
    children = np.where(from_a, a, b)
    rate = rng.choice([0.5, 1.0, 2.0, 4.0], (count, 1)) / num_genes
    changed = rng.random((count, num_genes)) < rate
    fresh = _changed(surrogate.codec.genes, children, rng)
    return surrogate.codec.canonical(np.where(changed, fresh, children))


def _changed(genes: Sequence[Gene], levels: IntMatrix, rng: np.random.Generator) -> IntMatrix:
    """Another level for every gene: any, or for half the rows a neighbour where there is order."""
    limits = np.array([gene.num_levels for gene in genes])
    ordered = np.array([gene.numeric_values is not None for gene in genes])
    anywhere = (rng.random(levels.shape) * limits).astype(np.int64)
    step = np.clip(levels + rng.choice([-1, 1], levels.shape), 0, limits - 1)
    out = np.where(ordered & (rng.random((len(levels), 1)) < 0.5), step, anywhere)
    for column in np.flatnonzero(limits > _MANY_LEVELS):
        near = rng.random(len(levels)) < 0.7
        out[near, column] = _moved(levels[near, column], int(limits[column]), rng)
    return np.asarray(out)


def _moved(levels: IntMatrix, num_levels: int, rng: np.random.Generator) -> IntMatrix:
    """Move levels by distances spread over all orders of magnitude, both ways."""
    distance = np.exp(rng.uniform(0.0, np.log(num_levels / 2), len(levels)))
    moved = levels + np.rint(distance * rng.choice([-1, 1], len(levels)))
    return np.asarray(np.clip(moved, 0, num_levels - 1), dtype=np.int64)


def _best_of(values: FloatArray) -> NDArray[np.int64]:
    """Rows worth keeping of one sheet: its front, and where that is small the next ones."""
    if values.shape[1] == 1:
        return np.argsort(values[:, 0], kind="stable")[:_LEAST_KEPT]
    kept = np.flatnonzero(non_dominated(values))
    most = _MOST_KEPT[min(values.shape[1], 4)]
    if len(kept) > most:
        return _thinned(values, kept, most)
    rest = np.setdiff1d(np.arange(len(values)), kept)
    while len(kept) < min(_LEAST_KEPT, len(values)):
        layer = rest[non_dominated(values[rest])]
        if len(layer) == 0:
            break
        kept = np.concatenate([kept, layer[: _LEAST_KEPT - len(kept)]])
        rest = np.setdiff1d(rest, layer)
    return kept


def _thinned(values: FloatArray, rows: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """One point per box of a grid over the front, the nearest to its lower corner."""
    front = values[rows]
    unit = normalise(front, front.min(axis=0), front.max(axis=0))
    per_side = float(most)
    while True:
        boxes = np.floor(unit * per_side).astype(np.int64)
        order = np.argsort((unit * per_side - boxes).sum(axis=1), kind="stable")
        first = order[distinct_rows(boxes[order])]
        if len(first) <= most or per_side <= _FEWEST_BOXES:
            ends = unit.argmin(axis=0)
            return rows[np.union1d(first, ends)]
        per_side *= 0.8


def _scale(values: FloatArray) -> tuple[FloatArray, FloatArray]:
    front = values[non_dominated(values)]
    return front.min(axis=0), front.max(axis=0)
