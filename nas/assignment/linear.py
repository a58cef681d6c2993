"""Linear functions of a choice: the score, and costs with the tangent of what bends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nas.assignment.problem import AssignmentProblem, Floats, Limit

Point = tuple[float, float]
"""Sums that a curve depends on."""


@dataclass(frozen=True)
class Line:
    """A linear function of the choice.

    Args:
        weights: for each slot the weight of each choice, shape (C,).
        once: by trait what is added once.
        constant: always added.
    """

    weights: Sequence[Floats]
    once: Mapping[str, float]
    constant: float


@dataclass(frozen=True)
class Programme:
    """A linear objective under linear limits.

    Args:
        problem: its slots, couplings and traits count.
        objective: what is minimised.
        limits: each with the line that it bounds.
        elastic: minimise by how much limits are broken, in shares of them, and nothing else.
    """

    problem: AssignmentProblem
    objective: Line
    limits: Sequence[tuple[Limit, Line]]
    elastic: bool = False

    @property
    def lines(self) -> list[Line]:
        """The objective and every line that is bounded."""
        return [self.objective, *(line for _, line in self.limits)]


def score_line(problem: AssignmentProblem) -> Line:
    """Return the score as a line."""
    return Line([slot.scores for slot in problem.slots], {}, problem.base_score)


def cost_line(problem: AssignmentProblem, metric: str, points: Mapping[str, Point]) -> Line:
    """Return a cost as a line; one that bends is its tangent plane at the metric's point."""
    weights = [slot.costs[metric] for slot in problem.slots]
    constant = problem.fixed.get(metric, 0.0)
    curve = problem.curves.get(metric)
    if curve is not None:
        height, *slopes = curve.tangent(points[metric])
        constant += height
        for slope, name in zip(slopes, curve.inputs, strict=True):
            constant += slope * problem.fixed.get(name, 0.0)
            parts = [slope * slot.costs[name] for slot in problem.slots]
            weights = [weight + part for weight, part in zip(weights, parts, strict=True)]
    return Line(weights, problem.once.get(metric, {}), constant)


def negated(line: Line) -> Line:
    """Return the line times -1, to maximise it."""
    once = {trait: -value for trait, value in line.once.items()}
    return Line([-weight for weight in line.weights], once, -line.constant)
