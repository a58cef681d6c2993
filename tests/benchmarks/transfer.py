"""A latency table transferred to a new device with 10, 20 or 50 measurements.

    python -m tests.benchmarks.transfer --from-threads 2 --to-threads 1 --json

The "new device" is this machine with another number of threads or backend. Measures a table of the
source, a complete one of the target to compare with, and `--test-archs` random networks on the
target, twice. Rows are the mean absolute error on those networks, in percent, of

- `transfer`: the source's table and N networks measured on the target;
- `transfer, sub-blocks`: the source's table and N random sub-blocks instead;
- `scaled source`: the source's table, scaled to the N networks;
- `prior only`: the same fit to the N networks, with the target's roofline for a source;
- `scaled prior`: that roofline, scaled to the N networks;
- `full table`: a table measured on the target; `measured again`: the noise floor.

Source and target each run in a process of their own. What `--out` holds is not measured again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.benchmarks.latency_model import load_space

METHODS = ("transfer", "transfer, sub-blocks", "scaled source", "prior only", "scaled prior")


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", default="decoder-small")
    parser.add_argument("--from-threads", type=int, default=2)
    parser.add_argument("--to-threads", type=int, default=1)
    parser.add_argument("--from-backend", default="eager")
    parser.add_argument("--to-backend", default="eager")
    parser.add_argument("--num", nargs="+", type=int, default=[10, 20, 50], help="measurements")
    parser.add_argument("--test-archs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget-s", type=float, default=150.0, help="for measuring a table")
    parser.add_argument("--networks-s", type=float, help="for timing the networks; default: enough")
    parser.add_argument("--realtime", action="store_true")
    parser.add_argument("--out", type=Path, help="folder of measurements, which may hold some")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--step", choices=("source", "target"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step == "source":
        measure_source(arguments)
    elif arguments.step == "target":
        measure_target(arguments)
    else:
        arguments.out = arguments.out or Path(tempfile.mkdtemp())
        for step in ("source", "target"):
            if not (arguments.out / f"{step}.done").exists():
                command = [sys.executable, "-m", "tests.benchmarks.transfer", *sys.argv[1:]]
                command += ["--out", str(arguments.out), "--step", step]
                subprocess.run(command, check=True)
                (arguments.out / f"{step}.done").touch()
        result = compare(arguments)
        print(json.dumps(result, indent=1) if arguments.json else text_of(result))


def measure_source(arguments: argparse.Namespace) -> None:
    """Measure the source's table."""
    full_table(arguments, "source.json", arguments.from_backend, arguments.from_threads)


def full_table(arguments: argparse.Namespace, name: str, backend: str, threads: int) -> Any:
    """Measure a table in this process, which has run nothing yet."""
    from hw_profiles.process import prepare_process

    prepare_process(threads)
    from hw_profiles.profiler import profile

    space, workloads = load_space(arguments.preset)
    return profile(
        space,
        workloads,
        arguments.out / name,
        backend=backend,
        num_threads=threads,
        time_budget_s=arguments.budget_s,
        realtime=arguments.realtime,
        progress=lambda done, text: print(f"\r{done:4.0%} {text:40}", end="", file=sys.stderr),
    )


def measure_target(arguments: argparse.Namespace) -> None:
    """Measure the target's table and networks."""
    import numpy as np

    table = full_table(arguments, "target.json", arguments.to_backend, arguments.to_threads)
    from hw_profiles.latency_table import LatencyTable
    from hw_profiles.transfer import choose_networks
    from searchspace.files import write_json

    space, workloads = load_space(arguments.preset)
    source = LatencyTable.load(arguments.out / "source.json")
    chosen = choose_networks(source, space, workloads, max(arguments.num), arguments.seed)
    known = {arch.id for arch in chosen}
    known |= {arch_id for fit in table.corrections.values() for arch_id in fit.arch_ids}
    rng = np.random.default_rng(arguments.seed + 12345)
    drawn = (space.decode(row) for row in space.sample_genotypes(rng, 2 * arguments.test_archs))
    test = list({arch.id: arch for arch in drawn if arch.id not in known}.values())
    test = test[: arguments.test_archs]
    write_json(
        arguments.out / "networks.json",
        {
            "chosen": [arch.to_dict() for arch in chosen],
            "test": [arch.to_dict() for arch in test],
            "runs": time_networks([*chosen, *test], workloads, table.sentinel_us, arguments),
        },
    )


def time_networks(
    archs: Sequence[Any],
    workloads: Sequence[Any],
    sentinel_us: float,
    arguments: argparse.Namespace,
) -> list[dict[str, Any]]:
    """Time all networks twice; returns for each time timings by arch id and workload name."""

    from hw_profiles.subnets import measure_subnets
    from hw_profiles.targets import random_subnets

    networks = random_subnets(archs, arguments.seed)
    runs = []
    for seed in (0, 1):
        timings = measure_subnets(
            networks,
            workloads,
            backend=arguments.to_backend,
            reference_us=sentinel_us,
            time_budget_s=arguments.networks_s,
            seed=seed,
            realtime=arguments.realtime,
        )
        runs.append(
            {
                arch_id: {name: asdict(timing) for name, timing in by_workload.items()}
                for arch_id, by_workload in timings.items()
            }
        )
    return runs


