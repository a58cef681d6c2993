"""Predicted against measured latency of random archs that no fit has seen.

    python -m tests.benchmarks.latency_model --json

For each preset, backend and number of threads: measures a latency table, times `--num` other random
archs twice as whole networks, and compares. Beside the table stand the deviation between the two
measurements (the noise floor), FLOPs scaled to fit, and the sum of single operators' timings. Each
combination runs in a process of its own and is kept in `--out`, so the same command goes on. On a
GPU (`--backends cuda --threads 1`) it needs PyTorch, Triton and NumPy only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

PRESETS = ("decoder-small", "encoder-small", "vit-small")
BATCH_NAME = {"decoder": ("prefill_b1_t256", "decode_b1_t256"), "encoder": ("prefill_b1_t256",)}
COLUMNS = ("mape_pct", "bias_pct", "max_pct", "within_5_pct", "within_10_pct", "kendall_tau")


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--presets", nargs="+", default=list(PRESETS))
    parser.add_argument("--backends", nargs="+", default=["eager", "onnxruntime"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--num", type=int, default=60, help="archs (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=12345)
    parser.add_argument("--rounds", type=int, default=20, help="of each measurement")
    parser.add_argument("--budget-s", type=float, default=150.0, help="for measuring a table")
    parser.add_argument("--realtime", action="store_true")
    parser.add_argument("--out", type=Path, help="folder of results, which may hold some already")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.out = arguments.out or Path(tempfile.mkdtemp(prefix="latency_model-"))
    if arguments.one:
        run_one(arguments)
        return
    results = run_all(arguments)
    print(json.dumps(results, indent=1) if arguments.json else "\n".join(text_of(results)))


def run_all(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run what `--out` does not hold yet, each in a process of its own; returns all results."""
    results = {}
    for preset in arguments.presets:
        for backend in arguments.backends:
            for threads in arguments.threads:
                path = result_path(arguments.out, preset, backend, threads)
                if not path.exists():
                    print(path.stem, file=sys.stderr, flush=True)
                    done = subprocess.run(
                        [sys.executable, "-m", "tests.benchmarks.latency_model", "--one"]
                        + ["--presets", preset, "--backends", backend, "--threads", str(threads)]
                        + ["--num", str(arguments.num), "--seed", str(arguments.seed)]
                        + ["--budget-s", str(arguments.budget_s), "--out", str(arguments.out)]
                        + ["--rounds", str(arguments.rounds)]
                        + ["--realtime"] * arguments.realtime,
                        check=False,
                    )
                    if done.returncode:
                        sys.exit(done.returncode)  # it has said why
                results[path.stem] = json.loads(path.read_text())
    return results


def result_path(out: Path, preset: str, backend: str, threads: int) -> Path:
    """Return where the result of one combination is kept."""
    return out / f"{preset}-{backend}-{threads}t.json"


def run_one(arguments: argparse.Namespace) -> None:
    """Measure one combination and write its result."""
    from hw_profiles.process import prepare_process

    (preset,), (backend,), (threads,) = arguments.presets, arguments.backends, arguments.threads
    prepare_process(threads)
    import numpy as np

    from hw_profiles.profiler import profile
    from hw_profiles.subnets import measure_subnets
    from hw_profiles.targets import random_subnets
    from searchspace.arch import Arch
    from searchspace.files import write_json

    space, workloads = load_space(preset)
    path = result_path(arguments.out, preset, backend, threads)
    path.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    table = profile(
        space,
        workloads,
        path.with_suffix(".table.json"),
        backend=backend,
        num_threads=threads,
        time_budget_s=arguments.budget_s,
        realtime=arguments.realtime,
        progress=lambda done, text: print(f"\r{done:4.0%} {text:40}", end="", file=sys.stderr),
    )
    profile_s = time.monotonic() - started
    fitted = {arch_id for fit in table.corrections.values() for arch_id in fit.arch_ids}
    rng = np.random.default_rng(arguments.seed)
    archs: dict[str, Arch] = {}
    while len(archs) < arguments.num:
        for row in space.sample_genotypes(rng, arguments.num):
            arch = space.decode(row)
            if arch.id not in fitted and len(archs) < arguments.num:
                archs[arch.id] = arch
    networks = random_subnets(archs.values(), arguments.seed)
    runs = [
        measure_subnets(
            networks,
            workloads,
            backend=backend,
            reference_us=table.sentinel_us,
            rounds=arguments.rounds,
            seed=seed,
            realtime=arguments.realtime,
        )
        for seed in (0, 1)
    ]
    result: dict[str, Any] = {
        "preset": preset,
        "backend": backend,
        "threads": threads,
        "device": table.device.to_dict(),
        "profile_s": profile_s,
        "entries": len(table.entries),
        "archs": [arch.to_dict() for arch in archs.values()],
        "workloads": {},
    }
    for workload in workloads:
        measured = [
            [timings[name][workload.name].latency_us / 1e3 for name in archs] for timings in runs
        ]
        predicted = [table.latency_ms(arch, workload) for arch in archs.values()]
        sums = None
        if backend == "eager":
            sums = operator_sums_ms(list(networks.values()), workload, table.sentinel_us, arguments)
        result["workloads"][workload.name] = {
            "left_out_mape_pct": table.correction(workload).mape,
            "num_fitted": table.correction(workload).num_networks,
            "error_90": table.correction(workload).error_90,
            **compared(
                list(archs.values()),
                workload,
                predicted,
                measured,
                sums,
                table.correction(workload).error_90,
            ),
        }
    write_json(path, result)


