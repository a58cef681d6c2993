"""Ranking NAS-Bench-BERT networks with a predictor learned from few of their scores.

Features are computed from the entries alone: of the network that was trained and, to show what
that is worth, of the network that the entry describes.
Letters: N entries, P features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import kendalltau

from predictors.benchmarks.nas_bench_bert import BertEntry, BertLayer
from predictors.quality import QualityRegressor

FloatArray = NDArray[np.float64]

MAX_LAYERS = 4
TRAINED_NAMES = (
    "log_params",
    "log_layers",
    "log_hidden",
    "layers_x_log_hidden",
    "log_total_heads",
    "mean_log_ffn_params",
    "trend_of_log_ffn_params",
    "mean_log_head_size",
)


def learned_table(
    entries: Sequence[BertEntry],
    features: Mapping[str, ArrayLike],
    labels: ArrayLike,
    groups: Sequence[int],
    sizes: Sequence[int] = (20, 50, 100),
    num_splits: int = 20,
) -> list[dict[str, Any]]:
    """Return one row per feature set: tie-broken Kendall tau learned from each number of labels.

    Args:
        entries: the networks, N.
        features: by name, matrix of shape (N, P); NaN means "not there".
        labels: scores, shape (N,), higher is better.
        groups: number of each network's group of replicates; a group is never split.
        sizes: numbers of labels.
        num_splits: random splits per size; all other networks are the test.
    """
    y = np.asarray(labels, dtype=np.float64)
    rows = []
    for name, given in features.items():
        X = np.asarray(given, dtype=np.float64)
        if X.shape[0] != len(entries):
            raise ValueError(f"features {name!r} have {X.shape[0]} rows for {len(entries)} entries")
        row: dict[str, Any] = {"features": name, "columns": X.shape[1]}
        for size in sizes:
            taus = []
            for seed in range(num_splits):
                train = group_split(groups, size, np.random.default_rng([seed, size]))
                model = QualityRegressor().fit(X[train], y[train])
                taus.append(tie_broken_tau(np.asarray(model.predict(X[~train])), y[~train]))
            row[f"tau_{size}"] = float(np.mean(taus))
            row[f"sd_{size}"] = float(np.std(taus))
        rows.append(row)
    return rows


def group_split(groups: Sequence[int], size: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Return which entries are for training: whole groups in random order, `size` in all."""
    number = np.asarray(groups)
    train = np.zeros(len(number), dtype=bool)
    for group in rng.permutation(np.unique(number)):
        members = number == group
        # A group too large for what is left is passed over, a smaller one fills the gap.
        if train.sum() + members.sum() <= size:
            train |= members
    return train


def tie_broken_tau(predicted: FloatArray, labels: FloatArray) -> float:
    """Return Kendall's tau with ties of the prediction broken at random (tau-b flatters them)."""
    order = np.lexsort((np.random.default_rng(0).random(len(predicted)), predicted))
    rank = np.empty(len(predicted))
    rank[order] = np.arange(len(predicted))
    return float(kendalltau(rank, labels).statistic)


def trained_features(entries: Sequence[BertEntry]) -> FloatArray:
    """Return sizes of the networks as trained, shape (N, 8), named by `TRAINED_NAMES`.

    Plain attention; feed-forward stacks of widths ``[4 hidden] + [given] * (number - 1)``. Sizes
    enter by their logarithm, since returns on size diminish.
    """
    return np.array([_trained(entry) for entry in entries])


def nominal_features(entries: Sequence[BertEntry]) -> FloatArray:
    """Return what the entries say, shape (N, P): genes of every layer and totals over layers.

    Genes of a layer that is not there are NaN.
    """
    return np.array([_nominal(entry) for entry in entries])


def _trained(entry: BertEntry) -> list[float]:
    hidden, depth = entry.hidden_size, len(entry.layers)
    ffn = np.array([_ffn_params(hidden, layer) for layer in entry.layers], dtype=np.float64)
    heads = np.array([layer.num_operation_heads for layer in entry.layers])
    position = np.linspace(-1.0, 1.0, depth)
    return [
        float(np.log(ffn.sum() + depth * 4 * hidden**2)),
        float(np.log(depth)),
        float(np.log(hidden)),
        float(depth * np.log(hidden)),
        float(np.log(heads.sum())),
        float(np.log(ffn).mean()),
        float((position * np.log(ffn)).mean()),
        float(np.log(hidden / heads).mean()),
    ]


def _ffn_params(hidden: int, layer: BertLayer) -> int:
    inner = [layer.feed_forward_dimension] * (layer.num_feed_forward - 1)
    widths = [hidden, 4 * hidden, *inner, hidden]
    return sum(a * b for a, b in pairwise(widths))


def _nominal(entry: BertEntry) -> list[float]:
    kinds = ("SA", "LT", "DSC")
    parameters = ("SDP", "WMA", "DFT", "DCT", 5, 9)
    layers = entry.layers
    row: list[float] = [len(layers), entry.hidden_size]
    row += [sum(layer.operation_type == kind for layer in layers) for kind in kinds]
    row += [sum(layer.operation_parameter == value for layer in layers) for value in parameters]
    row += [sum(layer.num_operation_heads for layer in layers)]
    row += [sum(layer.feed_forward_dimension * layer.num_feed_forward for layer in layers)]
    for layer in layers:
        row += [layer.operation_type == kind for kind in kinds]
        row += [layer.num_operation_heads, layer.feed_forward_dimension, layer.num_feed_forward]
    return row + [np.nan] * (6 * (MAX_LAYERS - len(layers)))
