"""Arithmetic on Pareto fronts: domination, hypervolume, knee, greedy subsets.

Everything minimises. `F` always has shape (points, objectives). This is the adapter around pymoo.
"""

from __future__ import annotations

import bisect
import heapq

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]


def non_dominated(F: ArrayLike) -> BoolArray:
    """Return a mask of the points that no other point dominates.

    Equal points do not dominate each other, so every copy of a front point is kept.

    Args:
        F: objective values, shape (points, objectives), minimised; a row with NaN is never on
            the front.
    """
    values = _points(F)
    mask = np.asarray(np.isfinite(values) | np.isinf(values)).all(axis=1).reshape(-1)
    rows = np.flatnonzero(mask)
    if len(rows) == 0:
        return mask
    unique, inverse = np.unique(values[rows], axis=0, return_inverse=True)
    mask[rows] = _front_of_sorted(unique)[inverse.reshape(-1)]
    return mask


def hypervolume(F: ArrayLike, reference: ArrayLike) -> float:
    """Return the volume dominated by `F` and bounded by `reference`.

    Args:
        F: objective values, shape (points, objectives), minimised; rows with NaN and points that
            do not dominate the reference add nothing.
        reference: the worst corner, shape (objectives,).
    """
    corner = np.asarray(reference, dtype=np.float64)
    values = _points(F)
    inside = values[(values < corner).all(axis=1)]
    if len(inside) == 0:
        return 0.0
    if inside.shape[1] == 1:
        return float(corner[0] - inside.min())
    from pymoo.indicators.hv import HV

    lowest = np.where(np.isneginf(inside), np.finfo(np.float64).min, inside)
    return float(HV(ref_point=corner)(lowest))


def normalise(F: ArrayLike, ideal: ArrayLike, nadir: ArrayLike) -> FloatArray:
    """Scale each objective so that `ideal` becomes 0 and `nadir` becomes 1.

    Args:
        F: objective values, shape (points, objectives).
        ideal: best value per objective.
        nadir: worst value per objective; where it equals the ideal the scale is 1.
    """
    low = np.asarray(ideal, dtype=np.float64)
    span = np.asarray(nadir, dtype=np.float64) - low
    return (_points(F) - low) / np.where(span > 0, span, 1.0)


def knee_index(F: ArrayLike) -> int:
    """Return the row of the front point furthest below the plane through the extreme points.

    Args:
        F: objective values, shape (points, objectives), minimised.

    Raises:
        ValueError: if no row is free of NaN.

    Source: Das, "On characterizing the knee of the Pareto curve" (1999).
    """
    values = _points(F)
    rows = np.flatnonzero(non_dominated(values))
    if len(rows) == 0:
        raise ValueError("knee_index needs at least one point without NaN")
    front = values[rows]
    unit = normalise(front, front.min(axis=0), front.max(axis=0))
    extremes = unit[unit.argmin(axis=0)]
    normal, *_ = np.linalg.lstsq(extremes, np.ones(len(extremes)), rcond=None)
    if not (normal > 1e-9).all():
        normal = np.ones(unit.shape[1])
    return int(rows[np.argmin(unit @ normal)])


def hypervolume_gains(
    F_existing: ArrayLike,
    F_candidates: ArrayLike,
    reference: ArrayLike,
) -> FloatArray:
    """Return how much hypervolume each candidate alone would add, shape (candidates,).

    Args:
        F_existing: what is there already, shape (points, objectives); may be empty.
        F_candidates: shape (candidates, objectives).
        reference: the worst corner, shape (objectives,).
    """
    corner = np.asarray(reference, dtype=np.float64)
    candidates = _points(F_candidates, width=len(corner))
    front = _clean_front(_points(F_existing, width=len(corner)), corner)
    if len(corner) == 2:
        return _gains_2d(front, candidates, corner)
    return np.array([_gain(front, point, corner) for point in candidates], dtype=np.float64)


