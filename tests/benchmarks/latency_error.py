"""Predicted against measured latency of random archs that no fit has seen.

    python -m tests.benchmarks.latency_error --table runs/quickstart/latency_table.json

Times `--num` random archs of a preset as whole networks, twice, and compares with the table. The
deviation between the two measurements is the noise floor. Without a table one is measured first.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from hw_profiles.process import prepare_process


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", default="decoder-small")
    parser.add_argument("--vocab-size", type=int, default=1024)
    parser.add_argument("--table", type=Path, help="an existing table; default: measure one now")
    parser.add_argument("--workloads", nargs="+", default=["prefill_b1_t256", "decode_b1_t256"])
    parser.add_argument("--num", type=int, default=20, help="archs (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=12345)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--budget-s", type=float, default=110.0, help="for measuring a table")
    parser.add_argument("--realtime", action="store_true")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    prepare_process(arguments.threads)
    result = run(arguments)
    print(json.dumps(result, indent=1) if arguments.json else table_text(result))


def run(arguments: argparse.Namespace) -> dict[str, object]:
    """Measure and compare; returns the JSON-ready result."""
    import numpy as np
    import torch

    from hw_profiles.profiler import measure_subnets, profile
    from hw_profiles.workload import Workload
    from searchspace.cost import arch_cost, flops
    from searchspace.space import SearchSpace
    from searchspace.subnet import Subnet

    space = SearchSpace.load(arguments.preset, arguments.vocab_size)
    workloads = [Workload.parse(name) for name in arguments.workloads]
    path = arguments.table or Path(tempfile.mkdtemp()) / "latency_table.json"
    start = time.monotonic()
    table = profile(
        space,
        workloads,
        path,
        num_threads=arguments.threads,
        time_budget_s=arguments.budget_s,
        realtime=arguments.realtime,
        progress=lambda done, text: print(f"\r{done:4.0%} {text:40}", end="", file=sys.stderr),
    )
    profile_s = time.monotonic() - start
    rng = np.random.default_rng(arguments.seed)
    archs = [space.decode(row) for row in space.sample_genotypes(rng, arguments.num)]
    generator = torch.Generator().manual_seed(arguments.seed)
    networks = {arch.id: Subnet(arch).reset(generator).pack().eval() for arch in archs}
    runs = [
        measure_subnets(
            networks,
            workloads,
            reference_us=table.sentinel_us,
            seed=seed,
            realtime=arguments.realtime,
        )
        for seed in (0, 1)
    ]
    result: dict[str, object] = {
        "preset": space.name,
        "device": table.device.to_dict(),
        "num_archs": len(networks),
        "profile_s": profile_s if arguments.table is None else None,
        "entries": len(table.entries),
        "workloads": {},
    }
    unique = list({arch.id: arch for arch in archs}.values())
    by_workload: dict[str, object] = {}
    for workload in workloads:
        first, second = (
            np.array([run[arch.id][workload.name].latency_us / 1e3 for arch in unique])
            for run in runs
        )
        predicted = np.array([table.latency_ms(arch, workload) for arch in unique])
        per_token = partial(flops, tokens=workload.new_tokens)
        work = np.array([arch_cost(arch, per_token) for arch in unique])
        scaled = work * np.median(first / work)
        by_workload[workload.name] = {
            "left_out_mape_pct": table.correction(workload).mape,
            "range_ms": [float(first.min()), float(first.max())],
            "table": figures(predicted, np.sqrt(first * second)),
            "measured_again": figures(first, second),
            "flops_scaled": figures(scaled, np.sqrt(first * second)),
        }
    return {**result, "workloads": by_workload}


def figures(predicted: object, measured: object) -> dict[str, float]:
    """Return the error figures of predictions, latencies in ms."""
    import numpy as np
    from scipy.stats import kendalltau

    p, m = np.asarray(predicted, dtype=float), np.asarray(measured, dtype=float)
    error = np.abs(p / m - 1)
    apart = np.abs(np.log(m[:, None] / m[None])) > np.log(1.05)
    ordered = (p[:, None] > p[None]) == (m[:, None] > m[None])
    return {
        "mape_pct": float(100 * error.mean()),
        "bias_pct": float(100 * np.median(p / m - 1)),
        "max_pct": float(100 * error.max()),
        "within_5_pct": float(100 * (error <= 0.05).mean()),
        "within_10_pct": float(100 * (error <= 0.10).mean()),
        "kendall_tau": float(kendalltau(p, m).statistic),
        "pairs_ordered_pct": float(100 * ordered[apart].mean()),
    }


def table_text(result: dict[str, object]) -> str:
    """Return the result as text for a terminal."""
    lines = [
        f"{result['preset']}: {result['num_archs']} archs, {result['entries']} table entries"
        + (f", profiled in {result['profile_s']:.0f} s" if result["profile_s"] else "")
    ]
    head = ("MAPE %", "bias %", "max %", "within 5 %", "within 10 %", "tau", "pairs %")
    workloads = result["workloads"]
    assert isinstance(workloads, dict)
    for name, values in workloads.items():
        low, high = values["range_ms"]
        lines += ["", f"{name}: {low:.2f} to {high:.2f} ms; networks left out of the fit: "]
        lines[-1] += f"{values['left_out_mape_pct']:.1f} %"
        lines.append(f"{'':16}" + "".join(f"{title:>12}" for title in head))
        for row in ("table", "measured_again", "flops_scaled"):
            lines.append(f"{row:16}" + "".join(f"{v:12.2f}" for v in values[row].values()))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
