"""Are architecture and bits better decided together than one after the other?

    python -m tests.benchmarks.joint_bits --run runs/quickstart

At equal numbers of evaluations, with the same sampler: both in one genome; the architecture first
(every sub-block in its first precision), then the bits of the whole front that was found; only the
bits, of the largest network. Losses are those of a trained supernet's networks, computed once each
and kept in the run folder. Hypervolumes share one scale: the front of everything that any search
evaluated spans 0 to 1, the reference point is 1.1, and that front's own volume counts as 1.

--precisions tries others than the run has, which were neither trained nor timed: rounding after
training, by bytes only. Without --run, a supernet of the space in `joint_bits.toml` is profiled and
trained first.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray

from hw_profiles.latency_table import LatencyTable
from hw_profiles.process import prepare_process
from nas.config import load_config
from nas.pareto import hypervolume, non_dominated, normalise
from nas.pipeline import Pipeline
from nas.progress import Reporter
from tests.benchmarks._bits_search import ARMS, Arms, Point
from tests.benchmarks._inherited_losses import inherited_losses

Floats = NDArray[np.float64]
SPACE = Path(__file__).with_suffix(".toml")
OBJECTIVES: tuple[tuple[str, ...], ...] = (
    ("loss", "weight_bytes"),
    ("loss", "latency_ms", "weight_bytes"),
)
CHECKPOINTS = (10, 20, 30, 40, 60, 100, 150, 200)
REFERENCE = 1.1
JOINT = "joint"


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", type=Path, help="a run folder with a table and a supernet")
    parser.add_argument("--out", type=Path, default=Path("runs/joint_bits"), help="without --run")
    parser.add_argument("--train-s", type=float, default=240.0, help="without --run")
    parser.add_argument("--profile-s", type=float, default=60.0, help="without --run")
    parser.add_argument("--evals", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--share", type=float, default=0.5, help="for the architecture, if first")
    parser.add_argument("--tokens", type=int, default=16_384, help="held out, per evaluation")
    parser.add_argument("--threads", type=int, help="default: every processor")
    parser.add_argument("--precisions", nargs="+", help="instead of the run's; for bytes only")
    parser.add_argument("--plot", type=Path, help="PNG file")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    prepare_process(arguments.threads)
    pipeline = open_run(arguments.run) if arguments.run else make_run(arguments)
    # Its costs are all that counts here: it may be another device's.
    table: LatencyTable | None = LatencyTable.load(pipeline.folder.table)
    wanted = OBJECTIVES
    if arguments.precisions:
        names = tuple(arguments.precisions)
        pipeline.space = replace(pipeline.space, mixer_precision=names, ffn_precision=names)
        table, wanted = None, OBJECTIVES[:1]
    losses = inherited_losses(pipeline, arguments.tokens, "joint_bits_losses.json")
    results = []
    for objectives in wanted:
        arms = Arms(pipeline.space, table, pipeline.workload, objectives, losses, arguments.share)
        found = run_arms(arms, arguments.evals, arguments.seeds)
        losses.save()
        results.append({"objectives": objectives, **compare(found)})
        if arguments.plot:
            plot(found, objectives, arguments.plot)
        if not arguments.json:
            print(f"\nhypervolume of {', '.join(objectives)}: median (range) over seeds")
            print_table(results[-1]["arms"])
    if arguments.json:
        print(json.dumps({"num_losses": len(losses.known), "results": results}))


def open_run(folder: Path) -> Pipeline:
    """Return the finished run of a folder."""
    return Pipeline(load_config(str(folder / "config.json"), out=str(folder)), Reporter())


def make_run(arguments: argparse.Namespace) -> Pipeline:
    """Profile and train, or go on with what the folder holds."""
    config = load_config(
        preset=str(SPACE),
        out=str(arguments.out),
        train__num_random=2,
        train__budget_s=arguments.train_s,
        profile__budget_s=arguments.profile_s,
        profile__num_threads=arguments.threads,
    )
    pipeline = Pipeline(config, Reporter())
    pipeline.profile()
    pipeline.train()
    return pipeline


def run_arms(arms: Arms, evals: int, seeds: int) -> dict[str, list[list[Point]]]:
    """Return what every arm evaluates, by arm and seed."""
    found: dict[str, list[list[Point]]] = {name: [] for name in ARMS}
    for seed in range(seeds):
        for name, arm in ARMS.items():
            found[name].append(arm(arms, seed, evals))
            print(f"{', '.join(arms.objectives)}: {name}, seed {seed}", file=sys.stderr, flush=True)
    return found


def compare(found: dict[str, list[list[Point]]]) -> dict[str, Any]:
    """Return the hypervolumes of all arms on one scale, and what the losses are at equal bytes."""
    everything = np.array([p.values for runs in found.values() for run in runs for p in run])
    front = everything[non_dominated(everything)]
    budgets = np.quantile(front[:, -1], [0.25, 0.5, 0.75])
    curves = {name: [volumes(run, front) for run in runs] for name, runs in found.items()}
    rows = []
    for name, runs in found.items():
        row: dict[str, Any] = {"arm": name, "evals": max(map(len, runs))}
        for checkpoint in (k for k in CHECKPOINTS if k <= row["evals"]):
            row[f"hv{checkpoint}"] = spread([curve[checkpoint - 1] for curve in curves[name]])
        row["hv"] = spread([curve[-1] for curve in curves[name]])
        row["joint needs"] = spread(
            [
                first_at_least(joint, other[-1])
                for joint, other in zip(curves[JOINT], curves[name], strict=True)
            ]
        )
        for budget in budgets:
            best = [lowest_loss(run, budget) for run in runs]
            row[f"loss at {budget / 1e6:.2f} MB"] = spread(best)
        rows.append(row)
    wins = {
        name: int(sum(j[-1] > o[-1] for j, o in zip(curves[JOINT], curves[name], strict=True)))
        for name in found
    }
    listed = {name: [curve.tolist() for curve in runs] for name, runs in curves.items()}
    return {"arms": rows, "joint_wins": wins, "ideal": front.min(axis=0).tolist(),
            "nadir": front.max(axis=0).tolist(), "curves": listed}  # fmt: skip


def volumes(run: Sequence[Point], front: Floats) -> Floats:
    """Return the share of the front's hypervolume after every evaluation of a run."""
    ideal, nadir = front.min(axis=0), front.max(axis=0)
    reference = np.full(front.shape[1], REFERENCE)
    whole = hypervolume(normalise(front, ideal, nadir), reference)
    unit = normalise([point.values for point in run], ideal, nadir)
    return np.array([hypervolume(unit[:k], reference) for k in range(1, len(unit) + 1)]) / whole


