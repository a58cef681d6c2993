"""Hypervolume reached by each sampler after a number of evaluations.

Without data: a synthetic two-objective layered space with interactions and noise. With
``--data DIR`` also the public HW-GPT-Bench surrogates (perplexity and parameters) stored as
``hwgpt_{s,m}.npz`` and ``front_{s,m}_pp.npz``.

    python -m tests.benchmarks.sampler_hypervolume --seeds 3 --evals 200 [--json]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nas.pareto import hypervolume, non_dominated, normalise
from nas.samplers import GeneCodec, make_sampler
from predictors.encodings import Gene

FloatArray = NDArray[np.float64]
CHECKPOINTS = (10, 20, 30, 50, 100, 200, 500, 1000)


class Problem(Protocol):
    """A space with a free cost (objective 1) and a costly quality (objective 0)."""

    name: str
    genes: list[Gene]
    ideal: FloatArray
    nadir: FloatArray
    best_volume: float

    def quality(self, levels: NDArray[np.int64]) -> FloatArray: ...

    def evaluate(self, levels: NDArray[np.int64]) -> FloatArray: ...

    def cost(self, levels: NDArray[np.int64]) -> FloatArray: ...

    def canonical(self, levels: NDArray[np.int64]) -> NDArray[np.int64]: ...


class ProblemCodec(GeneCodec):
    """The vectorised view of a problem that the predictor-guided sampler takes."""

    exact_indices = (1,)

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.genes)
        self.problem = problem

    def canonical(self, matrix: NDArray[np.int64]) -> NDArray[np.int64]:
        return self.problem.canonical(matrix)

    def exact_objectives(self, matrix: NDArray[np.int64]) -> FloatArray:
        return self.problem.cost(matrix)[:, None]


class Layered:
    """Synthetic: saturating layer gains, mixer synergies, position effects and noise."""

    def __init__(self, num_layers: int = 12, noise: float = 0.01, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.name, self._layers, self._noise = "layered", num_layers, noise
        mixers = ("softmax", "window", "linear", "none")
        self.genes = [Gene("width", "categorical", (64, 96, 128))]
        for i in range(num_layers):
            self.genes += [
                Gene(f"layers.{i}.mixer", "categorical", mixers),
                Gene(f"layers.{i}.heads", "int", low=1, high=4),
                Gene(f"layers.{i}.ffn", "categorical", (0, 1, 2, 4)),
            ]
        self._mixer_value = np.array([1.0, 0.8, 0.6, 0.0])
        self._mixer_cost = np.array([1.0, 0.6, 0.4, 0.0])
        self._position = rng.uniform(0.6, 1.4, num_layers)
        self._synergy = rng.normal(0.0, 0.15, (4, 4))
        self._noise_rng = np.random.default_rng(seed + 1)
        sample = self._reference_front()
        self.ideal, self.nadir = sample.min(axis=0), sample.max(axis=0)
        unit = normalise(sample, self.ideal, self.nadir)
        self.best_volume = hypervolume(unit, [1.1, 1.1])

    def _split(self, levels: NDArray[np.int64]) -> tuple[NDArray[np.int64], ...]:
        return levels[:, 0], levels[:, 1::3], levels[:, 2::3], levels[:, 3::3]

    def canonical(self, levels: NDArray[np.int64]) -> NDArray[np.int64]:
        out = levels.copy()
        out[:, 2::3][levels[:, 1::3] == 3] = 0
        return out

    def cost(self, levels: NDArray[np.int64]) -> FloatArray:
        width, mixer, heads, ffn = self._split(levels)
        size = np.array([64, 96, 128])[width] / 64.0
        per_layer = self._mixer_cost[mixer] * (0.4 + 0.15 * heads)
        per_layer = per_layer + 0.5 * np.array([0, 1, 2, 4])[ffn]
        return np.asarray(size**1.5 * per_layer.sum(axis=1) + 2 * size)

    def quality(self, levels: NDArray[np.int64]) -> FloatArray:
        width, mixer, heads, ffn = self._split(levels)
        gain = self._mixer_value[mixer] * (1 + 0.2 * np.log1p(heads))
        gain = gain + 0.7 * np.log1p(np.array([0, 1, 2, 4])[ffn])
        total = (gain * self._position).sum(axis=1) / self._layers
        pairs = self._synergy[mixer[:, :-1], mixer[:, 1:]].mean(axis=1)
        size = np.array([0.8, 0.95, 1.05])[width]
        return np.asarray(1.2 + 2.0 * np.exp(-size * (total + pairs)))

    def evaluate(self, levels: NDArray[np.int64]) -> FloatArray:
        noise = 1 + self._noise * self._noise_rng.standard_normal(len(levels))
        return np.stack([self.quality(levels) * noise, self.cost(levels)], axis=1)

    def _reference_front(self) -> FloatArray:
        """Near-optimal front: greedy removal and evolution on the noise-free functions."""
        from nas.samplers._design import tilted_levels

        rng = np.random.default_rng(5)
        kept = self.canonical(tilted_levels(self.genes, 4000, rng))
        for _ in range(150):
            a, b = (kept[rng.integers(0, len(kept), 3000)] for _ in range(2))
            children = np.where(rng.random(a.shape) < rng.choice([0.0, 0.5], (3000, 1)), a, b)
            fresh = tilted_levels(self.genes, 3000, rng)
            children = np.where(rng.random(a.shape) < 2.0 / a.shape[1], fresh, children)
            kept = np.unique(np.vstack([kept, self.canonical(children)]), axis=0)
            values = np.stack([self.quality(kept), self.cost(kept)], axis=1)
            kept = kept[non_dominated(values)]
        return np.stack([self.quality(kept), self.cost(kept)], axis=1)


class HwGpt:
    """HW-GPT-Bench perplexity surrogate against the exact parameter count (millions)."""

    def __init__(self, folder: Path, space: str) -> None:
        embed, layers, heads = {
            "s": ((192, 384, 768), (10, 11, 12), (4, 8, 12)),
            "m": ((256, 512, 1024), (22, 23, 24), (8, 12, 16)),
        }[space]
        self.name, self._depth = f"hwgpt_{space}_pp", layers[-1]
        self._embed, self._layers, self._heads = map(np.array, (embed, layers, heads))
        weights = np.load(folder / f"hwgpt_{space}.npz")
        self._net = [
            (weights[f"perplexity/fc{k}.weight"], weights[f"perplexity/fc{k}.bias"])
            for k in range(1, 6)
        ]
        self.genes = [
            Gene("embed", "categorical", embed),
            Gene("n_layer", "categorical", layers),
            Gene("bias", "categorical", (True, False)),
            *[Gene(f"layers.{i}.mlp_ratio", "categorical", (2, 3, 4)) for i in range(self._depth)],
            *[Gene(f"layers.{i}.num_heads", "categorical", heads) for i in range(self._depth)],
        ]
        front = np.load(folder / f"front_{space}_pp.npz")["F"]
        self.ideal, self.nadir = front.min(axis=0), front.max(axis=0)
        self.best_volume = hypervolume(normalise(front, self.ideal, self.nadir), [1.1, 1.1])

    def _active(self, levels: NDArray[np.int64]) -> NDArray[np.bool_]:
        return np.asarray(np.arange(self._depth) < self._layers[levels[:, 1]][:, None])

    def canonical(self, levels: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.hstack([levels[:, :3], levels[:, 3:] * np.tile(self._active(levels), 2)])

    def cost(self, levels: NDArray[np.int64]) -> FloatArray:
        active, depth = self._active(levels), self._depth
        e = self._embed[levels[:, 0]].astype(float)
        n = self._layers[levels[:, 1]]
        b = levels[:, 2] == 0
        m = ((levels[:, 3 : 3 + depth] + 2) * active).sum(axis=1)
        h = (self._heads[levels[:, 3 + depth :]] * active).sum(axis=1)
        count = 2 * 50254 * e + 2 * e + 4 * n * e + 256 * h * e + b * (192 * h + n * e)
        count = count + 3 * e * e * m + b * (2 * e * m + n * e)
        return np.asarray(count / 1e6)

    def quality(self, levels: NDArray[np.int64]) -> FloatArray:
        eye, depth = np.eye(3), self._depth
        active = self._active(levels)[:, :, None]
        x = np.hstack(
            [
                eye[levels[:, 0]],
                eye[levels[:, 1]],
                (eye[levels[:, 3 : 3 + depth]] * active).reshape(len(levels), -1),
                (eye[levels[:, 3 + depth :]] * active).reshape(len(levels), -1),
                np.eye(2)[levels[:, 2]],
            ]
        )
        for k, (weight, bias) in enumerate(self._net):
            x = x @ weight.T + bias
            x = np.maximum(x, 0) if k < 4 else x
        return np.asarray(x[:, 0])

    def evaluate(self, levels: NDArray[np.int64]) -> FloatArray:
        return np.stack([self.quality(levels), self.cost(levels)], axis=1)


@dataclass(frozen=True)
class Run:
    """One search: share of the best-known hypervolume after every evaluation."""

    shares: FloatArray
    seconds: float


def run_search(problem: Problem, sampler_name: str, seed: int, evals: int, **options: Any) -> Run:
    """Run one sampler by ask and tell; returns the hypervolume share after each evaluation."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    distributions = {g.name: _distribution(g) for g in problem.genes}
    if sampler_name == "predictor":
        options = {"codec": ProblemCodec(problem), "search_space": distributions, **options}
    sampler = make_sampler(sampler_name, seed, **options)
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
    codec = ProblemCodec(problem)
    values = np.empty((0, 2))
    seconds = 0.0
    for _ in range(evals):
        start = time.perf_counter()
        trial = study.ask(distributions)
        seconds += time.perf_counter() - start
        levels = problem.canonical(codec.to_matrix([trial.params]))
        told = problem.evaluate(levels)[0]
        start = time.perf_counter()
        study.tell(trial, told.tolist())
        seconds += time.perf_counter() - start
        true = problem.quality(levels)[0]
        values = np.vstack([values, [true, told[1]]])
    unit = normalise(values, problem.ideal, problem.nadir)
    shares = [hypervolume(unit[: k + 1], [1.1, 1.1]) for k in range(evals)]
    return Run(np.array(shares) / problem.best_volume, seconds)


