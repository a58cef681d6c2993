"""What an assignment problem is: one choice per slot, additive scores and costs, hard limits.

Letters: S slots, C choices of a slot.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from searchspace.errors import UserError, unknown

Floats = NDArray[np.float64]
Choice = tuple[int, ...]
"""Index of the chosen option of every slot."""
TOLERANCE = 1e-9
"""Relative rounding that a limit forgives."""


@dataclass(frozen=True)
class Limit:
    """A hard limit on a metric, such as ``latency_ms<=8`` or ``params>=1e6``.

    Args:
        metric: name of a cost.
        value: the largest (or least) value that is allowed.
        at_least: whether it is a lower limit.
    """

    metric: str
    value: float
    at_least: bool = False

    @classmethod
    def parse(cls, text: str, metrics: Iterable[str]) -> Limit:
        """Read ``METRIC<=NUMBER`` or ``METRIC>=NUMBER``.

        Raises:
            UserError: when it is not of that form, or the metric is unknown.
        """
        match = re.fullmatch(r"\s*(\w+)\s*([<>])=?\s*([-+0-9.eE]+)\s*", text)
        try:
            value = float(match[3]) if match else math.nan
        except ValueError:
            value = math.nan
        if match is None or not math.isfinite(value):
            raise UserError(
                f"constraint {text!r} is not understood; write METRIC<=NUMBER or METRIC>=NUMBER, "
                "such as latency_ms<=8"
            )
        known = list(metrics)
        if match[1] not in known:
            raise unknown("metric", match[1], known)
        return cls(match[1], value, match[2] == ">")

    def excess(self, value: float) -> float:
        """Return by how much a value breaks the limit; not above 0 where it keeps it."""
        return self.value - value if self.at_least else value - self.value

    def keeps(self, value: float) -> bool:
        """Whether a value keeps the limit, rounding errors forgiven."""
        return self.excess(value) <= TOLERANCE * max(abs(self.value), abs(value))

    def __str__(self) -> str:
        """Return the text `parse` reads."""
        return f"{self.metric}{'>=' if self.at_least else '<='}{self.value:g}"


@dataclass(frozen=True)
class Slot:
    """A place that takes exactly one of its choices.

    Args:
        name: for messages.
        scores: what each choice adds to the score, shape (C,), finite.
        costs: by metric what each choice adds, shape (C,).
        traits: for each choice what it has in common with others, see `AssignmentProblem.once`.
    """

    name: str
    scores: Floats
    costs: Mapping[str, Floats]
    traits: tuple[frozenset[str], ...] = ()

    def __len__(self) -> int:
        """Return the number of choices."""
        return len(self.scores)


@dataclass(frozen=True)
class Coupling:
    """A linear rule between slots: ``lower <= sum of weights of the chosen <= upper``.

    Args:
        weights: by slot index the weight of each of its choices, shape (C,).
        lower: smallest sum that is allowed.
        upper: largest sum that is allowed.
    """

    weights: Mapping[int, Floats]
    lower: float
    upper: float


@dataclass(frozen=True)
class Curve:
    """The part of a cost that bends: a function of two other sums of the same choice.

    Args:
        inputs: names of the two costs it depends on.
        value: maps their sums to what is added to the cost.
    """

    inputs: tuple[str, str]
    value: Callable[[float, float], float]

    def tangent(self, point: tuple[float, float]) -> tuple[float, float, float]:
        """Return constant and slopes of the plane through the value at `point`.

        Slopes are central differences; at a kink they lie between those of its two sides.
        """
        slopes = []
        for axis in (0, 1):
            step = 1e-4 * max(1.0, abs(point[axis]))
            ends = [
                self.value(*(p + sign * step * (i == axis) for i, p in enumerate(point)))
                for sign in (1, -1)
            ]
            slopes.append((ends[0] - ends[1]) / (2 * step))
        constant = self.value(*point) - slopes[0] * point[0] - slopes[1] * point[1]
        return constant, slopes[0], slopes[1]


@dataclass(frozen=True)
class AssignmentProblem:
    """One choice per slot, scores and costs that add up, and what does not add up.

    Args:
        slots: the S slots.
        base_score: added to every score.
        fixed: by metric what every choice costs anyway.
        couplings: rules between slots.
        once: by metric and trait what is paid once as soon as one chosen option has the trait.
        curves: by metric a part that bends.

    Raises:
        ValueError: when there is no slot, a slot has no choice, or a score is not finite.
    """

    slots: Sequence[Slot]
    base_score: float = 0.0
    fixed: Mapping[str, float] = field(default_factory=dict)
    couplings: Sequence[Coupling] = ()
    once: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    curves: Mapping[str, Curve] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.slots:
            raise ValueError("an assignment problem needs at least one slot")
        for slot in self.slots:
            if not len(slot) or not np.isfinite(slot.scores).all():
                raise ValueError(f"slot {slot.name!r} has no choice, or a score that is not finite")

    @property
    def metrics(self) -> list[str]:
        """Names of the costs."""
        return list(self.slots[0].costs)

    def score(self, choice: Sequence[int]) -> float:
        """Return the score of a choice."""
        return self.base_score + math.fsum(
            slot.scores[i] for slot, i in zip(self.slots, choice, strict=True)
        )

    def additive(self, metric: str, choice: Sequence[int]) -> float:
        """Return the part of a cost that adds up, the fixed one included."""
        return self.fixed.get(metric, 0.0) + math.fsum(
            slot.costs[metric][i] for slot, i in zip(self.slots, choice, strict=True)
        )

    def point(self, curve: Curve, choice: Sequence[int]) -> tuple[float, float]:
        """Return the sums that a curve depends on."""
        first, second = (self.additive(name, choice) for name in curve.inputs)
        return first, second

    def cost(self, metric: str, choice: Sequence[int]) -> float:
        """Return a cost in full: what adds up, what is paid once, what bends."""
        total = self.additive(metric, choice)
        once = self.once.get(metric, {})
        if once:
            present = frozenset[str]().union(
                *(slot.traits[i] for slot, i in zip(self.slots, choice, strict=True))
            )
            total += math.fsum(us for trait, us in once.items() if trait in present)
        if metric in self.curves:
            total += self.curves[metric].value(*self.point(self.curves[metric], choice))
        return total

    def keeps(self, limits: Iterable[Limit], choice: Sequence[int]) -> bool:
        """Whether a choice keeps every limit, in full."""
        return all(limit.keeps(self.cost(limit.metric, choice)) for limit in limits)

    def allowed(self, choice: Sequence[int]) -> bool:
        """Whether a choice keeps every coupling."""
        return all(
            rule.lower <= sum(w[choice[slot]] for slot, w in rule.weights.items()) <= rule.upper
            for rule in self.couplings
        )
