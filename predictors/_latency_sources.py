"""Other devices' regressors as features of a new device. Letters: M rows, P features, S devices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from predictors.models.base import FloatArray
from searchspace.errors import UserError


class Source(Protocol):
    """A fitted regressor of another device's latency on the same features."""

    def predict(self, X: FloatArray) -> Any:
        """Return latencies (M,) of features (M, P)."""
        ...


def source_values(sources: Sequence[Source], X: FloatArray) -> FloatArray:
    """Return what each source says of features (M, P), shape (M, S).

    Raises:
        UserError: when a source gives another shape or values that are not finite.
    """
    columns = []
    for number, source in enumerate(sources):
        values = np.asarray(source.predict(X), dtype=np.float64)
        if values.shape != (len(X),) or not np.isfinite(values).all():
            raise UserError(
                f"sources[{number}] predicts shape {values.shape} with finite="
                f"{bool(np.isfinite(values).all())} for {len(X)} rows; give regressors fitted "
                "on the same features"
            )
        columns.append(values)
    return np.stack(columns, axis=1) if columns else np.empty((len(X), 0))
