"""Choices that can be left out before solving, because another one is as good in everything."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nas.assignment.linear import Programme
from nas.assignment.problem import Floats

Indices = NDArray[np.int64]


def undominated(programme: Programme, traits: list[str]) -> list[Indices]:
    """Return for each slot the choices that an optimum may need.

    A choice is left out when another one of the slot has the same weight in every coupling and
    the same traits, and is nowhere worse: then it can take its place in every solution. Of equal
    choices the first stays.

    Args:
        programme: what is solved.
        traits: those that something is paid for once.

    Source: Sinha and Zoltners, "The multiple-choice knapsack problem" (1979), proposition 1.
    """
    kept = []
    for index, slot in enumerate(programme.problem.slots):
        columns = [] if programme.elastic else [programme.objective.weights[index]]
        for limit, line in programme.limits:
            columns.append(-line.weights[index] if limit.at_least else line.weights[index])
        alike = [
            rule.weights[index] for rule in programme.problem.couplings if index in rule.weights
        ]
        if traits:
            alike += [np.array([t in present for present in slot.traits]) for t in traits]
        worse_or_equal = np.stack(columns, axis=1) if columns else np.zeros((len(slot), 1))
        signature = np.stack(alike, axis=1) if alike else np.zeros((len(slot), 1))
        kept.append(_front(worse_or_equal, signature))
    return kept


def _front(values: Floats, signature: NDArray[np.generic]) -> Indices:
    """Return rows of `values` that no other row with the same signature is as good as."""
    _, group = np.unique(signature, axis=0, return_inverse=True)
    rows = np.lexsort((*values.T[::-1], group.reshape(-1)))
    kept: list[int] = []
    for row in rows:
        # In lexicographic order only an earlier row can be nowhere worse.
        before = [k for k in kept if group.reshape(-1)[k] == group.reshape(-1)[row]]
        if not before or not (values[before] <= values[row]).all(axis=1).any():
            kept.append(int(row))
    return np.array(sorted(kept))
