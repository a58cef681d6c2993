"""One search by one sampler, and how much of the best-known hypervolume it has when.

Letters: E evaluations, M objectives (minimised).
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.samplers import BaseSampler

from nas.pareto import hypervolume, non_dominated, normalise
from nas.samplers import SAMPLERS, make_sampler
from nas.samplers._level_sampler import LevelSampler
from nas.samplers.pymoo_adapter import PymooSampler, integer_operators
from predictors.encodings import Gene, layer_groups
from tests.benchmarks._search_problems import FloatArray, IntArray, Problem, ProblemCodec

CHECKPOINTS = (10, 20, 30, 50, 100, 200, 500, 1000)
GOALS = (0.95, 0.98, 0.99)
DESIGN = "+design"
DESIGN_SIZE = 50
_MAX_REPEATS = 300


@dataclass(frozen=True)
class Run:
    """One search.

    Args:
        values: what was evaluated, without noise, in order, shape (E, M).
        seconds: spent in the sampler and the study.
    """

    values: FloatArray
    seconds: float


class UniformGridSampler(LevelSampler):
    """All networks whose layers are alike, in random order: what people try by hand."""

    def _strategy(self, codec: Any, signs: FloatArray) -> Any:
        return _Grid(codec)


class _Grid:
    def __init__(self, codec: Any) -> None:
        self._genes: Sequence[Gene] = codec.genes

    def num_used(self, num_evaluated: int) -> int:
        return 0

    def candidates(
        self, levels: IntArray, objectives: FloatArray, rng: np.random.Generator
    ) -> IntArray:
        groups = list(layer_groups(self._genes).values())
        repeated = {column for columns in groups for column in columns}
        parts = groups + [[c] for c in range(len(self._genes)) if c not in repeated]
        sizes = [self._genes[columns[0]].num_levels for columns in parts]
        if np.prod(sizes, dtype=float) > 1e5:
            grid = rng.integers(0, sizes, (2000, len(sizes)))
        else:
            axes = np.meshgrid(*[np.arange(size) for size in sizes], indexing="ij")
            grid = np.stack([axis.ravel() for axis in axes], axis=1)
        rows = np.zeros((len(grid), len(self._genes)), dtype=np.int64)
        for columns, values in zip(parts, grid.T, strict=True):
            rows[:, columns] = values[:, None]
        return rows[rng.permutation(len(rows))]


class PymooNsga2Sampler(PymooSampler):
    """pymoo's NSGA-II, the version that earlier figures are of."""

    def _algorithm(self, num_objectives: int) -> Any:
        from pymoo.algorithms.moo.nsga2 import NSGA2

        return NSGA2(pop_size=self._population_size, **integer_operators(0.9, 15.0, 20.0))


PEERS: dict[str, Callable[..., BaseSampler]] = {
    "uniform_grid": UniformGridSampler,
    "pymoo_nsga2": PymooNsga2Sampler,
}
OPTUNA_SAMPLERS = ("random", "nsga2", "nsga3", "tpe", "gp")
METHODS = (
    *SAMPLERS,
    *PEERS,
    *(name + DESIGN for name in ("nsga2", "pymoo_nsga2", "linas")),
)


def distributions(problem: Problem) -> dict[str, BaseDistribution]:
    """Return a problem's genes as Optuna distributions."""
    return {
        gene.name: CategoricalDistribution(gene.choices)
        if gene.kind == "categorical"
        else IntDistribution(int(gene.low), int(gene.high))
        for gene in problem.genes
    }


def sampler_for(problem: Problem, method: str, seed: int) -> BaseSampler:
    """Return the sampler of a method, told what may be known of the problem.

    The score of `promotion` is the first exact cost: with networks, more of it is better.
    """
    name = method.removesuffix(DESIGN)
    codec, space = ProblemCodec(problem), distributions(problem)
    if name in PEERS:
        return PEERS[name](seed=seed, codec=codec, search_space=space)
    options: dict[str, Any] = {}
    if name not in OPTUNA_SAMPLERS:
        options = {"codec": codec, "search_space": space}
    if name == "predictor":
        options["seed_params"] = problem.anchors
    if name == "promotion":
        options["score"] = lambda params: problem.costs(codec.to_matrix(params))[:, 0]
    return make_sampler(name, seed, **options)