def load_space(preset: str) -> tuple[Any, list[Any]]:
    """Return a preset's space with the facts a small task would give it, and its workloads."""
    from hw_profiles.workload import Workload
    from searchspace.space import SearchSpace, read_space

    kind = read_space(preset).get("family", {}).get("kind", "decoder")
    if kind == "vit":
        space = SearchSpace.load(
            preset, 0, {"kind": kind, "num_classes": 10, "image_size": 8, "channels": 1}
        )
        return space, [Workload.parse(f"prefill_b1_t{space.family.max_tokens}")]
    facts = {"kind": kind, "max_tokens": 512}
    if kind == "encoder":
        facts["num_classes"] = 10
    space = SearchSpace.load(preset, 1024, facts)
    return space, [Workload.parse(name) for name in BATCH_NAME[kind]]


def compared(
    archs: Sequence[Any],
    workload: Any,
    predicted_ms: list[float],
    measured_ms: list[list[float]],
    operator_sums_ms: list[float] | None,
    error_90: float,
) -> dict[str, Any]:
    """Return the error figures of every predictor against both measurements' mean."""
    import numpy as np

    from searchspace.cost import arch_cost, flops

    first, second = np.array(measured_ms)
    truth = np.sqrt(first * second)
    work = np.array([arch_cost(a, partial(flops, tokens=workload.new_tokens)) for a in archs])
    rows = {
        "table": np.array(predicted_ms),
        "measured_again": second,
        "flops_scaled": work * np.median(truth / work),
    }
    if operator_sums_ms is not None:
        rows["operator_sum"] = np.array(operator_sums_ms)
    within = np.exp(np.abs(np.log(rows["table"] / truth))) - 1
    return {
        "interval_90_holds_pct": float(100 * (within <= error_90).mean()),
        "range_ms": [float(truth.min()), float(truth.max())],
        "measured_ms": measured_ms,
        "predicted_ms": predicted_ms,
        "figures": {
            name: figures(row, first if name == "measured_again" else truth)
            for name, row in rows.items()
        },
    }


def figures(predicted: Any, measured: Any) -> dict[str, float]:
    """Return the error figures of predictions, latencies in ms."""
    import numpy as np

    error = np.abs(predicted / measured - 1)
    return {
        "mape_pct": float(100 * error.mean()),
        "bias_pct": float(100 * np.median(predicted / measured - 1)),
        "max_pct": float(100 * error.max()),
        "within_5_pct": float(100 * (error <= 0.05).mean()),
        "within_10_pct": float(100 * (error <= 0.10).mean()),
        "kendall_tau": kendall_tau(predicted, measured),
    }


def kendall_tau(left: Any, right: Any) -> float:
    """Return Kendall's tau-b of two vectors; here because SciPy need not be on the machine.

    Source: Kendall 1945, "The Treatment of Ties in Ranking Problems".
    """
    import numpy as np

    signs = [np.sign(values[:, None] - values[None, :]) for values in (left, right)]
    untied = [(one**2).sum() for one in signs]
    return float((signs[0] * signs[1]).sum() / np.sqrt(untied[0] * untied[1]))


def operator_sums_ms(
    networks: Sequence[Any], workload: Any, sentinel_us: float, arguments: argparse.Namespace
) -> list[float]:
    """Return the sum of the timings of each network's single PyTorch operators, timed alone."""
    import random

    import torch

    from hw_profiles.backends import get_backend
    from hw_profiles.timing import Sentinel, time_interleaved
    from searchspace.ends import example_inputs

    backend = get_backend("eager")
    recorder = recorded_operators()
    names: list[list[str]] = []
    with torch.inference_mode():
        for network in networks:
            inputs = example_inputs(network.arch.ends, workload.batch, workload.new_tokens)
            call = backend.prepare(network, inputs, workload)
            call()
            with recorder:
                call()
            names.append(recorder.taken())
    with backend.clock() as clock:
        timings = time_interleaved(
            recorder.calls,
            rounds=6,
            rng=random.Random(0),
            sentinel=Sentinel(backend.sentinel(), sentinel_us),
            min_sample_ms=0.3,
            realtime=arguments.realtime,
            clock=clock,
        )
    return [sum(timings[name].latency_us for name in row) / 1e3 for row in names]


def recorded_operators() -> Any:
    """Return a mode that remembers every operator that runs inside it, once per shapes."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Recorder(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.calls: dict[str, Any] = {}
            self.names: list[str] = []

        def taken(self) -> list[str]:
            names, self.names = self.names, []
            return names

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            kwargs = kwargs or {}
            facts = [
                (tuple(x.shape), x.stride(), str(x.dtype)) if isinstance(x, torch.Tensor) else x
                for x in tree_leaves((args, kwargs))
            ]
            name = f"{func} {facts}"
            self.names.append(name)
            self.calls.setdefault(name, partial(func, *args, **kwargs))
            return func(*args, **kwargs)

    return Recorder()


def text_of(results: dict[str, Any]) -> list[str]:
    """Return the results as lines for a terminal."""
    lines = [f"{'':44}" + "".join(f"{name:>15}" for name in COLUMNS)]
    for name, result in results.items():
        lines += ["", f"{name}: {result['entries']} entries in {result['profile_s']:.0f} s"]
        for workload, values in result["workloads"].items():
            low, high = values["range_ms"]
            lines.append(
                f"  {workload}, {low:.2f} to {high:.2f} ms; fitted on {values['num_fitted']} "
                f"networks; 90 % interval holds for {values['interval_90_holds_pct']:.0f} %"
            )
            for row, row_figures in values["figures"].items():
                cells = "".join(f"{row_figures[column]:15.2f}" for column in COLUMNS)
                lines.append(f"    {row:40}{cells}")
    return lines


if __name__ == "__main__":
    main()
