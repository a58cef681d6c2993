"""How well perplexity is predicted on HW-GPT-Bench from few labels, ours beside its peers.

    python -m tests.benchmarks.hwgpt_quality --data DIR [--spaces s m] [--seeds 3] [--json]

Every model learns from the same networks (layer totals spread out, as a search's first design)
and is judged on 1000 uniform networks and on 300 near the front of perplexity and parameters:
Kendall's tau, and RMSE relative to the spread of perplexity over the uniform networks.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import kendalltau
from sklearn.ensemble import RandomForestRegressor
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel
from sklearn.linear_model import RidgeCV
from sklearn.neural_network import MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from predictors.benchmarks.hwgpt import SCALES, FloatArray, HwGptSpace, IntArray
from predictors.encodings import GeneEncoding
from predictors.quality import QualityRegressor
from tests.benchmarks._hwgpt_sets import aggregates, near_front, spread_sample

SIZES = (20, 50, 100, 200, 500)
MANY = 5000
LIMIT = "ridge, one-hot, all it can reach"
Encode = Callable[[IntArray], FloatArray]


def methods(space: HwGptSpace, seed: int) -> dict[str, tuple[Any, Encode]]:
    """Return by name an unfitted estimator and the encoding that it learns from."""
    encoding = GeneEncoding(space.genes)

    def scaled(X: IntArray) -> FloatArray:
        return encoding.encode(X).astype(np.float64)

    def genes(X: IntArray) -> FloatArray:
        return aggregates(space, X)

    kernel = ConstantKernel() * Matern(10.0, (1e-1, 1e4), nu=2.5) + WhiteKernel(1e-3)
    gaussian = GaussianProcessRegressor(kernel, normalize_y=True, random_state=seed)
    perceptron = MLPRegressor(hidden_layer_sizes=(128, 128), max_iter=500, random_state=seed)
    ridge = RidgeCV(np.geomspace(1e-3, 1e3, 13))
    return {
        "ours, scaled genes": (
            QualityRegressor(encoding.prior_scale, encoding.groups, random_state=seed),
            scaled,
        ),
        "ours, masked genes": (QualityRegressor(random_state=seed), genes),
        "ridge, one-hot": (ridge, space.one_hot),
        "ridge, scaled genes standardised": (make_pipeline(StandardScaler(), ridge), scaled),
        "random forest, one-hot": (RandomForestRegressor(200, random_state=seed), space.one_hot),
        "Gaussian process, one-hot": (gaussian, space.one_hot),
        "MLP, one-hot": (make_pipeline(StandardScaler(), perceptron), space.one_hot),
    }


def measure(space: HwGptSpace, sizes: Sequence[int], num_seeds: int) -> list[dict[str, Any]]:
    """Return one row per method and number of labels: means over seeds."""
    rng = np.random.default_rng(0)
    sets = {"all": space.sample(rng, 1000), "front": near_front(space, rng, 300)}
    truth = {name: space.perplexity(X) for name, X in sets.items()}
    spread = float(truth["all"].std())
    rows = [{"space": space.name, "labels": MANY, "method": LIMIT, **_limit(space, sets, truth)}]
    for size in sizes:
        found: dict[str, list[dict[str, float]]] = {}
        for seed in range(num_seeds):
            train = spread_sample(space, np.random.default_rng([seed, 1]), size)
            for name, (model, encode) in methods(space, seed).items():
                model.fit(encode(train), space.perplexity(train))
                predicted = {part: model.predict(encode(X)) for part, X in sets.items()}
                found.setdefault(name, []).append(_judge(predicted, truth, spread))
            print(f"{space.name}: {size} labels, seed {seed}", file=sys.stderr, flush=True)
        for name, results in found.items():
            means = {key: float(np.mean([r[key] for r in results])) for key in results[0]}
            rows.append({"space": space.name, "labels": size, "method": name, **means})
    return rows


def _limit(
    space: HwGptSpace, sets: dict[str, IntArray], truth: dict[str, FloatArray]
) -> dict[str, float]:
    """What a sum of one value per gene can reach at best: fitted to very many labels."""
    X = spread_sample(space, np.random.default_rng(1), MANY)
    model = RidgeCV([1e-6]).fit(space.one_hot(X), space.perplexity(X))
    predicted = {part: model.predict(space.one_hot(rows)) for part, rows in sets.items()}
    return _judge(predicted, truth, float(truth["all"].std()))


def _judge(
    predicted: dict[str, FloatArray], truth: dict[str, FloatArray], spread: float
) -> dict[str, float]:
    row = {}
    for part, y in truth.items():
        row[f"tau_{part}"] = float(kendalltau(predicted[part], y).statistic)
        row[f"rmse_{part}"] = float(np.sqrt(np.mean((predicted[part] - y) ** 2)) / spread)
    return row


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="folder with hwgpt_{s,m}.npz")
    parser.add_argument("--spaces", nargs="*", default=list(SCALES), choices=list(SCALES))
    parser.add_argument("--sizes", nargs="*", type=int, default=list(SIZES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args(arguments)
    # The peers' own complaints (bounds of length scales, iterations) are no result.
    warnings.filterwarnings("ignore", category=ConvergenceWarning)
    folder = args.data / "hwgpt" if (args.data / "hwgpt").is_dir() else args.data
    rows = []
    for name in args.spaces:
        rows += measure(HwGptSpace.load(folder, name), args.sizes, args.seeds)
    if args.json:
        print(json.dumps(rows, indent=1))
        return
    _print_table(rows)


def _print_table(rows: Sequence[dict[str, Any]]) -> None:
    print("space  labels  tau all  RMSE all  tau front  RMSE front  method")
    for row in rows:
        print(
            f"{row['space']:>5}  {row['labels']:6}  {row['tau_all']:7.3f}  {row['rmse_all']:8.3f}  "
            f"{row['tau_front']:9.3f}  {row['rmse_front']:10.3f}  {row['method']}"
        )


if __name__ == "__main__":
    main()
