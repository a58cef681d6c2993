"""The survival of AGE-MOEA: the front's own curvature decides what near and crowded mean.

Letters: N candidates, M objectives (minimised). pymoo's own class needs numba, which nothing else
here does, so the selection is written from the paper.

Source: Panichella, "An Adaptive Evolutionary Algorithm based on Non-Euclidean Geometry for
Many-objective Optimization" (GECCO 2019), Algorithms 1 to 3.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from nas.samplers._ranking import front_ranks

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

_LARGEST_P, _SMALLEST_P = 20.0, 0.1


def survival_scores(values: FloatArray) -> tuple[IntArray, FloatArray]:
    """Return the non-dominated rank and the survival score (more is better), both shape (N,).

    In the first front the score is diversity over proximity, corners are infinite; in later fronts
    it is the inverse distance to the ideal point.

    Args:
        values: objectives, shape (N, M).
    """
    ranks = front_ranks(values)
    first = np.flatnonzero(ranks == 0)
    ideal = values[first].min(axis=0)
    corners = corner_rows(values[first] - ideal)
    intercepts = _intercepts(values[first] - ideal, corners)
    unit = (values - ideal) / intercepts
    p = curvature(unit[first], corners)
    scores = np.empty(len(values))
    scores[first] = _first_front(unit[first], corners, p)
    later = np.flatnonzero(ranks > 0)
    scores[later] = 1.0 / np.maximum(_length(unit[later], p), 1e-12)
    return ranks, scores


def corner_rows(shifted: FloatArray) -> IntArray:
    """Return per objective the row nearest to its axis, shape (M,); a row serves one axis.

    Args:
        shifted: objectives less the ideal point, shape (N, M).
    """
    scale = np.where(shifted.max(axis=0) > 0, shifted.max(axis=0), 1.0)
    unit = shifted / scale
    rows: list[int] = []
    for axis in range(unit.shape[1]):
        away = np.delete(unit, axis, axis=1)
        distance = np.sqrt((away**2).sum(axis=1)) - 1e-9 * unit[:, axis]
        distance[rows] = np.inf if len(rows) < len(unit) else distance[rows]
        rows.append(int(np.argmin(distance)))
    return np.array(rows, dtype=np.int64)


def curvature(unit: FloatArray, corners: IntArray) -> float:
    """Return the exponent p of the unit sphere ``sum |f|^p = 1`` that the front resembles.

    It is that of the sphere through the point nearest to the diagonal, corners left out.

    Args:
        unit: the first front, scaled to 0..1, shape (N, M).
        corners: rows of its corners.
    """
    num_objectives = unit.shape[1]
    away = np.linalg.norm(unit - unit.mean(axis=1, keepdims=True), axis=1)
    away[corners] = np.inf
    middle = float(unit[int(np.argmin(away))].mean())
    if not np.isfinite(away).any() or not 0.0 < middle < 1.0 or num_objectives == 1:
        return 1.0
    p = math.log(num_objectives) / math.log(1.0 / middle)
    return 1.0 if p <= _SMALLEST_P else min(p, _LARGEST_P)


def _intercepts(shifted: FloatArray, corners: IntArray) -> FloatArray:
    """Return where the plane through the corners meets the axes, or the front's largest values."""
    largest = shifted.max(axis=0)
    fallback = np.where(largest > 0, largest, 1.0)
    try:
        plane = np.linalg.solve(shifted[corners], np.ones(len(corners)))
    except np.linalg.LinAlgError:
        return fallback
    if not (np.isfinite(plane).all() and (plane > 1e-12).all()):
        return fallback
    return np.asarray(1.0 / plane)


def _first_front(unit: FloatArray, corners: IntArray, p: float) -> FloatArray:
    """Pick one after the other what is far from the two nearest picked, relative to proximity."""
    scores = np.full(len(unit), np.inf)
    picked = np.zeros(len(unit), dtype=bool)
    picked[corners] = True
    proximity = np.maximum(_length(unit, p), 1e-12)
    between = _length(unit[:, None] - unit[None], p) / proximity[:, None]
    while not picked.all():
        left = np.flatnonzero(~picked)
        to_picked = np.sort(between[np.ix_(left, np.flatnonzero(picked))], axis=1)
        room = to_picked[:, :2].sum(axis=1)
        best = int(np.argmax(room))
        scores[left[best]] = room[best]
        picked[left[best]] = True
    return scores


def _length(vectors: FloatArray, p: float) -> FloatArray:
    """Return the p-norm along the last axis (a quasi-norm below 1)."""
    return np.asarray((np.abs(vectors) ** p).sum(axis=-1) ** (1.0 / p))
