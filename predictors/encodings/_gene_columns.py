"""What columns genes give: base columns of their levels, and which products are worth having."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations_with_replacement

import numpy as np
from numpy.typing import NDArray

from predictors.encodings.genes import Gene

FloatMatrix = NDArray[np.float64]
_MAX_PRODUCTS = 240
SCALE = {
    "global": 1.0,
    "extra": 0.1,
    "total": 1.0,
    "moment": 0.4,
    "product": 0.3,
    "global_product": 0.6,
    "moment_product": 0.3,
}
"""Expected size of the effect of a column by its kind, relative to the others."""

DEVIATION = 0.3
SCALED_DEVIATION = 0.2
"""That of one layer's deviation from the mean, and of it times the size; by 1/sqrt(layers)."""


def table(gene: Gene) -> FloatMatrix:
    """Return a level's base columns: -1..1 for ordered levels, centred one-hot otherwise."""
    positions = gene.numeric_values
    if positions is None:
        if gene.num_levels == 2:
            return np.array([[-1.0], [1.0]])
        return np.eye(gene.num_levels) * 2.0 - 2.0 / gene.num_levels
    if gene.num_levels < 2:
        return np.zeros((1, 0))
    if gene.num_levels > 4096:
        return np.zeros((0, 1))
    linear = 2.0 * positions[:, None] - 1.0
    if gene.kind != "categorical" or gene.num_levels == 2:
        return linear
    # A categorical of numbers is ordered, not always smooth: a bend, smaller than the slope.
    return np.hstack([linear, 0.75 * linear**2 - 0.5])


def size_column(kinds: Sequence[str]) -> int | None:
    """Return the column of the network's size, which what a layer is worth scales with."""
    for kind in ("global", "extra"):
        if kind in kinds and "total" in kinds:
            return list(kinds).index(kind)
    return None


def product_pairs(kinds: Sequence[str], size_column: int | None) -> list[tuple[int, int]]:
    """Return squares and products of globals, extras and totals, most useful first, capped."""
    usable = [i for i, kind in enumerate(kinds) if kind in ("global", "extra", "total")]
    pairs = list(combinations_with_replacement(usable, 2))

    def order(pair: tuple[int, int]) -> tuple[bool, bool]:
        a, b = pair
        return (a != b, {kinds[a], kinds[b]} == {"total"})

    chosen = sorted(pairs, key=order)[:_MAX_PRODUCTS]
    if size_column is not None:
        chosen += [(size_column, i) for i, kind in enumerate(kinds) if kind == "moment"]
    return chosen


def kind_of_product(left: str, right: str, square: bool) -> str:
    """Return the kind of a product of two columns."""
    if "moment" in (left, right):
        return "moment_product"
    crosses_global = bool({left, right} & {"global", "extra"}) and not square
    return "global_product" if crosses_global else "product"
