"""What the parts of a learned predictor have in common.

Letters: N training rows, M rows to predict, P features.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
State = Mapping[str, Any]


class Model(Protocol):
    """A regressor on finite float64 arrays whose fitted state is plain data.

    A model neither checks nor scales for the user: the estimator around it does. Fitting is
    deterministic; a model that needs random numbers takes a seed when it is made.
    """

    def fit(self, X: FloatArray, y: FloatArray) -> Self:
        """Fit to features of shape (N, P) and targets of shape (N,); N is at least 2."""
        ...

    def predict(self, X: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return the mean and standard deviation at X of shape (M, P), each of shape (M,).

        A model without its own idea of uncertainty gives one deviation for all rows.
        """
        ...

    def state(self) -> dict[str, Any]:
        """Return everything `predict` needs: JSON values and numpy arrays, nested as need be."""
        ...

    @classmethod
    def from_state(cls, state: State) -> Self:
        """Rebuild a fitted model: it predicts the same to the last bit."""
        ...
