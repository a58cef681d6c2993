"""Training-free metrics. To add one: a function in a file here, and a line in `METRICS`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from predictors.zero_cost.flops import flops
from predictors.zero_cost.grad_norm import grad_norm
from predictors.zero_cost.jacob_cov import jacob_cov
from predictors.zero_cost.naswot import naswot
from predictors.zero_cost.params import params
from predictors.zero_cost.probe import Batch, Metric, Probe
from predictors.zero_cost.scoring import apply_metric, draw_seed, rank_aggregate, score_with
from predictors.zero_cost.snip import snip
from predictors.zero_cost.synflow import synflow
from searchspace.arch import Arch
from searchspace.errors import unknown

METRICS: dict[str, Metric] = {
    "params": params,
    "flops": flops,
    "grad_norm": grad_norm,
    "snip": snip,
    "synflow": synflow,
    "naswot": naswot,
    "jacob_cov": jacob_cov,
}
"""Every training-free metric by name."""

__all__ = ["METRICS", "Batch", "Metric", "Probe", "rank_aggregate", "score_arch", "score_archs"]


def get_metric(name: str) -> Metric:
    """Return a metric by name.

    Raises:
        UserError: for an unknown name, with the nearest known one.
    """
    if name not in METRICS:
        raise unknown("metric", name, METRICS)
    return METRICS[name]


def score_arch(name: str, arch: Arch, batch: Batch, rng: np.random.Generator) -> float:
    """Score one arch at random weights; higher means expected better.

    Args:
        name: a key of `METRICS`.
        arch: what is scored.
        batch: inputs and targets; see `probe.Batch`.
        rng: draws the seed of the weights.

    Raises:
        UserError: for an unknown metric, an unfit batch, or a value that cannot be had (the
            reason is given; no metric ever returns NaN).
    """
    return apply_metric(name, get_metric(name), Probe(arch, batch, draw_seed(rng)))


def score_archs(
    names: Sequence[str],
    archs: Sequence[Arch],
    batch: Batch,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, NDArray[np.float64]]:
    """Score archs by several metrics, which share one network and one backward pass per arch.

    Every score equals ``score_arch(name, arch, batch, np.random.default_rng(seed))``, so it does
    not depend on which other archs and metrics are scored beside it.

    Args:
        names: keys of `METRICS`.
        archs: what is scored.
        batch: inputs and targets; see `probe.Batch`.
        seed: of the weights, the same for every arch.
        progress: called after every arch with the number done and the number of all.

    Returns:
        For every name an array of shape (len(archs),).

    Raises:
        UserError: as `score_arch`.
    """
    metrics = {name: get_metric(name) for name in names}
    return score_with(metrics, archs, batch, seed, progress)
