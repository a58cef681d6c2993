"""The profile part of `tests.benchmarks.gpu`: a latency table, precisions side by side, energy.

    python -m tests.benchmarks._gpu_profile --backend cuda --out FOLDER --budget-s 150

The table is that of `nas profile --preset decoder-small --backend cuda`, for the very search space
and workloads of the shipped tables; the command line itself would need packages for searching. It
needs PyTorch, Triton and NumPy only. The folder gets `latency_table.json`, for
`hw_profiles.library.ship`, and `figures.json`. The same command goes on with what is there.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hw_profiles.backends import Backend, Call, UnsupportedError, get_backend
from hw_profiles.energy import missing_meters
from hw_profiles.energy.networks import measure_energies_mj
from hw_profiles.latency_table import LatencyTable
from hw_profiles.library import find, ship
from hw_profiles.library.description import describe
from hw_profiles.process import prepare_process
from hw_profiles.profiler import profile
from hw_profiles.targets import build_for_timing, random_subnets, sub_block_inputs
from hw_profiles.timing import Sentinel, measured_sentinel, time_interleaved
from hw_profiles.workload import Workload
from searchspace.errors import UserError
from searchspace.files import write_json
from searchspace.precisions import PRECISIONS
from searchspace.space import SearchSpace
from searchspace.specs import FFNSpec

MODEL = "xeon-amx-2t-eager-decoder-small"
"""The shipped table whose search space and workloads are taken."""
WIDTHS = {True: (64, 96), False: (2048, 5632)}
"""Of the FFN in every precision, quick or not; the large one's weights do not fit in a cache."""
TOKENS = {True: 32, False: 2048}
ROUNDS = {True: 2, False: 20}
KEPT_S = 35.0
"""Kept for precisions and energy, but never more than half of the budget."""


def main() -> None:
    """Measure, and write what was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--budget-s", type=float, default=150.0)
    parser.add_argument("--quick", action="store_true", help="a toy space: does everything run?")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    prepare_process(1)
    options.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}
    backend = get_backend(options.backend)

    def note(**facts: Any) -> None:
        found.update(facts)
        write_json(options.out / "figures.json", found)

    note(precisions_us=precisions_us(backend, options.quick))
    table = profiled(options)
    note(table=figures_of(table), can_be_shipped=shippable(options.out))
    note(energy=energies(table, options.backend))
    print(json.dumps(found, indent=1))


def profiled(options: argparse.Namespace) -> LatencyTable:
    """Measure the table of the shipped space, or of a toy."""
    space, workloads = _toy() if options.quick else _shipped()
    return profile(
        space,
        workloads,
        options.out / "latency_table.json",
        backend=options.backend,
        num_threads=1,
        time_budget_s=max(options.budget_s - KEPT_S, options.budget_s / 2),
        progress=lambda done, text: print(f"{done:4.0%} {text}", file=sys.stderr, flush=True),
    )


def _shipped() -> tuple[SearchSpace, Sequence[Workload]]:
    table = LatencyTable.load(find(MODEL))
    return table.spaces[0], table.workloads


def _toy() -> tuple[SearchSpace, Sequence[Workload]]:
    space = SearchSpace(
        name="toy",
        vocab_size=32,
        d_model=(32,),
        head_dim=16,
        num_layers=2,
        mixers={"softmax": {}, "none": {}},
        heads=((2, 1),),
        intermediate_size=(64, 32),
        mixer_precision=("fp32", "int8"),
        ffn=("gelu",),
    )
    return space, (Workload.parse("prefill_b1_t16"), Workload.parse("decode_b1_t16"))


def figures_of(table: LatencyTable) -> dict[str, Any]:
    """Return what a table says about itself, in short."""
    facts = describe(table)
    workloads = {
        name: {
            "sources": found["sources"],
            "left_out_mape_pct": (found["correction"] or {}).get("mape"),
        }
        for name, found in facts["workloads"].items()
    }
    peaks = table.roofline.to_dict() if table.roofline else None
    named = ("measured_on", "measured_at", "sentinel_us", "num_entries")
    return {**{name: facts[name] for name in named}, "workloads": workloads, "peaks": peaks}


def shippable(folder: Path) -> str:
    """Return ``"yes"``, or why the package would not ship the table."""
    try:
        ship(folder / "latency_table.json", "measured-on-this-gpu", folder)
    except UserError as error:
        return str(error)
    return "yes"


def precisions_us(backend: Backend, quick: bool) -> dict[str, dict[str, float | str]]:
    """Return a SwiGLU sub-block's latency by workload and precision; or why it has none."""
    tokens, (d_model, width) = TOKENS[quick], WIDTHS[quick]
    workloads = (Workload("prefill", 1, tokens), Workload("decode", 1, tokens))
    generator = torch.Generator().manual_seed(0)
    found: dict[str, dict[str, float | str]] = {workload.name: {} for workload in workloads}
    calls: dict[str, dict[str, Call]] = {workload.name: {} for workload in workloads}
    for precision in PRECISIONS:
        spec = FFNSpec(d_model, "swiglu", width, precision)
        block = build_for_timing(spec, generator)
        for workload in workloads:
            inputs = sub_block_inputs(spec, workload, generator)
            try:
                calls[workload.name][precision] = backend.prepare(block, inputs, workload)
            except UnsupportedError as error:
                found[workload.name][precision] = str(error)
    reference_us = measured_sentinel(backend).reference_us
    for name, prepared in calls.items():
        with backend.clock() as clock:
            timings = time_interleaved(
                prepared,
                rounds=ROUNDS[quick],
                rng=random.Random(0),
                sentinel=Sentinel(backend.sentinel(), reference_us),
                clock=clock,
            )
        found[name] |= {precision: timing.latency_us for precision, timing in timings.items()}
    return found


def energies(table: LatencyTable, backend: str) -> dict[str, Any]:
    """Return the energy of one run of the space's largest network, in mJ; or why there is none."""
    (largest,) = random_subnets([table.spaces[0].largest()], 0).values()
    found = measure_energies_mj({"largest": largest}, table.workloads, backend)
    return {"energy_mj": found["largest"]} if found else {"missing": missing_meters()}


if __name__ == "__main__":
    main()
