"""Non-dominated ranks and crowding distances.

Letters: N candidates, M objectives (minimised).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nas.pareto import non_dominated

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


def front_ranks(values: FloatArray) -> IntArray:
    """Return 0 for the front, 1 for the front of the rest and so on, shape (N,)."""
    ranks = np.zeros(len(values), dtype=np.int64)
    left = np.arange(len(values))
    while len(left):
        front = non_dominated(values[left])
        if not front.any():
            break
        left = left[~front]
        ranks[left] += 1
    return ranks


def crowding(values: FloatArray, ranks: IntArray) -> FloatArray:
    """Return the crowding distance of each candidate within its rank, shape (N,).

    Source: Deb et al., "A Fast and Elitist Multiobjective Genetic Algorithm: NSGA-II" (2002),
        section III-B.
    """
    distance = np.zeros(len(values))
    for rank in np.unique(ranks):
        rows = np.flatnonzero(ranks == rank)
        for column in values[rows].T:
            order = rows[np.argsort(column, kind="stable")]
            ordered = np.sort(column)
            span = ordered[-1] - ordered[0]
            distance[order[[0, -1]]] = np.inf
            if span > 0:
                distance[order[1:-1]] += (ordered[2:] - ordered[:-2]) / span
    return distance


def best_rows(values: FloatArray, count: int) -> IntArray:
    """Return rows in the order of rank and crowding; whole fronts, at least `count` rows if any."""
    chosen: list[int] = []
    left = np.arange(len(values))
    while len(left) and len(chosen) < count:
        front = non_dominated(values[left])
        if not front.any():
            break
        members = left[front]
        room = crowding(values[members], np.zeros(len(members), dtype=np.int64))
        chosen += members[np.argsort(-room, kind="stable")].tolist()
        left = left[~front]
    return np.array(chosen, dtype=np.int64)