def greedy_hypervolume_subset(
    F_existing: ArrayLike, F_candidates: ArrayLike, reference: ArrayLike, k: int
) -> list[int]:
    """Pick up to `k` candidates one by one, each the one that adds most hypervolume.

    Candidates that add nothing are not picked, so fewer than `k` may come back. Lazy evaluation
    is exact because hypervolume is submodular: a gain can only shrink as the set grows.

    Args:
        F_existing: what is there already, shape (points, objectives); may be empty.
        F_candidates: shape (candidates, objectives); rows with NaN are never picked.
        reference: the worst corner, shape (objectives,).
        k: how many to pick at most.

    Source: Minoux, "Accelerated greedy algorithms" (1978); Guerreiro et al. (2016).
    """
    corner = np.asarray(reference, dtype=np.float64)
    candidates = _points(F_candidates, width=len(corner))
    front = _clean_front(_points(F_existing, width=len(corner)), corner)
    gains = hypervolume_gains(front, candidates, corner)
    heap = [(-gain, row, 0) for row, gain in enumerate(gains) if gain > 0]
    heapq.heapify(heap)
    picked: list[int] = []
    while heap and len(picked) < k:
        _, row, round_seen = heapq.heappop(heap)
        if round_seen == len(picked):
            picked.append(row)
            front = _clean_front(np.vstack([front, candidates[row]]), corner)
            continue
        gain = _gain(front, candidates[row], corner)
        if gain > 0:
            heapq.heappush(heap, (-gain, row, len(picked)))
    return picked


def _points(F: ArrayLike, width: int | None = None) -> FloatArray:
    values = np.asarray(F, dtype=np.float64)
    if values.size == 0:
        columns = values.shape[1] if values.ndim == 2 else 0
        return np.empty((0, width or columns))
    return values.reshape(len(values), -1)


def _front_of_sorted(unique: FloatArray) -> BoolArray:
    """Mask of the front of distinct rows that are sorted lexicographically."""
    if unique.shape[1] <= 2:
        last = unique[:, -1]
        best_before = np.minimum.accumulate(np.concatenate([[np.inf], last[:-1]]))
        front = last < best_before
        front[0] = True
        if unique.shape[1] == 1:
            front[1:] = False
        return np.asarray(front)
    if unique.shape[1] == 3:
        return _front_of_three(unique)
    mask = np.zeros(len(unique), dtype=bool)
    alive = np.arange(len(unique))
    # Rows are sorted, so the first one alive is never dominated by a later one.
    while len(alive):
        first = alive[0]
        mask[first] = True
        alive = alive[(unique[alive] < unique[first]).any(axis=1)]
    return mask


def _front_of_three(unique: FloatArray) -> BoolArray:
    """Sweep along the first objective; the others' front so far is a staircase, kept sorted.

    Source: Kung, Luccio and Preparata, "On finding the maxima of a set of vectors" (1975).
    """
    mask = np.zeros(len(unique), dtype=bool)
    second: list[float] = []
    third: list[float] = []
    for row, (y, z) in enumerate(unique[:, 1:].tolist()):
        place = bisect.bisect_right(second, y)
        if place and third[place - 1] <= z:
            continue
        mask[row] = True
        start = place - 1 if place and second[place - 1] == y else place
        end = start
        while end < len(third) and third[end] >= z:
            end += 1
        second[start:end], third[start:end] = [y], [z]
    return mask


def _clean_front(values: FloatArray, corner: FloatArray) -> FloatArray:
    inside = values[(values < corner).all(axis=1)]
    return np.unique(inside[non_dominated(inside)], axis=0) if len(inside) else inside


def _gain(front: FloatArray, point: FloatArray, corner: FloatArray) -> float:
    if not (point < corner).all():
        return 0.0
    box = float(np.prod(corner - point))
    if len(front) == 0:
        return box
    if (front <= point).all(axis=1).any():
        return 0.0
    return max(0.0, box - hypervolume(np.maximum(front, point), corner))


def _gains_2d(front: FloatArray, points: FloatArray, corner: FloatArray) -> FloatArray:
    """All gains at once: integrate max(0, staircase - y) over [x, corner_x]."""
    gains = np.zeros(len(points))
    inside = np.flatnonzero((points < corner).all(axis=1))
    x, y = points[inside, 0], points[inside, 1]
    edges = np.concatenate([[-np.inf], front[:, 0], [corner[0]]])
    heights = np.concatenate([[corner[1]], front[:, 1]])
    total = np.zeros(len(inside))
    for left, right, height in zip(edges[:-1], edges[1:], heights, strict=True):
        width = np.clip(right - np.maximum(left, x), 0.0, None)
        total += width * np.clip(height - y, 0.0, None)
    gains[inside] = total
    return gains