def _distribution(gene: Gene) -> Any:
    from optuna.distributions import CategoricalDistribution, IntDistribution

    if gene.kind == "categorical":
        return CategoricalDistribution(gene.choices)
    return IntDistribution(int(gene.low), int(gene.high))


def summarise(problem: Problem, name: str, runs: Sequence[Run], evals: int) -> dict[str, Any]:
    """Median over seeds: share at each checkpoint and evaluations to reach 95, 98 and 99%."""
    table = np.array([run.shares for run in runs])
    row: dict[str, Any] = {"problem": problem.name, "sampler": name, "seeds": len(runs)}
    for checkpoint in CHECKPOINTS:
        if checkpoint <= evals:
            row[f"hv{checkpoint}"] = round(float(np.median(table[:, checkpoint - 1])), 4)
    for share in (0.95, 0.98, 0.99):
        reached = [int(np.argmax(t >= share)) + 1 if (t >= share).any() else None for t in table]
        ordered = sorted(reached, key=lambda k: (k is None, k))
        row[f"e{share * 100:.0f}"] = ordered[(len(ordered) - 1) // 2]
        row[f"e{share * 100:.0f}_worst"] = ordered[-1]
    row["ms_per_eval"] = round(1e3 * float(np.median([r.seconds for r in runs])) / evals, 1)
    return row


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Print rows of equal keys as an aligned table."""
    keys = list(rows[0])
    cells = [["-" if row[k] is None else str(row[k]) for k in keys] for row in rows]
    widths = [max(len(k), *(len(c[i]) for c in cells)) for i, k in enumerate(keys)]
    for line in [keys, *cells]:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, help="folder with hwgpt_*.npz and front_*.npz")
    parser.add_argument("--problems", nargs="*", default=None, help="layered, s, m")
    parser.add_argument("--samplers", nargs="*", default=["predictor", "nsga2", "random"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--evals", type=int, default=200)
    parser.add_argument("--noise", type=float, default=0.01, help="of the synthetic problem")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args(arguments)
    wanted = args.problems or (["layered", "s", "m"] if args.data else ["layered"])
    rows = []
    for wish in wanted:
        problem: Problem = (
            Layered(noise=args.noise) if wish == "layered" else HwGpt(args.data, wish)
        )
        for name in args.samplers:
            runs = [run_search(problem, name, seed, args.evals) for seed in range(args.seeds)]
            rows.append(summarise(problem, name, runs, args.evals))
    if args.json:
        print(json.dumps(rows))
    else:
        print_table(rows)


if __name__ == "__main__":
    main()
