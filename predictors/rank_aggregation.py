"""One order out of several metrics' orders, without labels.

Shapes: M metrics, N archs.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray

from searchspace.errors import UserError

logger = logging.getLogger(__name__)
FloatArray = NDArray[np.float64]

COMBINED = ("head_confidence", "synflow", "v_pca", "softmax_confidence", "naswot")
"""The training-free metrics whose ranks are combined where nobody names others.

Each looks at something else: the size of projections, the flow through weights, the directions
that hidden units use, how sharp attention is, how tokens are told apart. On NAS-Bench-BERT they are
the best five that none of the others explains (`tests/benchmarks/nas_bench_bert.py`).
"""

ROUNDS = 20
"""Of weighing; the weights stand still after a few."""


def rank_aggregate(scores: Mapping[str, ArrayLike]) -> FloatArray:
    """Return the mean over metrics of the normal scores of the archs' ranks, weighed by agreement.

    Normal scores ``Phi^-1((rank - 1/2) / n)`` do not care about a metric's scale, and ties share
    their mean rank. A metric counts as much as it correlates with the others' weighed mean, and not
    at all where that is negative: one that is nonsense in a space, or says the contrary, cannot
    spoil the order of those that agree. Of two metrics both count alike.

    A metric that is constant or not finite everywhere says nothing about an order: it is left out,
    and a warning is logged.

    Args:
        scores: for every metric one value per arch; higher is better.

    Returns:
        One value per arch, shape (N,); higher is better.

    Raises:
        UserError: when lengths differ or no metric is left.
    """
    # A config reads this module for `COMBINED`, and needs none of SciPy.
    from scipy.special import ndtri
    from scipy.stats import rankdata

    arrays = {name: np.asarray(values, dtype=np.float64) for name, values in scores.items()}
    shapes = {name: values.shape for name, values in arrays.items()}
    if len(set(shapes.values())) > 1 or any(len(shape) != 1 for shape in shapes.values()):
        raise UserError(f"metrics have scores of different shapes {shapes}; give one per arch each")
    useful = {name: values for name, values in arrays.items() if not _useless(name, values)}
    if not useful:
        raise UserError(
            f"none of the metrics {', '.join(scores) or '(none given)'} tells the archs apart; "
            "score more archs or choose other metrics"
        )
    ranks_MN = np.stack([rankdata(values) for values in useful.values()])
    normal_MN: FloatArray = ndtri((ranks_MN - 0.5) / ranks_MN.shape[1])
    weights_M = agreement(normal_MN)
    for name, weight in zip(useful, weights_M, strict=True):
        if weight == 0:
            logger.warning("metric %r left out: it contradicts the others", name)
    return np.asarray(weights_M @ normal_MN)


def agreement(scores_MN: ArrayLike) -> FloatArray:
    """Return how much each metric counts, (M,): all at least 0, their sum 1.

    It is a metric's correlation with the weighed sum of the others, floored at 0, found by
    iterating from equal weights; equal weights for one or two metrics, and where no two agree.
    """
    correlations_MM = np.atleast_2d(np.corrcoef(np.asarray(scores_MN, dtype=np.float64)))
    num_metrics = len(correlations_MM)
    equal_M = np.full(num_metrics, 1 / num_metrics)
    if num_metrics < 3:
        return equal_M
    weights_M = equal_M
    for _ in range(ROUNDS):
        found_M = np.maximum(_with_others(correlations_MM, weights_M), 0.0)
        if not found_M.any():
            return equal_M
        weights_M = found_M / found_M.sum()
    return weights_M


def _with_others(correlations_MM: FloatArray, weights_M: FloatArray) -> FloatArray:
    """Return each metric's correlation with the weighed sum of the others."""
    others_MM = np.where(np.eye(len(weights_M), dtype=bool), 0.0, weights_M)
    covariance_M = (others_MM * correlations_MM).sum(axis=1)
    variance_M = np.einsum("ij,jk,ik->i", others_MM, correlations_MM, others_MM)
    return np.asarray(covariance_M / np.sqrt(np.maximum(variance_M, 1e-300)))


def _useless(name: str, values: FloatArray) -> bool:
    if not np.isfinite(values).all():
        logger.warning(
            "metric %r left out: it is not finite for %d archs",
            name,
            int((~np.isfinite(values)).sum()),
        )
        return True
    if len(values) == 0 or (values == values[0]).all():
        logger.warning("metric %r left out: it is the same for all archs", name)
        return True
    return False
