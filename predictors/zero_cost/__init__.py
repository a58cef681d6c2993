"""Training-free metrics. To add one: a function in a file here, and a line in `METRICS`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from predictors.zero_cost.activation_distance import activation_distance
from predictors.zero_cost.block_linearity import block_linearity
from predictors.zero_cost.dss import dss
from predictors.zero_cost.fisher import fisher
from predictors.zero_cost.flops import flops
from predictors.zero_cost.grad_norm import grad_norm
from predictors.zero_cost.grasp import grasp
from predictors.zero_cost.head_confidence import head_confidence
from predictors.zero_cost.head_importance import head_importance
from predictors.zero_cost.hidden_covariance import hidden_covariance
from predictors.zero_cost.inits import INITS
from predictors.zero_cost.jacob_cov import jacob_cov
from predictors.zero_cost.jacobian_cosine import jacobian_cosine
from predictors.zero_cost.naswot import naswot
from predictors.zero_cost.params import params
from predictors.zero_cost.plain import plain
from predictors.zero_cost.probe import Batch, Metric, Probe
from predictors.zero_cost.scoring import apply_metric, draw_seed, score_with
from predictors.zero_cost.signal_propagation import signal_propagation
from predictors.zero_cost.snip import snip
from predictors.zero_cost.softmax_confidence import softmax_confidence
from predictors.zero_cost.synaptic_diversity import synaptic_diversity
from predictors.zero_cost.synaptic_saliency import synaptic_saliency
from predictors.zero_cost.synflow import synflow
from predictors.zero_cost.v_pca import v_pca
from predictors.zero_cost.w_pca import w_pca
from predictors.zero_cost.zen import zen
from searchspace.arch import Arch
from searchspace.errors import unknown

METRICS: dict[str, Metric] = {
    "params": params,
    "flops": flops,
    "grad_norm": grad_norm,
    "plain": plain,
    "snip": snip,
    "grasp": grasp,
    "fisher": fisher,
    "synflow": synflow,
    "synaptic_diversity": synaptic_diversity,
    "synaptic_saliency": synaptic_saliency,
    "dss": dss,
    "head_importance": head_importance,
    "naswot": naswot,
    "jacob_cov": jacob_cov,
    "jacobian_cosine": jacobian_cosine,
    "activation_distance": activation_distance,
    "head_confidence": head_confidence,
    "softmax_confidence": softmax_confidence,
    "hidden_covariance": hidden_covariance,
    "v_pca": v_pca,
    "w_pca": w_pca,
    "zen": zen,
    "signal_propagation": signal_propagation,
    "block_linearity": block_linearity,
}
"""Every training-free metric by name."""

FAN_IN = ("head_confidence", "v_pca", "w_pca", "signal_propagation", "block_linearity")
"""The metrics that look at a network as training begins with it here (``"fan_in"`` of `INITS`).

At weights of the same small deviation in all widths, the layers of a narrow network hardly add
anything to the stream, and these would describe its embedding. The others are taken where their
sources take them (``"normal"``).
"""

__all__ = [
    "FAN_IN",
    "INITS",
    "METRICS",
    "Batch",
    "Metric",
    "Probe",
    "score_arch",
    "score_archs",
]


def get_metric(name: str) -> Metric:
    """Return a metric by name.

    Raises:
        UserError: for an unknown name, with the nearest known one.
    """
    if name not in METRICS:
        raise unknown("metric", name, METRICS)
    return METRICS[name]


def init_of(name: str) -> str:
    """Return the key of `INITS` that a metric is taken at where nobody says another."""
    return "fan_in" if name in FAN_IN else "normal"


def score_arch(
    name: str, arch: Arch, batch: Batch, rng: np.random.Generator, init: str | None = None
) -> float:
    """Score one arch at random weights; higher means expected better.

    Args:
        name: a key of `METRICS`.
        arch: what is scored.
        batch: inputs and targets; see `probe.Batch`.
        rng: draws the seed of the weights.
        init: how weights are drawn, a key of `INITS`; None for `init_of` the metric.

    Raises:
        UserError: for an unknown metric or init, an unfit batch, or a value that cannot be had (the
            reason is given; no metric ever returns NaN).
    """
    metric = get_metric(name)
    probe = Probe(arch, batch, draw_seed(rng), init=init or init_of(name))
    return apply_metric(name, metric, probe)


def score_archs(
    names: Sequence[str],
    archs: Sequence[Arch],
    batch: Batch,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
    init: str | None = None,
) -> dict[str, NDArray[np.float64]]:
    """Score archs by several metrics, which share networks and passes.

    Every score equals ``score_arch(name, arch, batch, np.random.default_rng(seed), init)``, so it
    does not depend on which other archs and metrics are scored beside it.

    Args:
        names: keys of `METRICS`.
        archs: what is scored.
        batch: inputs and targets; see `probe.Batch`.
        seed: of the weights, the same for every arch.
        progress: called after every arch with the number done and the number of all.
        init: how weights are drawn, a key of `INITS`; None for `init_of` each metric.

    Returns:
        For every name an array of shape (len(archs),).

    Raises:
        UserError: as `score_arch`.
    """
    metrics = {name: (get_metric(name), init or init_of(name)) for name in names}
    return score_with(metrics, archs, batch, seed, progress)