def structured_design(problem: Problem, seed: int) -> list[dict[str, Any]]:
    """Return the first candidates of the predictor-guided sampler's design, nothing evaluated."""
    space = distributions(problem)
    sampler = make_sampler(
        "predictor",
        seed,
        codec=ProblemCodec(problem),
        search_space=space,
        seed_params=problem.anchors,
        num_initial=DESIGN_SIZE,
    )
    study = optuna.create_study(directions=["minimize"] * len(problem.objectives), sampler=sampler)
    return [study.ask(space).params for _ in range(DESIGN_SIZE)]


def run_search(problem: Problem, method: str, seed: int, evals: int, noise: float) -> Run:
    """Search once by ask and tell.

    Only different candidates count as evaluations: a repeated one gets the known values, as in an
    archive. Noise is multiplicative, on objective 0, and only in what the sampler is told.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    codec, space = ProblemCodec(problem), distributions(problem)
    rng = np.random.default_rng([seed, 77])
    sampler = sampler_for(problem, method, seed)
    study = optuna.create_study(directions=["minimize"] * len(problem.objectives), sampler=sampler)
    if method.endswith(DESIGN):
        for params in structured_design(problem, seed):
            study.enqueue_trial(params)
    told: dict[bytes, list[float]] = {}
    values: list[FloatArray] = []
    seconds, repeats = 0.0, 0
    while len(values) < evals and repeats < _MAX_REPEATS:
        start = time.perf_counter()
        trial = study.ask(space)
        seconds += time.perf_counter() - start
        levels = problem.canonical(codec.to_matrix([trial.params]))
        key = levels.tobytes()
        repeats = repeats + 1 if key in told else 0
        if key not in told:
            true = np.concatenate([problem.quality(levels), problem.costs(levels)[0]])
            values.append(true)
            factor = 1.0 + noise * rng.standard_normal()
            told[key] = [float(true[0] * factor), *true[1:].tolist()]
        start = time.perf_counter()
        study.tell(trial, told[key])
        seconds += time.perf_counter() - start
    return Run(np.array(values), seconds)


def shares(values: FloatArray, reference: FloatArray) -> FloatArray:
    """Return the share of a front's hypervolume after each evaluation, shape (E,).

    Objectives are scaled so that the front's least is 0 and its largest 1; reference point 1.1.

    Args:
        values: shape (E, M).
        reference: the best-known front, shape (points, M).
    """
    front = reference[non_dominated(reference)]
    ideal, nadir = front.min(axis=0), front.max(axis=0)
    corner = np.full(values.shape[1], 1.1)
    best = hypervolume(normalise(front, ideal, nadir), corner)
    unit = normalise(values, ideal, nadir)
    out, kept, volume = [], unit[:0], 0.0
    for point in unit:
        if (point < corner).all() and not (kept <= point).all(axis=1).any():
            kept = np.vstack([kept[~(kept >= point).all(axis=1)], point])
            volume = hypervolume(kept, corner)
        out.append(volume / best)
    return np.array(out)


def reached(curve: FloatArray, goal: float) -> int | None:
    """Return the number of evaluations after which a share is reached, or None."""
    return int(np.argmax(curve >= goal)) + 1 if (curve >= goal).any() else None


def summary(curves: Sequence[FloatArray], runs: Sequence[Run]) -> dict[str, Any]:
    """Return medians and ranges over seeds: shares, evaluations to each goal, overhead."""
    row: dict[str, Any] = {"seeds": len(runs)}
    for checkpoint in CHECKPOINTS:
        # Some methods run out of new candidates: what they have by then is what they have.
        at = [c[min(checkpoint, len(c)) - 1] for c, r in zip(curves, runs, strict=True)]
        if max(len(run.values) for run in runs) >= checkpoint:
            row[f"hv{checkpoint}"] = round(float(np.median(at)), 4)
    for goal in GOALS:
        counts = sorted((reached(c, goal) for c in curves), key=lambda k: (k is None, k))
        row[f"e{100 * goal:.0f}"] = counts[(len(counts) - 1) // 2]
        row[f"e{100 * goal:.0f}_range"] = [counts[0], counts[-1]]
    per_eval = [1e3 * run.seconds / len(run.values) for run in runs]
    row["ms_per_eval"] = round(float(np.median(per_eval)), 1)
    return row
