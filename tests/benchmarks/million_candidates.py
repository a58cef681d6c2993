"""How long it takes to score a million candidates: predicted loss, table latency, weight bytes.

    python -m tests.benchmarks.million_candidates --run runs/quickstart

The predictor is the search's own, with its features, fitted to the losses that the run's study
holds. Without --run: a preset, a made-up table and made-up losses, which take as long to compute
with. Candidates are canonical genotypes, as the search draws them; drawing them is not counted.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from hw_profiles.device import Device
from hw_profiles.latency_table import Entry, LatencyTable
from hw_profiles.workload import Workload
from nas.candidates import Objectives, Prices, SpaceCodec
from nas.config import load_config
from nas.pipeline import Pipeline
from nas.progress import Reporter
from nas.study import evaluated, open_study
from predictors.encodings import GeneEncoding, LazyFeatures
from predictors.models.prior_ridge import PriorRidge
from searchspace.cost import num_params
from searchspace.space import SearchSpace
from searchspace.space.canonical import Genotypes

Floats = NDArray[np.float64]
METRICS = ("latency_ms", "weight_bytes")
WORKLOADS = ("prefill_b1_t256", "decode_b1_t256")
BLOCK = 65_536
"""Candidates that one thread takes at once."""
DRAWN_AT_ONCE = 100_000


@dataclass(frozen=True)
class Problem:
    """What candidates are scored with."""

    space: SearchSpace
    prices: Prices
    labelled: Genotypes
    losses: Floats


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", type=Path, help="a run folder with a table and a study")
    parser.add_argument("--preset", default="decoder-small", help="without --run")
    parser.add_argument("--num", type=int, default=1_000_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3, help="the median counts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    problem = read_run(arguments.run) if arguments.run else made_up(arguments.preset)
    genotypes = draw(problem.space, arguments.num, arguments.seed)
    rows = [score(problem, genotypes, arguments.threads)[0] for _ in range(arguments.repeats)]
    names = list(rows[0])
    result = {name: float(np.median([row[name] for row in rows])) for name in names}
    if arguments.json:
        facts = {"genes": len(problem.space.genes), "labels": len(problem.losses)}
        print(json.dumps({"num": len(genotypes), "threads": arguments.threads, **facts, **result}))
        return
    print(f"{len(genotypes):,} candidates, {arguments.threads} threads; {problem.space.name}: "
          f"{len(problem.space.genes)} genes, {len(problem.losses)} labels")  # fmt: skip
    for name, seconds in result.items():
        print(f"{name:28}{seconds:8.2f}")


def read_run(folder: Path) -> Problem:
    """Return the space, table and evaluated losses of a run."""
    pipeline = Pipeline(load_config(str(folder / "config.json"), out=str(folder)), Reporter())
    prices = Prices(pipeline.space, LatencyTable.load(pipeline.folder.table), pipeline.workload)
    names = pipeline.config.search.objectives
    objectives = Objectives.parse(names, pipeline.config.search.constraints, prices.metrics)
    items = evaluated(open_study(pipeline.storage, objectives))
    labelled = np.array([pipeline.space.encode(item.arch) for item in items])
    losses = np.array([item.values[names.index("loss")] for item in items])
    return Problem(pipeline.space, prices, labelled, losses)


def made_up(preset: str, num_labels: int = 200) -> Problem:
    """Return a preset with a table and losses that follow the number of parameters."""
    space = SearchSpace.load(preset, 1024)
    workloads = tuple(Workload.parse(name) for name in WORKLOADS)
    table = LatencyTable(Device.current(), workloads, sentinel_us=1000.0)
    for spec in space.sub_blocks():
        us = 10.0 + num_params(spec) / 1e3
        for workload in workloads:
            table.entries[workload.name, spec.key] = Entry(
                us / 1e3, us, 0.0, 9, 1.0, True, "made up", "2026-01-01T00:00:00+00:00"
            )
    prices = Prices(space, table, WORKLOADS[0])
    labelled = space.sample_genotypes(np.random.default_rng(1), num_labels)
    return Problem(space, prices, labelled, 3.0 - 0.1 * np.log(prices.of("params", labelled)))


def draw(space: SearchSpace, num: int, seed: int) -> Genotypes:
    """Return canonical genotypes, shape (num, genes)."""
    rng = np.random.default_rng(seed)
    sizes = [min(DRAWN_AT_ONCE, num - start) for start in range(0, num, DRAWN_AT_ONCE)]
    return np.concatenate([space.sample_genotypes(rng, size) for size in sizes])


def fitted(problem: Problem, reference: Genotypes) -> tuple[GeneEncoding, PriorRidge]:
    """Return the search's features and its predictor of the loss."""
    names = ("loss", *METRICS)
    codec = SpaceCodec(
        problem.space, problem.prices, Objectives.parse(names, (), problem.prices.metrics)
    )

    def extra(genotypes: Genotypes) -> Floats:
        costs = problem.prices.of_all(("params", *METRICS), genotypes)
        return np.asarray(np.log(costs))

    encoding = GeneEncoding(codec.genes, extra, reference)
    model = PriorRidge(encoding.prior_scale, encoding.groups)
    return encoding, model.fit(encoding.encode(problem.labelled), problem.losses)


@dataclass
class Clock:
    """Seconds of wall time and of all processors, by name."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Add what the body takes."""
        wall, processors = time.perf_counter(), time.process_time()
        yield
        self.seconds[f"{name}, wall s"] = time.perf_counter() - wall
        self.seconds[f"{name}, CPU s"] = time.process_time() - processors


def score(
    problem: Problem, genotypes: Genotypes, num_threads: int
) -> tuple[dict[str, float], Floats]:
    """Score all candidates.

    Returns:
        The seconds, and loss, latency in ms and weight bytes of each candidate, shape (N, 3).
    """
    clock = Clock()
    encoding, model = fitted(problem, genotypes[:768])

    def loss(block: Genotypes) -> Floats:
        return model.predict_mean(LazyFeatures(encoding, block))[:, None]

    def costs(block: Genotypes) -> Floats:
        return problem.prices.of_all(METRICS, block)

    columns = []
    # Blocks are what is spread over the threads, not the products inside them.
    with threadpool_limits(1), ThreadPoolExecutor(num_threads) as pool, clock.time("all"):
        for name, part in (("loss", loss), ("latency and bytes", costs)):
            with clock.time(name):
                columns.append(_all(pool, part, genotypes))
    return clock.seconds, np.hstack(columns)


def _all(pool: ThreadPoolExecutor, part: Callable[[Genotypes], Any], rows: Genotypes) -> Floats:
    blocks = [rows[start : start + BLOCK] for start in range(0, len(rows), BLOCK)]
    return np.concatenate(list(pool.map(part, blocks)))


if __name__ == "__main__":
    main()
