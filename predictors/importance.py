"""Which features a predictor listens to.

Letters: N rows, P features.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from predictors.encodings import Features

FloatArray = NDArray[np.float64]
NUM_REPEATS = 5


def permutation_importance(
    predict: Callable[[FloatArray], FloatArray],
    features: Features,
    rng: np.random.Generator,
    num_repeats: int = NUM_REPEATS,
) -> dict[str, float]:
    """Return how much predictions change when one feature is shuffled among the rows.

    The change is the root mean square over rows and repeats, in the target's unit. No labels are
    needed, so it tells what the predictor listens to, not whether it is right to. Of features
    that say the same (depth and its logarithm) each gets a part.

    Args:
        predict: from features (N, P) to predictions (N,).
        features: rows to shuffle, N at least 2 for anything to change.
        rng: draws the permutations.
        num_repeats: permutations per feature.

    Returns:
        For every feature its importance, the largest first.

    Source: Breiman 2001, "Random Forests", section 10; here the change of the prediction itself
    stands in place of the loss of accuracy.
    """
    X = features.values
    base = predict(X)
    found: dict[str, float] = {}
    for column, name in enumerate(features.names):
        values = X[:, column]
        if len(X) < 2 or np.array_equal(values, np.full_like(values, values[0]), equal_nan=True):
            found[name] = 0.0
            continue
        changed = np.repeat(X, num_repeats, axis=0)
        changed[:, column] = np.stack([rng.permutation(values) for _ in range(num_repeats)]).T.flat
        change = predict(changed) - np.repeat(base, num_repeats)
        found[name] = float(np.sqrt(np.mean(change**2)))
    return dict(sorted(found.items(), key=lambda item: -item[1]))
