"""What deploying brings: networks of a run in every runtime, side by side.

    python -m tests.benchmarks.deploy --run runs/quickstart [--recover 300] [--json]

Three networks of the front and uniform softmax networks in fp32 (the largest, and for each of the
three the nearest one that is at least as large in bytes) are run by PyTorch (eager and compiled)
and exported to ONNX (weights as they are, int8, int4). Losses are of held-out test files, computed
by the artefact itself; sizes are of its files; latencies are of a prompt and of one more token, all
interleaved in one session per workload.

Then the claim: of all networks that the search evaluated, rounded to int8 throughout (and, with
``--recover``, trained on alone), the fastest one in ONNX Runtime whose loss is not above that of
the largest uniform softmax network in fp32, as it is in the supernet and recovered as well.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hw_profiles.backends import get_backend
from hw_profiles.backends.base import Call
from hw_profiles.process import prepare_process
from hw_profiles.timing import measured_sentinel
from hw_profiles.workload import Workload
from nas.calibration import calibrated_extract
from nas.config import load_config
from nas.evaluation import evaluation_amount
from nas.export import EXPORTERS
from nas.front import uniform_networks
from nas.pipeline import Pipeline
from nas.progress import Reporter
from nas.recovery import Recovery, RecoveryRecipe
from searchspace.arch import Arch
from searchspace.cost import arch_cost, weight_bytes
from searchspace.errors import UserError
from searchspace.files import read_json
from searchspace.subnet import Subnet
from tests.benchmarks._deployed import (
    Network,
    artefact_loss,
    call_of,
    deployed,
    interleaved_ms,
    size_of,
)
from tests.benchmarks._deployed_text import best_against, table_text
from tests.benchmarks._int8_networks import int8_finalists

GRAPHS = ("onnx", "onnx-int8", "onnx-int4")
RUNTIMES = ("eager", "compiled", *GRAPHS)
BASELINE, RECOVERED = "uniform", "uniform, recovered"
FASTER = 2.0
"""What int8 networks are looked for by, against the largest uniform one in fp32."""


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", required=True, help="a finished run folder of a decoder")
    parser.add_argument("--choose", nargs="+", default=["best", "knee", "fastest"])
    parser.add_argument("--runtimes", nargs="+", default=list(RUNTIMES), choices=RUNTIMES)
    parser.add_argument(
        "--recover", type=int, default=0, help="steps that the claim's networks train on alone"
    )
    parser.add_argument("--tokens", type=int, default=32_768, help="of test files, per loss")
    parser.add_argument("--pool", type=int, default=64, help="int8 networks that are evaluated")
    parser.add_argument("--finalists", type=int, default=8, help="of them that are exported")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--budget-s", type=float, default=90.0, help="of timing, per workload")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    prepare_process(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        result = Deployment(arguments, Path(folder)).run()
    print(json.dumps(result, indent=1) if arguments.json else table_text(result))


class Deployment:
    """The comparison over one run folder, which is only read.

    Raises:
        UserError: for a run that is not finished, or not of a decoder.
    """

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.arguments, self.folder = arguments, folder
        run = Path(arguments.run)
        if not (run / "front.json").is_file():
            raise UserError(f"{run} holds no front.json; give the folder of a finished run")
        self.front = read_json(run / "front.json", "front")
        config = load_config(str(run / "config.json"), [], out=str(run))
        self.pipeline = Pipeline(config, Reporter(quiet=True))
        self.space, self.task = self.pipeline.space, self.pipeline.task
        if not self.space.family.causal:
            raise UserError(f"{run} is of {self.space.family.kind} networks; give a decoder's run")
        amount = evaluation_amount(self.task, arguments.tokens)
        self.test = self.task.evaluation_batches("test", amount, 8)
        self.workloads = [
            Workload.parse(f"{phase}_b1_t{self.task.seq_len}") for phase in ("prefill", "decode")
        ]
        recipe = RecoveryRecipe.of(config.train, arguments.recover, "fp32")
        self.recovery = Recovery(recipe, config.seed, Reporter(quiet=True))
        self.sentinel_us = measured_sentinel(get_backend("eager")).reference_us

    def run(self) -> dict[str, Any]:
        """Compare; returns one row per network and runtime, and the claim."""
        archs = self.networks()
        networks = {name: self.export(name, arch, GRAPHS) for name, arch in archs.items()}
        rows = self.rows(networks, self.arguments.runtimes)
        claim = self.claim(networks[BASELINE])
        return {
            "unit": self.task.unit,
            "tokens": self.task.seq_len,
            "threads": torch.get_num_threads(),
            "recover_steps": self.arguments.recover,
            "rows": rows,
            "claim": claim,
        }

    def networks(self) -> dict[str, Arch]:
        """Return the compared archs by name."""
        uniform = list(uniform_networks(self.space).values())
        named = {BASELINE: max(uniform, key=bytes_of)}
        records = {r["arch_id"]: r for r in self.front["groups"]["front"]}
        for name in self.arguments.choose:
            if name not in self.front["chosen"]:
                raise UserError(f"--choose {name}: choose from {', '.join(self.front['chosen'])}")
            arch = Arch.from_dict(records[self.front["chosen"][name]]["arch"])
            larger = [u for u in uniform if bytes_of(u) >= bytes_of(arch)]
            named[name] = arch
            named[f"uniform as large as {name}"] = min(larger or uniform, key=bytes_of)
        return named

    def export(
        self, name: str, arch: Arch, formats: Sequence[str], recover: bool = False
    ) -> Network:
        """Write and load the artefacts of a network, as it is or recovered."""
        print(f"export {name}", file=sys.stderr, flush=True)
        exporters = [EXPORTERS[format_name]() for format_name in formats]
        subnet = (
            self.recovered(arch)
            if recover
            else calibrated_extract(self.pipeline.supernet, arch, self.task)
        )
        packed = subnet.pack().eval().requires_grad_(False)
        network, refused = deployed(packed, self.task, exporters, self.folder)
        for format_name, reason in refused.items():
            print(f"{name}: no {format_name}: {reason}", file=sys.stderr)
        return network

    def recovered(self, arch: Arch) -> Subnet:
        """Return a network that has trained on alone."""
        return self.recovery(self.pipeline.supernet, arch, self.task)[0]

    def rows(
        self, networks: Mapping[str, Network], runtimes: Sequence[str]
    ) -> list[dict[str, Any]]:
        """Return losses, sizes and latencies."""
        rows: dict[str, dict[str, Any]] = {}
        for name, network in networks.items():
            for runtime in runtimes:
                if runtime in GRAPHS and runtime not in network.loaded:
                    continue
                rows[f"{name}|{runtime}"] = {
                    "network": name,
                    "arch_id": network.arch.id,
                    "runtime": runtime,
                    "loss": artefact_loss(network, runtime, self.test, self.task),
                    "bytes": size_of(network, runtime),
                }
        for workload in self.workloads:
            for key, ms in self.times(networks, list(rows), workload).items():
                rows[key][f"{workload.phase}_ms"] = ms
        return list(rows.values())

    def times(
        self, networks: Mapping[str, Network], keys: Sequence[str], workload: Workload
    ) -> dict[str, float]:
        """Return milliseconds by row, interleaved."""
        (inputs, _), *_ = self.test
        calls: dict[str, Call] = {}
        for key in keys:
            name, runtime = key.split("|")
            calls[key] = call_of(networks[name], runtime, inputs[:1], workload)
        print(f"time {len(calls)} calls, {workload.name}", file=sys.stderr, flush=True)
        return interleaved_ms(
            calls, self.arguments.rounds, self.arguments.budget_s, self.sentinel_us
        )

    def claim(self, baseline: Network) -> dict[str, Any]:
        """Return the best int8 networks beside the baseline in fp32, all in ONNX Runtime."""
        arguments = self.arguments
        recover = bool(arguments.recover)
        archs = int8_finalists(
            self.pipeline, baseline.arch, FASTER, arguments.pool, arguments.finalists
        )
        networks = {BASELINE: baseline}
        if recover:
            networks[RECOVERED] = self.export(RECOVERED, baseline.arch, ("onnx",), recover)
        baselines = list(networks)
        networks |= {a.id: self.export(a.id, a, ("onnx-int8",), recover) for a in archs}
        keys = [f"{name}|{'onnx' if name in baselines else 'onnx-int8'}" for name in networks]
        rows: dict[str, dict[str, Any]] = {}
        for key in keys:
            name, runtime = key.split("|")
            network = networks[name]
            loss = artefact_loss(network, runtime, self.test, self.task)
            rows[key] = {"network": name, "loss": loss, "bytes": size_of(network, runtime)}
        for workload in self.workloads:
            for key, ms in self.times(networks, keys, workload).items():
                rows[key][f"{workload.phase}_ms"] = ms
        base = rows[keys[0]]
        for row in rows.values():
            row["smaller"] = base["bytes"] / row["bytes"]
            for phase in ("prefill", "decode"):
                row[f"{phase}_faster"] = base[f"{phase}_ms"] / row[f"{phase}_ms"]
        listed = list(rows.values())
        return {
            "rows": listed,
            "best": {row["network"]: best_against(row, listed[len(baselines) :])
                     for row in listed[: len(baselines)]},
        }  # fmt: skip


def bytes_of(arch: Arch) -> float:
    """Return the bytes of an arch's weights as they are stored."""
    return arch_cost(arch, weight_bytes)


if __name__ == "__main__":
    main()
