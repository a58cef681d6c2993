"""Candidates before anything is known: spread layer totals, corners, and a greedy design.

Drawing each layer's gene uniformly makes the totals over layers concentrate around their mean,
so a predictor never sees the ends where the Pareto front lives. Here every candidate draws its
own share of each choice first. Letters: N candidates, G genes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from nas.samplers._codec import Codec, FloatMatrix, IntMatrix
from predictors.encodings import Gene, GeneEncoding, layer_groups

_POOL = 768
_REPAIR_ROUNDS = 40


def tilted_levels(genes: Sequence[Gene], count: int, rng: np.random.Generator) -> IntMatrix:
    """Draw candidates whose layer totals spread over the whole range, shape (count, G).

    Each candidate draws, per repeated gene, a random share of every level for its first and its
    last layer; layers in between interpolate. Other genes are uniform over their levels.

    Args:
        genes: one per column.
        count: number of candidates N.
        rng: generator.
    """
    levels = np.stack([rng.integers(0, gene.num_levels, count) for gene in genes], axis=1).astype(
        np.int64
    )
    for columns in layer_groups(genes).values():
        numbers = {genes[c].num_levels for c in columns}
        if len(numbers) > 1 or max(numbers) > 64:
            continue
        first, last = (_shares(count, max(numbers), rng) for _ in range(2))
        tilt = rng.random(count) < 0.5
        last[~tilt] = first[~tilt]
        for column, position in zip(columns, np.linspace(0.0, 1.0, len(columns)), strict=True):
            share = np.cumsum(first * (1 - position) + last * position, axis=1)
            draw = rng.random(count) * share[:, -1]
            levels[:, column] = (draw[:, None] >= share[:, :-1]).sum(axis=1)
    return levels


def corner_levels(genes: Sequence[Gene], count: int, rng: np.random.Generator) -> IntMatrix:
    """Draw candidates whose every gene sits at an end, all layers of a repeated gene together.

    Args:
        genes: one per column.
        count: number of corners.
        rng: generator.
    """
    levels = np.zeros((count, len(genes)), dtype=np.int64)
    repeated: dict[int, list[int]] = {}
    for columns in layer_groups(genes).values():
        for column in columns:
            repeated[column] = columns
    done: set[int] = set()
    for column, gene in enumerate(genes):
        if column in done:
            continue
        together = repeated.get(column, [column])
        done.update(together)
        ordered = gene.numeric_values is not None
        middle = rng.random(count) < 0.15
        end = rng.integers(0, 2, count)
        for other in together:
            top = genes[other].num_levels - 1
            if ordered:
                levels[:, other] = np.where(middle, top // 2, end * top)
        if not ordered:
            share = rng.random(count)
            for other in together:
                levels[:, other] = (share * genes[other].num_levels).astype(np.int64)
    return levels


def feasible_pool(codec: Codec, count: int, rng: np.random.Generator) -> IntMatrix:
    """Return distinct canonical candidates that meet the exact constraints, as many as found.

    Where few random candidates are feasible, the least violating ones are mutated until enough
    are; if none is found at all, the least violating candidates come back.

    Args:
        codec: the space.
        count: how many are wanted.
        rng: generator.
    """
    genes = codec.genes
    third = count // 3
    drawn = np.vstack([corner_levels(genes, third, rng), tilted_levels(genes, count - third, rng)])
    pool = unique_rows(codec.canonical(drawn))
    violation = total_violation(codec, pool)
    for _ in range(_REPAIR_ROUNDS):
        if (violation <= 0).sum() >= min(count // 2, len(pool) // 3):
            break
        parents = pool[np.argsort(violation, kind="stable")[: max(count // 4, 8)]]
        children = _repair_children(genes, parents, count, rng)
        pool = unique_rows(np.vstack([pool, codec.canonical(children)]))
        violation = total_violation(codec, pool)
        keep = np.argsort(violation, kind="stable")[: 3 * count]
        pool, violation = pool[keep], violation[keep]
    feasible = pool[violation <= 0]
    return feasible if len(feasible) else pool[np.argsort(violation, kind="stable")[:count]]


def initial_design(
    codec: Codec,
    encoding: GeneEncoding,
    known: IntMatrix,
    count: int,
    rng: np.random.Generator,
    pool: IntMatrix | None = None,
) -> IntMatrix:
    """Choose candidates that leave the prior least uncertain about the rest, shape (<=count, G).

    Two corners come first, then what tells totals, position moments and interactions apart; each
    counts by how far its exact costs are from those of the candidates before it, so that the
    first few evaluations reach along the whole front.

    Args:
        codec: the space.
        encoding: features with their prior scales.
        known: candidates that are evaluated already, shape (K, G).
        count: how many to choose.
        rng: generator.
        pool: candidates to choose from; drawn when not given.

    Source: Krause, Singh and Guestrin, "Near-optimal sensor placements in Gaussian processes"
        (2008), the greedy variance rule.
    """
    candidates = feasible_pool(codec, _POOL, rng) if pool is None else pool
    if len(candidates) == 0:
        return candidates
    everything = np.vstack([known, candidates])
    phi = encoding.encode(everything)
    phi = (phi - phi[len(known) :].mean(axis=0)) * encoding.prior_scale
    noise = 0.02 * float((phi**2).sum(axis=1).mean())
    for row in range(len(known)):
        phi = _condition(phi, row, noise)
    spread = _cost_spread(codec.exact_objectives(everything))
    taken = list(range(len(known)))
    at_corner = np.concatenate([np.ones(len(known), bool), _corners(codec.genes, candidates)])
    for turn in range(min(count, len(candidates))):
        variance = (phi**2).sum(axis=1) * spread(taken)
        if turn >= 2 and not at_corner.all():
            # A linear model learns most at corners; only points inside reveal that it is wrong.
            variance[at_corner] *= 1e-6
        variance[taken] = -1.0
        best = int(np.argmax(variance))
        taken.append(best)
        phi = _condition(phi, best, noise)
    return np.asarray(everything[taken[len(known) :]])


def _cost_spread(costs: FloatMatrix) -> Callable[[list[int]], FloatMatrix]:
    """Return a function from rows to every row's distance to the nearest of them, in the costs.

    Args:
        costs: exact objectives, shape (N, k); with k = 0 all distances are 1.
    """
    low, high = costs.min(axis=0), costs.max(axis=0)
    unit = (costs - low) / np.where(high > low, high - low, 1.0)
    if not (high > low).any():
        return lambda rows: np.ones(len(costs))

    def distance(rows: list[int]) -> FloatMatrix:
        if not rows:
            return np.asarray(np.abs(unit - 0.5).max(axis=1))
        return np.asarray(np.abs(unit[:, None] - unit[None, rows]).max(axis=2).min(axis=1))

    return distance


def unique_rows(levels: IntMatrix) -> IntMatrix:
    """Drop repeated rows, keeping the first of each in order."""
    return np.asarray(levels[distinct_rows(levels)])


def distinct_rows(levels: IntMatrix) -> NDArray[np.int64]:
    """Return the indices of the first of each kind of row, in order."""
    # Sorting one number per row takes a tenth of sorting the rows; 64 bits do not collide.
    factors = np.random.default_rng(0).integers(-(2**63), 2**63, levels.shape[1])
    _, first = np.unique(levels.astype(np.int64) @ factors, return_index=True)
    return np.sort(first)


def row_keys(levels: IntMatrix) -> np.ndarray:
    """Return one opaque, comparable and hashable key per row."""
    packed = np.ascontiguousarray(levels, dtype=np.int32)
    if packed.shape[1] == 0:
        return np.zeros(len(packed), dtype="V4")
    return packed.view(np.dtype((np.void, packed.dtype.itemsize * packed.shape[1]))).reshape(-1)


def total_violation(codec: Codec, levels: IntMatrix) -> np.ndarray:
    """Sum of constraint violations, each divided by its median positive value, shape (N,)."""
    values = codec.constraints(levels)
    if values.shape[1] == 0:
        return np.zeros(len(levels))
    positive = np.where(np.isnan(values), np.inf, np.maximum(values, 0.0))
    finite = np.where(np.isfinite(positive), positive, 0.0)
    scale = np.array([np.median(c[c > 0]) if (c > 0).any() else 1.0 for c in finite.T])
    return np.asarray((positive / scale).sum(axis=1))


def _shares(count: int, num_levels: int, rng: np.random.Generator) -> np.ndarray:
    concentration = np.exp(rng.uniform(np.log(0.15), np.log(3.0), (count, 1)))
    return rng.standard_gamma(np.broadcast_to(concentration, (count, num_levels))) + 1e-12


def _repair_children(
    genes: Sequence[Gene], parents: IntMatrix, count: int, rng: np.random.Generator
) -> IntMatrix:
    a = parents[rng.integers(0, len(parents), count)]
    b = parents[rng.integers(0, len(parents), count)]
    children = np.where(rng.random(a.shape) < 0.5, a, b)
    fresh = tilted_levels(genes, count, rng)
    rate = rng.choice([1.0 / len(genes), 0.1, 0.3], (count, 1))
    return np.where(rng.random(a.shape) < rate, fresh, children)


def _corners(genes: Sequence[Gene], levels: IntMatrix) -> np.ndarray:
    """Mask of candidates with nearly every ordered gene at one of its ends, shape (N,)."""
    ordered = [
        column
        for column, gene in enumerate(genes)
        if gene.num_levels > 2 and gene.numeric_values is not None
    ]
    if not ordered:
        return np.zeros(len(levels), dtype=bool)
    top = np.array([genes[column].num_levels - 1 for column in ordered])
    at_end = (levels[:, ordered] == 0) | (levels[:, ordered] == top)
    return np.asarray(at_end.mean(axis=1) > 0.8)


def _condition(phi: np.ndarray, row: int, noise: float) -> np.ndarray:
    """Remove from every candidate what observing `row` explains (a rank-one downdate)."""
    direction = phi[row]
    size = float(direction @ direction)
    if size <= 1e-12:
        return phi
    shrink = 1.0 - np.sqrt(noise / (size + noise))
    return np.asarray(phi - np.outer(phi @ direction, direction) * (shrink / size))
