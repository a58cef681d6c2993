"""Features of parameter dictionaries for small-sample regressors, with a prior per column.

Candidates travel as an integer matrix with one column per gene; an entry is the *level* of the
gene (the position among its values), so a hundred thousand of them encode in one sweep.
Letters: N candidates, G genes, P feature columns.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from searchspace.errors import UserError

IntMatrix = NDArray[np.int64]
FloatMatrix = NDArray[np.float64]

GRID_LEVELS = 2**20 + 1
_MAX_ENUMERATED = 2**16
_LAYER_NAME = re.compile(r"^layers\.(\d+)\.(.+)$")


@dataclass(frozen=True)
class Gene:
    """One parameter: what values it can take and on which scale they compare.

    Attributes:
        name: parameter name; ``layers.<i>.<gene>`` marks layer i of a repeated gene.
        kind: ``int``, ``float`` or ``categorical``.
        choices: the values of a categorical gene.
        low, high: inclusive bounds of a numeric gene.
        step: spacing of values; None for a continuous float or an int with spacing 1.
        log: whether values compare on a logarithmic scale.
    """

    name: str
    kind: Literal["int", "float", "categorical"]
    choices: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    step: float | None = None
    log: bool = False

    def __post_init__(self) -> None:
        if self.kind == "categorical" and not self.choices:
            raise UserError(f"gene {self.name!r} is categorical with no choices; give at least one")
        if self.kind != "categorical" and self.high < self.low:
            raise UserError(
                f"gene {self.name!r} has high={self.high} below low={self.low}; swap them"
            )

    @cached_property
    def num_levels(self) -> int:
        """Number of distinct levels; a continuous gene is cut into a fine grid."""
        if self.kind == "categorical":
            return len(self.choices)
        if self.high == self.low:
            return 1
        return GRID_LEVELS if self._on_grid else self._num_steps

    @cached_property
    def numeric_values(self) -> FloatMatrix | None:
        """Position of every level on a 0..1 scale, or None if the levels have no order."""
        if self.kind == "categorical":
            return _unit_of_choices(self.choices)
        if self.num_levels == 1:
            return np.zeros(1)
        if self._on_grid or not self.log:
            return np.linspace(0.0, 1.0, self.num_levels)
        values = self.low + np.arange(self.num_levels) * (self.step or 1)
        return np.asarray(np.log(values / self.low) / math.log(self.high / self.low))

    def value(self, level: int) -> Any:
        """Return the parameter value at `level`, as a plain Python object."""
        if self.kind == "categorical":
            return self.choices[level]
        number = (
            self._from_unit(level / (GRID_LEVELS - 1))
            if self._on_grid
            else (self.low + level * (self.step or 1))
        )
        number = min(max(number, self.low), self.high)
        if self.kind == "float":
            return float(number)
        step = int(self.step or 1)
        return int(self.low) + round((number - self.low) / step) * step

    def level(self, value: Any) -> int:
        """Return the nearest level of `value`.

        Raises:
            UserError: if a categorical value is not among the choices.
        """
        if self.kind == "categorical":
            return self._choice_level(value)
        if self.num_levels == 1:
            return 0
        if self._on_grid:
            position = self._to_unit(float(value)) * (GRID_LEVELS - 1)
        else:
            position = (float(value) - self.low) / (self.step or 1)
        return min(max(round(position), 0), self.num_levels - 1)

    @cached_property
    def _num_steps(self) -> int:
        return math.floor((self.high - self.low) / (self.step or 1) + 1e-8) + 1

    @cached_property
    def _on_grid(self) -> bool:
        continuous = self.kind == "float" and self.step is None
        return self.high > self.low and (continuous or self._num_steps > _MAX_ENUMERATED)

    def _to_unit(self, number: float) -> float:
        number = min(max(number, self.low), self.high)
        if self.log:
            return math.log(number / self.low) / math.log(self.high / self.low)
        return (number - self.low) / (self.high - self.low)

    def _from_unit(self, unit: float) -> float:
        if self.log:
            return self.low * math.exp(unit * math.log(self.high / self.low))
        return self.low + unit * (self.high - self.low)

    def _choice_level(self, value: Any) -> int:
        for level, choice in enumerate(self.choices):
            if choice is value or (type(choice) is type(value) and choice == value):
                return level
        for level, choice in enumerate(self.choices):
            if choice == value or (choice != choice and value != value):
                return level
        raise UserError(
            f"{self.name}={value!r} is not a choice; choose one of "
            f"{', '.join(map(repr, self.choices))}"
        )


def levels_of(genes: Sequence[Gene], params: Sequence[Mapping[str, Any]]) -> IntMatrix:
    """Turn parameter dictionaries into a level matrix, shape (N, G).

    A parameter that a dictionary lacks (a conditional one) takes level 0.
    """
    matrix = np.zeros((len(params), len(genes)), dtype=np.int64)
    for column, gene in enumerate(genes):
        for row, entry in enumerate(params):
            if gene.name in entry:
                matrix[row, column] = gene.level(entry[gene.name])
    return matrix


def params_of(genes: Sequence[Gene], matrix: IntMatrix) -> list[dict[str, Any]]:
    """Turn a level matrix of shape (N, G) into parameter dictionaries."""
    columns = []
    for column, gene in enumerate(genes):
        levels, inverse = np.unique(matrix[:, column], return_inverse=True)
        values = [gene.value(int(level)) for level in levels]
        columns.append([values[i] for i in inverse.reshape(-1)])
    names = [gene.name for gene in genes]
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def layer_groups(genes: Sequence[Gene]) -> dict[str, list[int]]:
    """Group the columns of repeated genes: gene name -> columns in layer order."""
    found: dict[str, list[tuple[int, int]]] = {}
    for column, gene in enumerate(genes):
        match = _LAYER_NAME.match(gene.name)
        if match:
            found.setdefault(match[2], []).append((int(match[1]), column))
    return {
        name: [column for _, column in sorted(entries)]
        for name, entries in found.items()
        if len(entries) > 1
    }


def _unit_of_choices(choices: tuple[Any, ...]) -> FloatMatrix | None:
    if len(choices) < 2:
        return np.zeros(len(choices))
    plain = all(isinstance(c, int | float) and not isinstance(c, bool) for c in choices)
    if not plain or not np.isfinite(np.array(choices, dtype=float)).all():
        return None
    values = np.array(choices, dtype=float)
    if len(set(choices)) < len(choices):
        return None
    # Ratios matter for sizes such as 128, 256, 512: spread them evenly by log.
    scaled = np.log(values) if values.min() > 0 and values.max() / values.min() >= 4 else values
    return np.asarray((scaled - scaled.min()) / (scaled.max() - scaled.min()))
