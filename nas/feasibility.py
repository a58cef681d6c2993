"""Whether any arch keeps the exact constraints, and if none does, which of them block.

Costs alone are searched, so this takes a second and needs neither training nor evaluation.
Letters: N candidates, G genes, C constraints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from nas.candidates import Constraint, Objectives, Prices, excess_of, shown
from searchspace.errors import UserError
from searchspace.space import SearchSpace
from searchspace.space.canonical import Genotypes

Floats = NDArray[np.float64]
POOL_SIZE = 20_000
NUM_ROUNDS = 40
NUM_PARENTS = 50
NUM_CHILDREN = 4000
PATIENCE = 6
NUM_DESCENTS = 4


@dataclass(frozen=True)
class Blocked:
    """A set of constraints that no arch was found to keep, none of which can be left out.

    Args:
        constraints: they block together.
        nearest: the values of the arch that comes nearest to all of them, in their order.
        least: for each, the least value while the others are kept; NaN where none keeps these.
    """

    constraints: tuple[Constraint, ...]
    nearest: tuple[float, ...]
    least: tuple[float, ...]

    def __str__(self) -> str:
        """Say what is reachable."""
        if len(self.constraints) == 1:
            metric = self.constraints[0].metric
            return (
                f"{self.constraints[0]} alone, where the least {metric} is {shown(self.least[0])}"
            )
        parts = []
        for i, constraint in enumerate(self.constraints):
            others = [str(c) for j, c in enumerate(self.constraints) if j != i]
            least = shown(self.least[i])
            parts.append(f"with {' and '.join(others)} the least {constraint.metric} is {least}")
        together = " and ".join(map(str, self.constraints))
        return f"{together} together ({'; '.join(parts)})"


class Feasibility:
    """Searches a space for archs that keep limits on exact costs.

    Args:
        space: the archs there are.
        prices: their exact costs.
        constraints: upper limits on them.
        seed: of the pool and of the changes.
    """

    def __init__(
        self, space: SearchSpace, prices: Prices, constraints: Sequence[Constraint], seed: int = 0
    ) -> None:
        self._space, self._prices = space, prices
        self._constraints = tuple(constraints)
        self._rng = np.random.default_rng([seed, 23])
        pool = space.sample_genotypes(self._rng, POOL_SIZE)
        extremes = [space.encode(arch) for arch in (space.smallest(), space.largest())]
        self._pool = np.vstack([extremes, pool])
        self._sizes = np.array([len(choices) for choices in space.genes.values()])

    def feasible(self) -> Genotypes:
        """Return canonical genotypes (N, G) that keep every constraint; N is 0 if none is found."""
        found = self._pool[self._excess(self._pool, self._constraints).max(axis=1) <= 0]
        if len(found):
            return found
        best = self._approach(self._constraints)
        return best[self._excess(best, self._constraints).max(axis=1) <= 0]

    def blocked(self) -> list[Blocked]:
        """Return the smallest sets of constraints that cannot be kept together."""
        found: list[Blocked] = []
        for size in range(1, len(self._constraints) + 1):
            for chosen in combinations(self._constraints, size):
                if any(set(item.constraints) <= set(chosen) for item in found):
                    continue
                best = self._approach(chosen)
                if self._excess(best[:1], chosen).max() > 0:
                    found.append(self._explained(chosen, best[:1]))
        return found

    def nearest(self) -> list[tuple[Constraint, float]]:
        """Return the costs of the arch whose worst excess is smallest, in shares of the limits."""
        best = self._approach(self._constraints)[:1]
        return [(c, float(self._prices.of(c.metric, best)[0])) for c in self._constraints]

    def _explained(self, chosen: tuple[Constraint, ...], best: Genotypes) -> Blocked:
        nearest = tuple(float(self._prices.of(c.metric, best)[0]) for c in chosen)
        least: list[float] = []
        for constraint in chosen:
            others = tuple(c for c in chosen if c is not constraint)
            row = self._approach(others, constraint.metric)[:1]
            kept = not others or self._excess(row, others).max() <= 0
            least.append(float(self._prices.of(constraint.metric, row)[0]) if kept else np.nan)
        return Blocked(chosen, nearest, tuple(least))

    def _excess(self, rows: Genotypes, constraints: Sequence[Constraint]) -> Floats:
        """Return by how much each limit is exceeded, in shares of it, shape (N, max(C, 1))."""
        if not constraints:
            return np.full((len(rows), 1), -np.inf)
        values = self._prices.of_all([c.metric for c in constraints], rows)
        return excess_of(constraints, values)

    def _score(self, rows: Genotypes, constraints: Sequence[Constraint], metric: str) -> Floats:
        """Return what is minimised: the worst excess, and the metric where none is exceeded."""
        excess = np.maximum(self._excess(rows, constraints), 0.0)
        worst, total = excess.max(axis=1), excess.sum(axis=1)
        value = self._prices.of(metric, rows) if metric else np.zeros(len(rows))
        scale = float(np.abs(value).max()) or 1.0
        # A broken constraint counts more than any value of the metric, which is at most 1 here.
        return np.where(worst > 0, 2.0 + worst + 1e-3 * total, value / scale)

    def _approach(self, constraints: Sequence[Constraint], metric: str = "") -> Genotypes:
        """Return candidates near all constraints, the best first: evolution, then descent."""
        rows = self._pool
        rows = rows[self._score(rows, constraints, metric).argsort(kind="stable")[:NUM_PARENTS]]
        best, waited = np.inf, 0
        for _ in range(NUM_ROUNDS):
            rows = np.vstack([rows, self._children(rows)])
            score = self._score(rows, constraints, metric)
            rows = rows[score.argsort(kind="stable")[:NUM_PARENTS]]
            waited = 0 if score.min() < best else waited + 1
            best = min(best, float(score.min()))
            if (not metric and best <= 0) or waited >= PATIENCE:
                break
        ends = [self._descend(row, constraints, metric) for row in rows[:NUM_DESCENTS]]
        rows = np.vstack([*ends, rows])
        rows = np.asarray(rows[self._score(rows, constraints, metric).argsort(kind="stable")])
        # What was found for some of the constraints is a start for all of them.
        self._pool = np.vstack([self._pool, rows[:NUM_PARENTS]])
        return rows

    def _children(self, parents: Genotypes) -> Genotypes:
        """Cross pairs and change a few genes."""
        a, b = (self._rng.integers(0, len(parents), NUM_CHILDREN) for _ in range(2))
        mix = self._rng.random((NUM_CHILDREN, len(self._sizes)))
        children = np.where(mix < 0.5, parents[a], parents[b])
        change = self._rng.random(children.shape) < 2.0 / len(self._sizes)
        drawn = self._rng.integers(0, self._sizes, children.shape)
        return np.asarray(self._space.canonical(np.where(change, drawn, children)))

    def _descend(self, row: Genotypes, constraints: Sequence[Constraint], metric: str) -> Genotypes:
        """Take the best change of one gene until none helps; returns shape (1, G)."""
        genes = np.repeat(np.arange(len(self._sizes)), self._sizes)
        levels = np.concatenate([np.arange(size) for size in self._sizes])
        here = row[None]
        while True:
            moves = np.repeat(here, len(genes), axis=0)
            moves[np.arange(len(genes)), genes] = levels
            moves = np.vstack([here, self._space.canonical(moves)])
            score = self._score(moves, constraints, metric)
            if score.min() >= score[0]:
                return here
            here = moves[score.argmin()][None]


def feasible_start(space: SearchSpace, prices: Prices, objectives: Objectives) -> Genotypes:
    """Return genotypes (N, G) that keep every exact constraint on a metric with a price.

    Raises:
        UserError: when none is found; names what blocks and the nearest that is reachable.
    """
    constraints = [c for c in objectives.exact_constraints if c.metric in prices.metrics]
    if not constraints:
        return space.encode(space.smallest())[None]
    search = Feasibility(space, prices, constraints)
    found = search.feasible()
    if len(found):
        return found
    blocked = search.blocked()
    if not blocked:
        return search.feasible()
    blocks = "; ".join(map(str, blocked))
    nearest = ", ".join(f"{c.metric}={shown(value)}" for c, value in search.nearest())
    raise UserError(
        f"no arch of space {space.name!r} keeps {' and '.join(map(str, constraints))} on this "
        f"device: what blocks is {blocks}; the nearest that is reachable is {nearest}; loosen the "
        "constraint or choose another space"
    )
