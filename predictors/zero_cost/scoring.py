"""Scoring archs by several metrics at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from predictors.zero_cost.probe import Batch, Metric, Probe
from searchspace.arch import Arch
from searchspace.errors import UserError

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
    metrics: Mapping[str, tuple[Metric, str]],
    archs: Sequence[Arch],
    batch: Batch,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, FloatArray]:
    """Score every arch by every metric, each at its own init; see `score_archs`."""
    scores = {name: np.empty(len(archs)) for name in metrics}
    weights_seed = draw_seed(np.random.default_rng(seed))
    for index, arch in enumerate(archs):
        probes = {init: Probe(arch, batch, weights_seed, init=init) for _, init in metrics.values()}
        for name, (metric, init) in metrics.items():
            scores[name][index] = apply_metric(name, metric, probes[init])
        if progress is not None:
            progress(index + 1, len(archs))
    return scores
