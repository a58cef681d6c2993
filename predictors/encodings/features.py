"""`Features`: a matrix whose columns have names.

Letters: N archs, P features, M metrics.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from searchspace.errors import UserError

logger = logging.getLogger(__name__)
FloatMatrix = NDArray[np.float64]

COUNT, SHARE = "count of ", "share of "
"""How the names of columns begin that exist only where something occurs; elsewhere they are 0."""


@dataclass(frozen=True)
class Features:
    """Features of some archs.

    Args:
        values: one row per arch, shape (N, P), float64. NaN stands for a gene that is not there.
        names: of the columns, each different.

    Raises:
        UserError: when the shapes disagree or a name occurs twice.
    """

    values: FloatMatrix
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.values.ndim != 2 or self.values.shape[1] != len(self.names):
            raise UserError(
                f"features of shape {self.values.shape} have {len(self.names)} names; give one "
                "name per column"
            )
        if len(set(self.names)) < len(self.names):
            twice = next(name for name in self.names if self.names.count(name) > 1)
            raise UserError(f"two features are called {twice!r}; give each its own name")

    def column(self, name: str) -> FloatMatrix:
        """Return the values of a feature, shape (N,).

        Raises:
            UserError: when there is none of that name.
        """
        if name not in self.names:
            raise _absent([name])
        return np.asarray(self.values[:, self.names.index(name)])

    def aligned(self, names: Sequence[str]) -> Features:
        """Return the columns that a predictor knows, in its order.

        A count or share that occurs in none of these archs is 0. One that the predictor has never
        seen is left out (it knows nothing about it), and a warning is logged.

        Args:
            names: the columns that the predictor was fitted on.

        Raises:
            UserError: when one of them is neither here nor a count or share, or another column is
                here that the predictor does not know.
        """
        here = {name: column for column, name in enumerate(self.names)}
        missing = [name for name in names if name not in here and not _is_optional(name)]
        if missing:
            raise _absent(missing)
        known = set(names)
        extra = [name for name in self.names if name not in known]
        foreign = [name for name in extra if not _is_optional(name)]
        if foreign:
            raise UserError(
                f"the predictor was not fitted on {_listed(foreign)}; encode the archs with the "
                "encoding and the search space it was fitted with"
            )
        if extra:
            logger.warning("left out, as the predictor has never seen it: %s", _listed(extra))
        values = np.zeros((len(self.values), len(names)))
        for column, name in enumerate(names):
            if name in here:
                values[:, column] = self.values[:, here[name]]
        return Features(values, tuple(names))


def join(*parts: Features) -> Features:
    """Return the columns of several features of the same archs side by side.

    Raises:
        UserError: when they are of different numbers of archs, or a name occurs twice.
    """
    if len({len(part.values) for part in parts}) > 1:
        raise UserError(
            f"features of {', '.join(str(len(part.values)) for part in parts)} archs cannot stand "
            "side by side; encode the same archs"
        )
    return Features(np.hstack([p.values for p in parts]), sum((p.names for p in parts), ()))


def with_metrics(features: Features, scores: Mapping[str, ArrayLike]) -> Features:
    """Return the features with training-free metrics (or anything else known) as more columns.

    Args:
        features: of N archs.
        scores: for each of M metrics one value per arch, shape (N,).

    Returns:
        Features of shape (N, P + M); each metric keeps its name.

    Raises:
        UserError: for another number of values, one that is not finite, or a name that is taken.
    """
    columns = {name: np.asarray(values, dtype=np.float64) for name, values in scores.items()}
    for name, values in columns.items():
        if values.shape != (len(features.values),):
            raise UserError(
                f"metric {name!r} has values of shape {values.shape} for {len(features.values)} "
                "archs; give one per arch"
            )
        if not np.isfinite(values).all():
            raise UserError(
                f"metric {name!r} is not finite for {int((~np.isfinite(values)).sum())} archs; "
                "leave the metric or these archs out"
            )
    if not columns:
        return features
    return join(features, Features(np.stack(list(columns.values()), axis=1), tuple(columns)))


def _is_optional(name: str) -> bool:
    return name.startswith((COUNT, SHARE))


def _absent(names: Sequence[str]) -> UserError:
    return UserError(
        f"the features have no {_listed(names)}; encode the archs with the encoding and the "
        "search space that the predictor was fitted with"
    )


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:3]))
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
