"""The features of many candidates, multiplied without being built.

Letters: N candidates, G genes, P features, D functions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from predictors.encodings.genes import IntMatrix
from predictors.encodings.prior_scaled import FeatureMatrix, GeneEncoding


@dataclass(frozen=True)
class LazyFeatures:
    """Stands in for ``encoding.encode(levels)`` where a model is linear in it.

    A million candidates have gigabytes of features, and most of the time goes into writing them.
    ``features @ weights`` does without; `numpy.asarray` builds them.

    Args:
        encoding: makes the features.
        levels: a level matrix (N, G).
    """

    encoding: GeneEncoding
    levels: IntMatrix

    @property
    def shape(self) -> tuple[int, int]:
        """N and P."""
        return len(self.levels), len(self.encoding.columns)

    @property
    def dtype(self) -> np.dtype[np.float32]:
        """That of the features."""
        return np.dtype(np.float32)

    def __len__(self) -> int:
        return len(self.levels)

    def __getitem__(self, rows: slice) -> LazyFeatures:
        return LazyFeatures(self.encoding, self.levels[rows])

    def __matmul__(self, weights: NDArray[Any]) -> FeatureMatrix:
        """Return the features (N, P) times weights (P, D), in float32."""
        return self.encoding.multiply(self.levels, weights)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.asarray(self.encoding.encode(self.levels), dtype=dtype)
