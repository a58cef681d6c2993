"""What is known of a candidate without running it: exact costs, constraints, and a first guess.

Letters: N candidates, G genes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hw_profiles.latency_table import LatencyTable
from nas.samplers import GeneCodec
from predictors.encodings import Gene
from searchspace.cost import CostTable, Rows, num_params, rows_of, weight_bytes
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
        match = re.fullmatch(r"\s*([\w@.-]+)\s*<=?\s*([-+0-9.eE]+)\s*", text)
        try:
            limit = float(match[2]) if match else float("nan")
        except ValueError:
            match = None
        if match is None or not math.isfinite(limit):
            raise UserError(
                f"constraint {text!r} is not understood; write METRIC<=NUMBER, "
                "such as latency_ms<=8"
            )
        if match[1] not in metrics:
            raise unknown("metric", match[1], metrics)
        return cls(match[1], limit)

    def __str__(self) -> str:
        """Return the text `parse` reads."""
        return f"{self.metric}<={self.limit:.15g}"


def shown(value: float) -> str:
    """Return a figure of a metric for a sentence."""
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def excess_of(constraints: Sequence[Constraint], values: Floats) -> Floats:
    """Return by how much values (N, C) exceed the limits, in shares of them; kept where <= 0."""
    limits = np.array([constraint.limit for constraint in constraints])
    return (values - limits) / np.where(limits != 0, np.abs(limits), 1.0)


class Costs(Protocol):
    """A cost of many genotypes at once."""

    def of(self, genotypes: Genotypes) -> NDArray[Any]:
        """Return the costs of canonical genotypes (N, G), shape (N,)."""
        ...

    def total(self, rows: Rows) -> NDArray[Any]:
        """Return the costs of their rows, shape (N,)."""
        ...


class Prices:
    """The costs of candidates that follow from the arch alone, exact and for many at once.

    Args:
        space: the search space.
        table: latencies of this device; None where nothing is timed yet.
        workload: the workload that ``latency_ms`` means.
    """

    def __init__(
        self, space: SearchSpace, table: LatencyTable | None = None, workload: str = ""
    ) -> None:
        self._space = space
        self._costs: dict[str, Costs] = {
            "weight_bytes": CostTable(space, weight_bytes),
            "params": CostTable(space, num_params),
        }
        if table is None:
            return
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

    def of_all(self, metrics: Sequence[str], genotypes: Genotypes) -> Floats:
        """Return several metrics of canonical genotypes (N, G), shape (N, len(metrics)).

        Cheaper than one by one: which sub-blocks they consist of is found out once.
        """
        if not metrics:
            return np.empty((len(genotypes), 0))
        costs = [self._costs[metric] for metric in metrics]
        blocks = [
            np.stack([cost.total(rows) for cost in costs], axis=1)
            for rows in rows_of(self._space, genotypes)
        ]
        return np.concatenate([np.empty((0, len(metrics))), *blocks])


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
        return self._prices.of_all(names, matrix)

    def constraints(self, matrix: Genotypes) -> Floats:
        """Return how far each exact constraint is exceeded, shape (N, k), in shares of it."""
        limited = self._objectives.exact_constraints
        values = self._prices.of_all([constraint.metric for constraint in limited], matrix)
        return excess_of(limited, values)

    def features(self, matrix: Genotypes) -> Floats:
        """Return the logarithm of the parameter count, and the caller's scores."""
        size = np.log(self._prices.of("params", matrix))[:, None]
        return size if self._scores is None else np.hstack([size, self._scores(matrix)])


def metrics_of(prices: Prices, genotype: Genotypes) -> Mapping[str, float]:
    """Return every exact metric of one genotype (G,)."""
    return {metric: float(prices.of(metric, genotype[None])[0]) for metric in prices.metrics}