def prior_table(target: Any, space: Any) -> Any:
    """Return a table that only knows the target's peak rates."""
    from hw_profiles.latency_table import Entry, LatencyTable
    from hw_profiles.roofline import work

    table = LatencyTable(target.device, target.workloads, target.sentinel_us)
    for workload in target.workloads:
        for spec in space.sub_blocks():
            us = target.roofline.prior_us(work(spec, workload))
            table.enter(workload, spec.key, Entry.predicted(us, target.sentinel_us))
    return table


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the errors of every method with every number of measurements."""
    import numpy as np

    from hw_profiles.latency_table import LatencyTable
    from hw_profiles.samples import Timing
    from searchspace.arch import Arch

    space, workloads = load_space(arguments.preset)
    source, target = (
        LatencyTable.load(arguments.out / f"{name}.json") for name in ("source", "target")
    )
    prior = prior_table(target, space)
    values = json.loads((arguments.out / "networks.json").read_text())
    chosen, test = ([Arch.from_dict(row) for row in values[key]] for key in ("chosen", "test"))
    result: dict[str, Any] = {
        "preset": space.name,
        "source": source.device.to_dict(),
        "target": target.device.to_dict(),
        "test_archs": len(test),
        "workloads": {},
    }
    for workload in workloads:
        first, second = (
            np.array([run[arch.id][workload.name]["latency_us"] / 1e3 for arch in test])
            for run in values["runs"]
        )
        truth = np.sqrt(first * second)
        timings = [Timing(**values["runs"][0][arch.id][workload.name]) for arch in chosen]
        rows = {}
        for num in arguments.num:
            some = chosen[:num], timings[:num]
            for method in METHODS:
                latency_ms = predicted(
                    method, (source, prior, target), space, workload, some, test, arguments.seed
                )
                rows[f"{method}, {num}"] = errors(latency_ms, truth)
        full = np.array([target.latency_ms(arch, workload) for arch in test])
        rows |= {"full table": errors(full, truth), "measured again": errors(second, first)}
        result["workloads"][workload.name] = {
            "range_ms": [float(truth.min()), float(truth.max())],
            "errors": rows,
        }
    return result


def predicted(
    method: str,
    tables: tuple[Any, Any, Any],
    space: Any,
    workload: Any,
    measured: tuple[Sequence[Any], Sequence[Any]],
    test: Sequence[Any],
    seed: int,
) -> Any:
    """Return a method's latencies of the test networks in ms.

    Args:
        method: one of `METHODS`.
        tables: source, prior and target.
        space: the search space.
        workload: of the latencies.
        measured: archs and their timings on the target.
        test: archs to predict.
        seed: of the random sub-blocks.
    """
    import random

    import numpy as np

    from hw_profiles.latency_table import MEASURED, LatencyTable
    from hw_profiles.samples import Timing
    from hw_profiles.transfer import transferred

    source, prior, target = tables
    archs, timings = measured
    base = prior if "prior" in method else source
    if "scaled" in method:
        us = np.array([timing.latency_us for timing in timings])
        ratios = us / np.array([base.latency_ms(arch, workload) for arch in archs])
        plain_ms = np.array([base.latency_ms(arch, workload) for arch in test])
        return plain_ms * float(np.median(ratios)) / 1e3
    targets = list(archs)
    if method == "transfer, sub-blocks":
        known = [
            spec
            for spec in space.sub_blocks()
            if target.entry(workload, spec.key).source == MEASURED
        ]
        targets = random.Random(seed).sample(known, len(archs))
        entries = [target.entry(workload, spec.key) for spec in targets]
        timings = [
            Timing(e.ratio, e.latency_us, e.spread, e.num_samples, e.kept_fraction, e.reliable)
            for e in entries
        ]
    empty = LatencyTable(target.device, (workload,), target.sentinel_us)
    table = transferred(base, space, empty, targets, {workload.name: timings})
    return np.array([table.latency_ms(arch, workload) for arch in test])


def errors(predicted_ms: Any, measured_ms: Any) -> dict[str, float]:
    """Return the error figures of predictions."""
    import numpy as np
    from scipy.stats import kendalltau

    error = np.abs(predicted_ms / measured_ms - 1)
    return {
        "mape_pct": float(100 * error.mean()),
        "max_pct": float(100 * error.max()),
        "within_10_pct": float(100 * (error <= 0.10).mean()),
        "kendall_tau": float(kendalltau(predicted_ms, measured_ms).statistic),
    }


def text_of(result: dict[str, Any]) -> str:
    """Return the result as text for a terminal."""
    source, target = result["source"], result["target"]
    lines = [
        f"{result['preset']}: {source['backend']}, {source['num_threads']} threads -> "
        f"{target['backend']}, {target['num_threads']} threads; {result['test_archs']} test archs"
    ]
    for name, values in result["workloads"].items():
        low, high = values["range_ms"]
        lines += ["", f"{name}, {low:.2f} to {high:.2f} ms"]
        lines.append(f"{'':28}{'MAPE %':>10}{'max %':>10}{'in 10 %':>10}{'tau':>10}")
        for method, row in values["errors"].items():
            lines.append(f"{method:28}" + "".join(f"{v:10.2f}" for v in row.values()))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