def first_at_least(curve: Floats, volume: float) -> float:
    """Return after how many evaluations a curve reaches a volume; infinity where it never does."""
    reached = np.flatnonzero(curve >= volume)
    return float(reached[0] + 1) if len(reached) else float("inf")


def lowest_loss(run: Sequence[Point], budget: float) -> float:
    """Return the lowest loss within so many of the last objective, weight bytes."""
    return min((p.values[0] for p in run if p.values[-1] <= budget), default=float("inf"))


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """Return the median (the worse of two) and range over seeds; None stands for infinity."""
    ordered = sorted(values)
    chosen = {"median": ordered[len(ordered) // 2], "min": ordered[0], "max": ordered[-1]}
    return {name: value if math.isfinite(value) else None for name, value in chosen.items()}


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Print one line per figure and one column per arm."""
    names = [row["arm"] for row in rows]
    print(f"{'':18}" + "".join(f"{name:>26}" for name in names))
    for key in (key for key in rows[0] if key != "arm"):
        print(f"{key:18}" + "".join(f"{_text(row.get(key)):>26}" for row in rows))


def _text(value: Any) -> str:
    if not isinstance(value, dict):
        return "" if value is None else str(value)
    digits = 0 if all(v is None or v == int(v) for v in value.values()) else 3
    low, middle, high = (
        "-" if value[name] is None else f"{value[name]:.{digits}f}"
        for name in ("min", "median", "max")
    )
    return f"{middle} ({low} to {high})"


def plot(found: dict[str, list[list[Point]]], objectives: Sequence[str], path: Path) -> None:
    """Draw hypervolume over evaluations, and the front of all seeds, loss against bytes."""
    from matplotlib.figure import Figure

    result = compare(found)
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, runs in found.items():
        length = max(map(len, runs))
        padded = [np.pad(c, (0, length - len(c)), "edge") for c in result["curves"][name]]
        curves = np.array(padded)
        evals = np.arange(1, curves.shape[1] + 1)
        (line,) = left.plot(evals, np.median(curves, axis=0), label=name)
        left.fill_between(evals, curves.min(axis=0), curves.max(axis=0), alpha=0.2)
        values = np.array([p.values for run in runs for p in run])[:, [0, -1]]
        front = values[non_dominated(values)]
        front = front[front[:, 1].argsort()]
        right.step(front[:, 1] / 1e6, front[:, 0], where="post", color=line.get_color())
    left.set(xlabel="evaluations", ylabel=f"hypervolume of {', '.join(objectives)}")
    left.legend()
    right.set(xlabel="weights, MB", ylabel="loss", xscale="log")
    figure.savefig(path.with_stem(f"{path.stem}_{len(objectives)}"))


if __name__ == "__main__":
    main()
