"""Networks of HW-GPT-Bench to learn from and to judge on.

Letters: N networks, G genes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nas.pareto import non_dominated
from nas.samplers._design import tilted_levels
from predictors.benchmarks.hwgpt import FloatArray, HwGptSpace, IntArray

_POOL = 4000
_ROUNDS = 12


def spread_sample(space: HwGptSpace, rng: np.random.Generator, num: int) -> IntArray:
    """Return networks whose layer totals spread over their whole range, shape (num, G).

    Uniform genes would make the totals of all layers nearly equal: no front lies there.
    """
    return space.canonical(tilted_levels(space.genes, num, rng))


def near_front(space: HwGptSpace, rng: np.random.Generator, num: int) -> IntArray:
    """Return networks near the front of perplexity and parameters, shape (num, G).

    A spread pool evolves for a few rounds on the surrogate itself; the first layers of
    non-dominated networks are kept.
    """
    X = np.unique(spread_sample(space, rng, _POOL), axis=0)
    for _ in range(_ROUNDS):
        left, right = (X[rng.integers(0, len(X), _POOL)] for _ in range(2))
        children = np.where(rng.random(left.shape) < 0.5, left, right)
        fresh = tilted_levels(space.genes, _POOL, rng)
        children = np.where(rng.random(left.shape) < 2.0 / left.shape[1], fresh, children)
        X = np.unique(np.vstack([X, space.canonical(children)]), axis=0)
        X = X[_front_layers(np.stack([space.perplexity(X), space.num_params(X)], axis=1), num)]
    return X[rng.permutation(len(X))[:num]]


def aggregates(space: HwGptSpace, X: IntArray) -> FloatArray:
    """Return values of the genes, NaN where inactive, and the logarithm of the parameters."""
    return np.column_stack([space.masked(X), np.log(space.num_params(X))])


def _front_layers(values: FloatArray, num: int) -> NDArray[np.bool_]:
    """Return which rows lie in the first non-dominated layers that hold at least num rows."""
    kept = np.zeros(len(values), dtype=bool)
    left = np.arange(len(values))
    while kept.sum() < num and len(left):
        kept[left[non_dominated(values[left])]] = True
        left = left[~kept[left]]
    return kept
