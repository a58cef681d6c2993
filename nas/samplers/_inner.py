"""Search on the predictors: scalarised coordinate descent, then evolution, then a batch.

Letters: N candidates, G genes, D posterior draws, M objectives (minimised).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nas.pareto import greedy_hypervolume_subset, non_dominated, normalise
from nas.samplers._codec import IntMatrix
from nas.samplers._design import row_keys
from nas.samplers._model import Surrogate

FloatArray = NDArray[np.float64]

_CHUNK = 1500
_MAX_ALTERNATIVES = 12
_SWEEP_SHARE = 0.5
_MAX_FRONT = 160


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
        _, first = np.unique(row_keys(self.levels), return_index=True)
        first.sort()
        keep = np.zeros(len(first), dtype=bool)
        values = self.values[:, first]
        for sheet in values:
            keep |= _thinned_front(sheet)
        self.levels, self.values = self.levels[first[keep]], values[:, keep]


def search(
    surrogate: Surrogate,
    starts: IntMatrix,
    budget: int,
    rng: np.random.Generator,
    num_weights: int = 12,
) -> Pool:
    """Optimise the predictors and return the candidates on any predicted front.

    Args:
        surrogate: fitted predictors.
        starts: good and varied candidates to start from, shape (N, G).
        budget: how many candidates to score.
        rng: generator.
        num_weights: scalarisation directions per predicted function.
    """
    pool = _score(surrogate, starts)
    if pool is None:
        return Pool(starts[:0], np.empty((1, 0, len(surrogate.signs))))
    swept = _coordinate_descent(surrogate, pool, int(budget * _SWEEP_SHARE), rng, num_weights)
    while swept.num_scored < budget:
        children = _children(surrogate, swept.levels, _CHUNK, rng)
        scored = _score(surrogate, children)
        if scored is None:
            swept.num_scored += len(children)
            continue
        swept.merge(scored.levels, scored.values, len(children))
    return swept


def choose_batch(
    pool: Pool,
    front: FloatArray,
    batch_size: int,
    known: set[bytes],
    rng: np.random.Generator,
) -> IntMatrix:
    """Pick a batch by greedy predicted hypervolume gain, every second pick from a draw.

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
    for turn in range(min(batch_size, len(levels))):
        sheet = 0 if turn % 2 == 0 or len(units) == 1 else 1 + (turn // 2) % (len(units) - 1)
        row = _best_gain(have, units[sheet], picked, reference)
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


def _score(surrogate: Surrogate, levels: IntMatrix) -> Pool | None:
    """Predict the feasible ones; None if there is none."""
    feasible = levels[surrogate.violation(levels) <= 0]
    if len(feasible) == 0:
        return None
    return Pool(feasible, surrogate.predict(feasible), len(levels))


def _coordinate_descent(
    surrogate: Surrogate, pool: Pool, budget: int, rng: np.random.Generator, num_weights: int
) -> Pool:
    """Improve one incumbent per (predicted function, weight vector), gene by gene.

    Source: Steuer and Choo (1983), the augmented Chebyshev scalarisation.
    """
    num_sheets, _, num_objectives = pool.values.shape
    num_weights = 1 if num_objectives == 1 else num_weights
    ideal, nadir = _scale(pool.values[0][non_dominated(pool.values[0])])
    # A utopia point a little beyond the ideal keeps the ends of the front apart.
    utopia = ideal - 0.05 * np.where(nadir > ideal, nadir - ideal, 1.0)
    weights = _weights(num_weights * num_sheets, num_objectives, rng)
    sheet = np.repeat(np.arange(num_sheets), num_weights)
    owner = np.arange(len(sheet))

    def cost(values: FloatArray, of: NDArray[np.int64]) -> FloatArray:
        """Scalar cost of candidates: values (1 + D, N, M), `of` their incumbent, shape (N,)."""
        unit = normalise(values[sheet[of], np.arange(len(of))], utopia, nadir)
        weighted = weights[of] * unit
        return np.asarray(weighted.max(axis=1) + 0.1 * weighted.sum(axis=1))

    start = np.array([np.argmin(cost(pool.values, np.full(len(pool.levels), o))) for o in owner])
    best_levels = pool.levels[start].copy()
    best_cost = np.array(
        [cost(pool.values[:, [s]], np.array([o]))[0] for o, s in zip(owner, start, strict=True)]
    )
    spent = 0
    result = Pool(pool.levels, pool.values)
    result.merge(pool.levels[:0], pool.values[:, :0], pool.num_scored)
    improved = True
    while improved and spent < budget:
        improved = False
        for gene in rng.permutation(len(surrogate.codec.genes)):
            children, of = _alternatives(surrogate, best_levels, int(gene), rng)
            if len(children) == 0 or spent >= budget:
                continue
            spent += len(children)
            feasible = surrogate.violation(children) <= 0
            children, of = children[feasible], of[feasible]
            if len(children) == 0:
                continue
            values = surrogate.predict(children)
            costs = cost(values, of)
            for row in np.argsort(-costs):
                incumbent = of[row]
                if costs[row] < best_cost[incumbent] - 1e-9:
                    best_cost[incumbent] = costs[row]
                    best_levels[incumbent] = children[row]
                    improved = True
    final = _score(surrogate, best_levels)
    if final is not None:
        result.merge(final.levels, final.values, 0)
    result.num_scored += spent
    return result


def _alternatives(
    surrogate: Surrogate, incumbents: IntMatrix, gene: int, rng: np.random.Generator
) -> tuple[IntMatrix, NDArray[np.int64]]:
    """Every incumbent with every other level of one gene (a sample when there are many)."""
    num_levels = surrogate.codec.genes[gene].num_levels
    count = len(incumbents)
    if num_levels <= _MAX_ALTERNATIVES:
        shift = np.tile(np.arange(1, num_levels), count)
        owner = np.repeat(np.arange(count), num_levels - 1)
        options = (incumbents[owner, gene] + shift) % num_levels
    else:
        owner = np.repeat(np.arange(count), 6)
        options = _moved(incumbents[owner, gene], num_levels, rng)
    children = incumbents[owner].copy()
    children[:, gene] = options
    children = surrogate.codec.canonical(children)
    changed = (children != incumbents[owner]).any(axis=1)
    return children[changed], owner[changed]


def _moved(levels: IntMatrix, num_levels: int, rng: np.random.Generator) -> IntMatrix:
    """Move levels by distances spread over all orders of magnitude, both ways."""
    distance = np.exp(rng.uniform(0.0, np.log(num_levels / 2), len(levels)))
    moved = levels + np.rint(distance * rng.choice([-1, 1], len(levels)))
    return np.asarray(np.clip(moved, 0, num_levels - 1), dtype=np.int64)


def _children(
    surrogate: Surrogate, parents: IntMatrix, count: int, rng: np.random.Generator
) -> IntMatrix:
    """Uniform or one-point crossover of neighbours, then one to three changed genes."""
    genes = surrogate.codec.genes
    num_genes = len(genes)
    a = parents[rng.integers(0, len(parents), count)]
    b = parents[rng.integers(0, len(parents), count)]
    uniform = rng.random((count, num_genes)) < 0.5
    one_point = np.arange(num_genes) < rng.integers(0, num_genes + 1, (count, 1))
    mixing = np.where(rng.random((count, 1)) < 0.5, uniform, one_point)
    mixing |= rng.random((count, 1)) < 0.4
    children = np.where(mixing, a, b)
    rate = rng.choice([1.0, 2.0, 4.0], (count, 1)) / num_genes
    mutate = rng.random((count, num_genes)) < rate
    limits = np.array([gene.num_levels for gene in genes])
    fresh = (rng.random((count, num_genes)) * limits).astype(np.int64)
    for column in np.flatnonzero(limits > _MAX_ALTERNATIVES):
        local = _moved(children[:, column], int(limits[column]), rng)
        fresh[:, column] = np.where(rng.random(count) < 0.7, local, fresh[:, column])
    return surrogate.codec.canonical(np.where(mutate, fresh, children))


def _thinned_front(values: FloatArray) -> NDArray[np.bool_]:
    """Mask of the front; the crowded part of a very large one is thinned evenly."""
    mask = non_dominated(values)
    rows = np.flatnonzero(mask)
    if len(rows) > _MAX_FRONT:
        order = rows[np.lexsort(values[rows].T[::-1])]
        mask[:] = False
        mask[order[np.linspace(0, len(order) - 1, _MAX_FRONT).astype(int)]] = True
        mask[rows[values[rows].argmin(axis=0)]] = True
    return mask


def _scale(values: FloatArray) -> tuple[FloatArray, FloatArray]:
    front = values[non_dominated(values)]
    return front.min(axis=0), front.max(axis=0)


def _weights(count: int, num_objectives: int, rng: np.random.Generator) -> FloatArray:
    """Weight vectors spread over the simplex, shape (count, num_objectives)."""
    if num_objectives == 1:
        return np.ones((count, 1))
    if num_objectives == 2:
        first = (np.arange(count) + rng.random()) % count / count
        first = np.clip(rng.permutation(first), 0.01, 0.99)
        return np.stack([first, 1.0 - first], axis=1)
    return np.maximum(rng.dirichlet(np.ones(num_objectives), count), 0.01)
