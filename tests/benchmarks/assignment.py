"""How long proving an optimal assignment takes, and how well orders of skipped layers do.

    python -m tests.benchmarks.assignment [--layers 32 --choices 12 --seeds 5] [--json]
    python -m tests.benchmarks.assignment --run runs/quickstart [--tokens 4096] [--json]

The first form solves random problems with two limits. Kinds, from easy to hard:

* transformer: scores fall off with cost as losses do with width, int8 quarters the bytes of some;
* uncorrelated: scores and costs are independent;
* monotone: a larger choice costs more of everything and scores better;
* strong: a choice's score is its costs, whole numbers, up to a bonus of 10 for some;
* weak: a choice's score is its costs with 5 % of noise.

Times depend on what else runs; CPU seconds less so. The second form skips layers of a trained
supernet's largest network, by every order, and compares the loss without them with what scores of
single layers add up to.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nas.assignment import AssignmentProblem, Limit, Slot, solve

Floats = NDArray[np.float64]
KINDS = ("transformer", "uncorrelated", "monotone", "strong", "weak")
SHARES = (0.25, 0.5)
"""Budgets: this share of the way from the least to the most that can be spent."""


def random_instance(kind: str, layers: int, choices: int, seed: int) -> tuple[Floats, Floats]:
    """Return scores (L, C) and costs (L, C, 2)."""
    rng = np.random.default_rng([seed, KINDS.index(kind)])
    shape = layers, choices
    if kind == "uncorrelated":
        return rng.uniform(1, 100, shape), rng.uniform(1, 100, (*shape, 2))
    if kind == "monotone":
        costs = np.sort(rng.uniform(1, 100, (*shape, 2)), axis=1)
        return np.sort(rng.uniform(1, 100, shape), axis=1)[:, ::-1], costs
    if kind == "strong":
        costs = rng.integers(1, 101, (*shape, 2)).astype(np.float64)
        return 10.0 * rng.integers(0, 2, shape) - costs.sum(axis=2), costs
    if kind == "weak":
        costs = rng.uniform(1, 100, (*shape, 2))
        return rng.uniform(-10, 10, shape) - costs.sum(axis=2), costs
    width = np.sort(rng.uniform(0.1, 1, shape), axis=1)
    latency = width * rng.uniform(0.8, 1.2, shape)
    weights = width**1.2 * rng.choice([0.25, 1.0, 1.0], shape)
    scores = rng.uniform(0.5, 2, (layers, 1)) * np.exp(-3 * width) * rng.uniform(0.8, 1.25, shape)
    return scores, np.stack([latency, weights], axis=2)


def solve_instance(scores: Floats, costs: Floats, share: float, time_limit_s: float) -> Any:
    """Return the solution under two budgets."""
    slots = [
        Slot(f"layers[{i}]", s, {"latency_ms": c[:, 0], "weight_bytes": c[:, 1]})
        for i, (s, c) in enumerate(zip(scores, costs, strict=True))
    ]
    low, high = costs.min(axis=1).sum(axis=0), costs.max(axis=1).sum(axis=0)
    budgets = low + share * (high - low)
    limits = [Limit("latency_ms", budgets[0]), Limit("weight_bytes", budgets[1])]
    return solve(AssignmentProblem(slots), limits, time_limit_s)


def solver_rows(
    layers: int, choices: int, seeds: int, time_limit_s: float, kinds: Sequence[str]
) -> list[dict[str, Any]]:
    """Return times and gaps of every kind of problem."""
    rows = []
    for kind in kinds:
        solutions, cpu_s = [], []
        for seed, share in itertools.product(range(seeds), SHARES):
            instance = random_instance(kind, layers, choices, seed)
            start = time.process_time()
            solutions.append(solve_instance(*instance, share, time_limit_s))
            cpu_s.append(time.process_time() - start)
        seconds = [s.seconds for s in solutions if s.status == "optimal"]
        gaps = [solution.gap / max(abs(solution.value), 1e-12) for solution in solutions]
        rows.append(
            {
                "kind": kind,
                "problems": len(solutions),
                "proven": len(seconds),
                "in_2s": sum(value < 2 for value in seconds),
                "in_2s_cpu": sum(
                    s.status == "optimal" and cpu < 2
                    for s, cpu in zip(solutions, cpu_s, strict=True)
                ),
                "median_s": round(float(np.median([s.seconds for s in solutions])), 3),
                "slowest_s": round(max(s.seconds for s in solutions), 3),
                "median_cpu_s": round(float(np.median(cpu_s)), 3),
                "slowest_cpu_s": round(max(cpu_s), 3),
                "worst_gap_percent": round(100 * max(gaps), 4),
            }
        )
    return rows


def depth_rows(folder: Path, num_tokens: int) -> list[dict[str, Any]]:
    """Return for every number of skipped layers the loss without them, by every order."""
    from nas.assignment.choices import LayerChoices
    from nas.assignment.depth import skipped_by_depth
    from nas.assignment.score_file import ScoreFile
    from nas.assignment.scores import Scorer
    from nas.config import load_config
    from nas.evaluation import evaluation_amount
    from nas.pipeline import Pipeline
    from nas.progress import Reporter

    config = load_config(str(folder / "config.json"), out=str(folder))
    pipeline = Pipeline(config, Reporter(quiet=True))
    choices = LayerChoices.of(pipeline.space, max(pipeline.space.d_model))
    amount = evaluation_amount(pipeline.task, num_tokens)
    batches = pipeline.task.evaluation_batches("validation", amount, 8)
    scorer = Scorer(pipeline.supernet, pipeline.task, batches, ScoreFile(None, ""))
    slots, full = range(pipeline.space.num_layers), scorer.loss(choices.reference)

    def loss_without(skipped: frozenset[int]) -> float:
        return scorer.loss(choices.without(skipped))

    influence = scorer.influence(choices)
    alone = [loss_without(frozenset({slot})) - full for slot in slots]
    depths = [
        list(skipped_by_depth(order, influence, alone, 1, loss_without))
        for order in ("influence", "skip-loss", "greedy")
    ]
    rows = []
    for num in slots[1:]:
        every = [loss_without(frozenset(s)) for s in itertools.combinations(slots, num)]
        sets = [by_depth[num] for by_depth in depths]
        rows.append(
            {
                "skipped": num,
                "influence": loss_without(sets[0]),
                "skip_loss": loss_without(sets[1]),
                "additive_says": full + sum(alone[slot] for slot in sets[1]),
                "greedy": loss_without(sets[2]),
                "best_of_all_sets": min(every),
            }
        )
    return [{k: round(v, 4) for k, v in row.items()} for row in rows]


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Print rows of equal keys as an aligned table."""
    cells = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--choices", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--kinds", nargs="*", default=KINDS, choices=KINDS)
    parser.add_argument("--time-limit", type=float, default=10.0, help="seconds per problem")
    parser.add_argument("--run", type=Path, help="skip layers of this run's supernet instead")
    parser.add_argument("--tokens", type=int, default=4096, help="held-out tokens, with --run")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args(arguments)
    rows = (
        depth_rows(args.run, args.tokens)
        if args.run
        else solver_rows(args.layers, args.choices, args.seeds, args.time_limit, args.kinds)
    )
    if args.json:
        print(json.dumps(rows))
    else:
        print_table(rows)


if __name__ == "__main__":
    main()
