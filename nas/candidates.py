"""What is known of a candidate without running it: exact costs, constraints, and a first guess.

Letters: N candidates, G genes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hw_profiles.latency_table import LatencyCosts, LatencyTable
from nas.samplers import GeneCodec
from predictors.encodings import Gene
from searchspace.cost import CostTable, num_params, weight_bytes
from searchspace.errors import UserError, unknown
from searchspace.space import SearchSpace
from searchspace.space.canonical import Genotypes

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Constraint:
    """An upper limit on a metric, such as ``latency_ms<=8``.

    Args:
        metric: a name in `Prices.metrics`, or ``loss``.
        limit: the largest value that is allowed.
    """

    metric: str
    limit: float

    @classmethod
    def parse(cls, text: str, metrics: Sequence[str]) -> Constraint:
        """Read ``METRIC<=NUMBER``.

        Raises:
            UserError: when it is not of that form, or the metric is unknown.
        """
        match = re.fullmatch(r"\s*(\w+)\s*<=?\s*([-+0-9.eE]+)\s*", text)
        try:
            limit = float(match[2]) if match else float("nan")
        except ValueError:
            match = None
        if match is None:
            raise UserError(
                f"constraint {text!r} is not understood; write METRIC<=NUMBER, "
                "such as latency_ms<=8"
            )
        if match[1] not in metrics:
            raise unknown("metric", match[1], metrics)
        return cls(match[1], limit)

    def __str__(self) -> str:
        """Return the text `parse` reads."""
        return f"{self.metric}<={self.limit:g}"


class Prices:
    """The costs of candidates that follow from the arch alone, exact and for many at once.

    Args:
        space: the search space.
        table: latencies of this device.
        workload: the workload that ``latency_ms`` means.
    """

    def __init__(self, space: SearchSpace, table: LatencyTable, workload: str) -> None:
        self._costs: dict[str, CostTable | LatencyCosts] = {
            "weight_bytes": CostTable(space, weight_bytes),
            "params": CostTable(space, num_params),
        }
        for item in table.workloads:
            costs = table.costs_ms(space, item)
            self._costs.setdefault(f"{item.phase}_ms", costs)
            if item.name == workload:
                self._costs["latency_ms"] = costs

    @property
    def metrics(self) -> list[str]:
        """Names that `of` knows."""
        return list(self._costs)

    def of(self, metric: str, genotypes: Genotypes) -> Floats:
        """Return a metric of canonical genotypes (N, G), shape (N,)."""
        return self._costs[metric].of(genotypes)


@dataclass(frozen=True)
class Objectives:
    """What is minimised, and under which limits.

    Raises:
        UserError: for an unknown metric.
    """

    names: tuple[str, ...]
    constraints: tuple[Constraint, ...]

    @classmethod
    def parse(
        cls, names: Sequence[str], constraints: Sequence[str], known: Sequence[str]
    ) -> Objectives:
        """Check names and read constraints against the metrics that are known.

        Raises:
            UserError: for an unknown metric or a constraint that cannot be read.
        """
        allowed = ["loss", *known]
        for name in names:
            if name not in allowed:
                raise unknown("metric", name, allowed)
        if "loss" not in names:
            raise UserError("search.objectives lacks 'loss'; without it nothing has to be trained")
        return cls(tuple(names), tuple(Constraint.parse(text, allowed) for text in constraints))

    @property
    def exact_constraints(self) -> list[Constraint]:
        """Those that are known before a candidate is run."""
        return [constraint for constraint in self.constraints if constraint.metric != "loss"]


def genes_of(space: SearchSpace) -> list[Gene]:
    """Return a space's genes as the predictors and samplers describe them."""
    return [Gene(name, "categorical", choices=tuple(v)) for name, v in space.genes.items()]


class SpaceCodec(GeneCodec):
    """A search space as the samplers see it: vectorised, with exact costs.

    Args:
        space: the search space.
        prices: its exact costs.
        objectives: what is minimised under which limits.
        scores: a function from genotypes to extra features of the quality predictor, or None.
    """

    def __init__(
        self,
        space: SearchSpace,
        prices: Prices,
        objectives: Objectives,
        scores: Any = None,
    ) -> None:
        super().__init__(genes_of(space))
        self._space, self._prices, self._objectives, self._scores = (
            space, prices, objectives, scores,
        )  # fmt: skip
        self.exact_indices = [i for i, name in enumerate(objectives.names) if name != "loss"]

    def canonical(self, matrix: Genotypes) -> Genotypes:
        """Set genes that do not count to 0."""
        return self._space.canonical(matrix)

    def exact_objectives(self, matrix: Genotypes) -> Floats:
        """Return the objectives other than the loss, shape (N, number of them)."""
        names = [self._objectives.names[i] for i in self.exact_indices]
        columns = [self._prices.of(name, matrix) for name in names]
        return np.stack(columns, axis=1) if columns else np.empty((len(matrix), 0))

    def constraints(self, matrix: Genotypes) -> Floats:
        """Return how far each exact constraint is exceeded, shape (N, k), in shares of it."""
        columns = [
            self._prices.of(c.metric, matrix) / c.limit - 1.0
            for c in self._objectives.exact_constraints
        ]
        return np.stack(columns, axis=1) if columns else np.empty((len(matrix), 0))

    def features(self, matrix: Genotypes) -> Floats:
        """Return the logarithm of the parameter count, and the caller's scores."""
        size = np.log(self._prices.of("params", matrix))[:, None]
        return size if self._scores is None else np.hstack([size, self._scores(matrix)])

    @cached_property
    def feasible_start(self) -> Genotypes:
        """Genotypes that keep every exact constraint, at least one.

        Raises:
            UserError: naming the best that was reached when there is none.
        """
        rng = np.random.default_rng(0)
        pool = self._space.sample_genotypes(rng, 20_000)
        pool = np.vstack([pool, [self._space.encode(self._space.smallest())]])
        for _ in range(40):
            excess = self.constraints(pool)
            if excess.shape[1] == 0 or (excess <= 0).all(axis=1).any():
                return pool[(excess <= 0).all(axis=1)]
            pool = self._improve(pool, excess, rng)
        best = pool[np.maximum(self.constraints(pool), 0).sum(axis=1).argmin()][None]
        reached = ", ".join(
            f"{c.metric}={self._prices.of(c.metric, best)[0]:.4g}"
            for c in self._objectives.exact_constraints
        )
        wanted = " and ".join(map(str, self._objectives.exact_constraints))
        raise UserError(
            f"no arch of space {self._space.name!r} keeps {wanted} on this device: the best that "
            f"was reachable is {reached}; loosen the constraint or choose a smaller space"
        )

    def _improve(self, pool: Genotypes, excess: Floats, rng: np.random.Generator) -> Genotypes:
        """Keep the 50 nearest to feasible and change one to three genes of copies of them."""
        order = np.maximum(excess, 0).sum(axis=1).argsort()[:50]
        children = np.repeat(pool[order], 200, axis=0)
        sizes = np.array([len(choices) for choices in self._space.genes.values()])
        change = rng.random(children.shape) < 2.0 / len(sizes)
        children = np.where(change, rng.integers(0, sizes, children.shape), children)
        return np.vstack([pool[order], self._space.canonical(children)])


def metrics_of(prices: Prices, genotype: Genotypes) -> Mapping[str, float]:
    """Return every exact metric of one genotype (G,)."""
    return {metric: float(prices.of(metric, genotype[None])[0]) for metric in prices.metrics}
