"""Scoring archs by several metrics at once, and making one score of them."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri
from scipy.stats import rankdata

from predictors.zero_cost.probe import Batch, Metric, Probe
from searchspace.arch import Arch
from searchspace.errors import UserError

logger = logging.getLogger(__name__)
FloatArray = NDArray[np.float64]


def draw_seed(rng: np.random.Generator) -> int:
    """Draw the seed of a network's weights."""
    return int(rng.integers(2**63 - 1))


def apply_metric(name: str, metric: Metric, probe: Probe) -> float:
    """Return a metric's value.

    Raises:
        UserError: naming metric and arch when the value is not finite or cannot be had.
    """
    try:
        value = metric(probe)
    except UserError as error:
        raise UserError(f"metric {name!r} of arch {probe.arch.id}: {error}") from None
    if not math.isfinite(value):
        raise UserError(
            f"metric {name!r} of arch {probe.arch.id} is {value}; leave the metric or the arch out"
        )
    return value


def score_with(
    metrics: Mapping[str, Metric],
    archs: Sequence[Arch],
    batch: Batch,
    seed: int,
    progress: Callable[[int, int], None] | None,
) -> dict[str, FloatArray]:
    """Score every arch by every metric; see `predictors.zero_cost.score_archs`."""
    scores = {name: np.empty(len(archs)) for name in metrics}
    for index, arch in enumerate(archs):
        probe = Probe(arch, batch, draw_seed(np.random.default_rng(seed)))
        for name, metric in metrics.items():
            scores[name][index] = apply_metric(name, metric, probe)
        if progress is not None:
            progress(index + 1, len(archs))
    return scores


def rank_aggregate(scores: Mapping[str, ArrayLike]) -> FloatArray:
    """Return the mean over metrics of the normal scores of the archs' ranks.

    Normal scores ``Phi^-1((rank - 1/2) / n)`` do not care about a metric's scale, and ties share
    their mean rank. A metric that is constant or not finite everywhere says nothing about an
    order: it is left out, and a warning is logged.

    Args:
        scores: for every metric one value per arch; higher is better.

    Returns:
        One value per arch, shape (n,); higher is better.

    Raises:
        UserError: when lengths differ or no metric is left.
    """
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
    ranks = np.stack([rankdata(values) for values in useful.values()])
    normal: FloatArray = ndtri((ranks - 0.5) / ranks.shape[1])
    return np.asarray(normal.mean(axis=0))


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
