"""A programme as the matrices of an integer programme.

Columns: one binary per slot and choice, one binary per trait, and in the elastic form one number
per limit. Letters: S slots, T traits, K limits, R rows, N columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from nas.assignment.dominance import Indices, undominated
from nas.assignment.linear import Line, Programme
from nas.assignment.problem import Floats, Limit

Row = tuple[Floats, float, float]
"""Weights (N,), lower and upper bound of their sum."""


@dataclass(frozen=True)
class Matrices:
    """What `scipy.optimize.milp` takes.

    Args:
        objective: shape (N,), scaled.
        rows: shape (R, N).
        lower: of each row.
        upper: of each row.
        integral: 1 for binaries, 0 for numbers from 0 on, shape (N,).
        kept: for each slot which choices its columns stand for.
        scale: what one unit of the scaled objective is.
        offset: what is added to it.
    """

    objective: Floats
    rows: Floats
    lower: Floats
    upper: Floats
    integral: Floats
    kept: list[Indices]
    scale: float
    offset: float

    def choice(self, solution: Floats) -> tuple[int, ...]:
        """Return the choice that a solution (N,) is."""
        chosen, begin = [], 0
        for kept in self.kept:
            chosen.append(int(kept[solution[begin : begin + len(kept)].argmax()]))
            begin += len(kept)
        return tuple(chosen)


def matrices(programme: Programme, margins: Sequence[float]) -> Matrices:
    """Return the matrices of a programme.

    Args:
        programme: what is solved.
        margins: by how much each limit is tightened, in shares of it.
    """
    builder = _Builder(programme)
    rows = [*builder.one_choice(), *builder.couplings(), *builder.traits_of_choices()]
    rows += [
        builder.limit(number, *item, margin)
        for number, (item, margin) in enumerate(zip(programme.limits, margins, strict=True))
    ]
    objective, scale, offset = builder.objective()
    weights, lower, upper = zip(*rows, strict=True)
    return Matrices(
        objective, np.array(weights), np.array(lower), np.array(upper), builder.integral,
        builder.kept, scale, offset,
    )  # fmt: skip


class _Builder:
    """The rows over the columns that are left after dominated choices are gone."""

    def __init__(self, programme: Programme) -> None:
        self._programme = programme
        self._problem = programme.problem
        used = {t for line in programme.lines for t, value in line.once.items() if value}
        self._traits = sorted(used)
        self.kept = undominated(programme, self._traits)
        ends = np.cumsum([len(kept) for kept in self.kept])
        self._places = [slice(end - len(k), end) for k, end in zip(self.kept, ends, strict=True)]
        self._num_choices = int(ends[-1])
        self._num_binaries = self._num_choices + len(self._traits)
        slack = len(programme.limits) if programme.elastic else 0
        self.integral = np.ones(self._num_binaries + slack)
        self.integral[self._num_binaries :] = 0.0

    def one_choice(self) -> Iterator[Row]:
        for place in self._places:
            row = np.zeros(len(self.integral))
            row[place] = 1.0
            yield row, 1.0, 1.0

    def couplings(self) -> Iterator[Row]:
        for rule in self._problem.couplings:
            row = np.zeros(len(self.integral))
            for index, weights in rule.weights.items():
                row[self._places[index]] = weights[self.kept[index]]
            yield row, rule.lower, rule.upper

    def traits_of_choices(self) -> Iterator[Row]:
        """Make a trait's binary 1 exactly where a chosen option has it."""
        for number, trait in enumerate(self._traits):
            column = self._num_choices + number
            anywhere = np.zeros(len(self.integral))
            for slot, kept, place in zip(self._problem.slots, self.kept, self._places, strict=True):
                there = np.array([trait in slot.traits[i] for i in kept], dtype=np.float64)
                if there.any():
                    row = np.zeros(len(self.integral))
                    row[place], row[column] = there, -1.0
                    yield row, -np.inf, 0.0
                    anywhere[place] = -there
            anywhere[column] = 1.0
            yield anywhere, -np.inf, 0.0

    def limit(self, number: int, limit: Limit, line: Line, margin: float) -> Row:
        sign = -1.0 if limit.at_least else 1.0
        row = sign * self._weights(line)
        # Scaled to 1, because the solver's tolerance is absolute.
        scale = max(abs(limit.value), float(np.abs(row).max())) or 1.0
        bound = sign * (limit.value - line.constant) - margin * abs(limit.value)
        row /= scale
        if self._programme.elastic:
            row[self._num_binaries + number] = -(abs(limit.value) or 1.0) / scale
        return row, -np.inf, bound / scale

    def objective(self) -> tuple[Floats, float, float]:
        """Return the scaled objective, its unit, and what is added."""
        if self._programme.elastic:
            return 1.0 - self.integral, 1.0, 0.0
        row, offset = self._weights(self._programme.objective), self._programme.objective.constant
        for place in self._places:
            low = row[place].min()
            row[place] -= low
            offset += low
        # HiGHS stops within 1e-6 of the optimum, in this unit.
        scale = float(np.abs(row).max()) or 1.0
        return row / scale, scale, offset

    def _weights(self, line: Line) -> Floats:
        row = np.zeros(len(self.integral))
        for weights, kept, place in zip(line.weights, self.kept, self._places, strict=True):
            row[place] = weights[kept]
        row[self._num_choices : self._num_binaries] = [line.once.get(t, 0.0) for t in self._traits]
        return row
