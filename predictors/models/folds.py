"""Cross-validation folds that never split equal rows. Letters: N rows, Q columns."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from predictors.models.base import FloatArray


def row_folds(X: FloatArray, num_folds: int, seed: int) -> NDArray[np.int64]:
    """Return the fold of every row, shape (N,).

    Rows with equal features are replicates of one network: held out together, or the error of a
    prediction would be judged on what was learned by heart.

    Args:
        X: features, shape (N, Q), finite.
        num_folds: at most; fewer when there are fewer distinct rows.
        seed: of the shuffling.
    """
    _, place = np.unique(X, axis=0, return_inverse=True)
    place = place.reshape(-1)
    distinct = int(place.max()) + 1
    order = np.random.default_rng(seed).permutation(distinct)
    return np.asarray((order % min(num_folds, distinct))[place])
