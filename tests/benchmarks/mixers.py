"""Every causal mixer at equal width: speed by length, state, loss, copying and looking up.

    python -m tests.benchmarks.mixers --json > mixers.json

Latencies are of one residual sub-block, all mixers interleaved in one session per workload, in
milliseconds at the sentinel's speed. The loss is that of a two-layer network of this one mixer
after a fixed token budget. The probes train the same network anew: `copy` strings of 16 to 32
symbols, judged at 32; `lookup` of 4 to 8 key-value pairs, judged at 8. Parts can be run one by one;
`--into FILE` keeps what is done and goes on from there.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch

from hw_profiles.backends.eager import EagerBackend
from hw_profiles.process import prepare_process
from hw_profiles.targets import build_for_timing, sub_block_inputs
from hw_profiles.timing import measured_sentinel, time_interleaved
from hw_profiles.workload import Workload, decode, prefill
from nas.config import TrainConfig
from nas.evaluation import held_out_accuracy, held_out_loss
from nas.tasks import TaskConfig, prepare_task
from nas.tasks.base import Task
from searchspace.arch import Arch, LayerArch, mixer_spec
from searchspace.family import Family
from searchspace.files import read_json, write_json
from searchspace.mixers import MIXERS
from searchspace.specs import MixerSpec
from searchspace.sub_blocks import build_sub_block
from searchspace.subnet import state_bytes
from tests.benchmarks._alone import train_alone

Table = dict[str, dict[str, Any]]

PREFILLS = (128, 512, 2048)
CONTEXTS = (512, 4096)
NUM_HEADS, HEAD_DIM, NUM_LAYERS = 4, 32, 2


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--mixers", nargs="+", help="default: every causal one")
    parser.add_argument("--parts", nargs="+", default=["latency", "loss", "copy", "lookup"])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--steps", type=int, default=200, help="of 8 x 256 tokens, for the loss")
    parser.add_argument("--probe-steps", type=int, default=400, help="of 32 sequences")
    parser.add_argument("--into", type=Path, help="a JSON file that results are added to")
    parser.add_argument(
        "--data", type=Path, default=Path("runs/mixers"), help="folder to prepare in"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="default: every processor")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    prepare_process(arguments.threads)
    names = arguments.mixers or [n for n, m in MIXERS.items() if "causal" in m.directions]
    known = (
        read_json(arguments.into, "results") if arguments.into and arguments.into.exists() else {}
    )
    table: Table = {name: known.get(name, {}) for name in names}
    if "latency" in arguments.parts:
        add_latencies(table, arguments)
    probes: dict[str, tuple[str, dict[str, Any]]] = {
        "copy": ("copy", {}),
        "lookup": ("context_lookup", {"num_items": 8, "num_symbols": 16}),
    }
    for part in arguments.parts:
        if part == "loss":
            add_losses(table, arguments)
        elif part in probes:
            add_probe(table, part, *probes[part], arguments)
    keep(table, arguments)
    print(json.dumps(table, indent=1) if arguments.json else table_text(table))


def keep(table: Table, arguments: argparse.Namespace) -> None:
    """Add the results to the file, which another process may have added to meanwhile."""
    if arguments.into:
        known = read_json(arguments.into, "results") if arguments.into.exists() else {}
        merged = {name: {**known.get(name, {}), **row} for name, row in table.items()}
        write_json(arguments.into, {**known, **merged})


def layer_of(mixer: str, with_ffn: bool = True) -> LayerArch:
    """Return the layer that all networks of the benchmark consist of."""
    return LayerArch(
        mixer=mixer,
        num_heads=NUM_HEADS,
        num_kv_heads=NUM_HEADS,
        position="rope",
        ffn="swiglu" if with_ffn else "none",
        intermediate_size=256 if with_ffn else 0,
        norm="layernorm",
    )


def arch_of(mixer: str, vocab_size: int, max_tokens: int) -> Arch:
    """Return a network of `NUM_LAYERS` equal layers."""
    layers = (layer_of(mixer),) * NUM_LAYERS
    family = Family(max_tokens=max_tokens)
    return Arch(NUM_HEADS * HEAD_DIM, HEAD_DIM, vocab_size, layers, family)


def spec_of(mixer: str, max_tokens: int) -> MixerSpec:
    """Return the sub-block that is timed."""
    family = Family(max_tokens=max_tokens)
    return mixer_spec(layer_of(mixer, with_ffn=False), NUM_HEADS * HEAD_DIM, HEAD_DIM, family)


def add_latencies(table: Table, arguments: argparse.Namespace) -> None:
    """Add prefill and decode latencies and the bytes of the state."""
    backend = EagerBackend()
    sentinel = measured_sentinel(backend)
    workloads: list[Workload] = [prefill(1, tokens) for tokens in PREFILLS]
    workloads += [decode(1, context) for context in CONTEXTS]
    for workload in workloads:
        generator = torch.Generator().manual_seed(arguments.seed)
        calls = {}
        for name in table:
            spec = spec_of(name, max(workload.max_tokens, 64))
            block = build_for_timing(spec, generator)
            inputs = sub_block_inputs(spec, workload, generator)
            calls[name] = backend.prepare(block, inputs, workload)
        started = time.monotonic()
        with backend.clock() as clock:
            timings = time_interleaved(
                calls,
                rounds=arguments.rounds,
                rng=random.Random(arguments.seed),
                sentinel=sentinel,
                clock=clock,
            )
        for name, timing in timings.items():
            table[name][f"{workload.phase}_{workload.tokens}_ms"] = timing.latency_us / 1e3
        print(f"{workload.name}: {time.monotonic() - started:.0f} s", file=sys.stderr)
    for name in table:
        for context in CONTEXTS:
            block = build_sub_block(spec_of(name, context + 1))
            state = block.init_state(1, context + 1)
            table[name][f"state_{context}_bytes"] = state_bytes([state])


def add_losses(table: Table, arguments: argparse.Namespace) -> None:
    """Add the test loss after a fixed token budget."""
    task = prepare_task(TaskConfig(), arguments.data / "text")
    config = TrainConfig(num_steps=arguments.steps, batch_size=8)
    batches = task.evaluation_batches("test", 16_384, 8)
    for name in table:
        if "loss_nats_per_byte" in table[name]:
            continue
        arch = arch_of(name, task.vocab_size, task.seq_len)
        started = time.monotonic()
        model = train_alone(arch, task, config, arguments.seed)
        table[name]["loss_nats_per_byte"] = held_out_loss(model, batches, task)
        table[name]["training_s"] = time.monotonic() - started
        report(name, table, arguments)


def add_probe(
    table: Table,
    part: str,
    task_name: str,
    facts: dict[str, Any],
    arguments: argparse.Namespace,
) -> None:
    """Add the share of answers that are right."""
    task: Task = prepare_task(TaskConfig(name=task_name, **facts), arguments.data / task_name)
    config = TrainConfig(num_steps=arguments.probe_steps, batch_size=32)
    batches = task.evaluation_batches("test", 4096, 64)
    for name in table:
        if f"{part}_accuracy" in table[name]:
            continue
        arch = arch_of(name, task.vocab_size, task.seq_len)
        model = train_alone(arch, task, config, arguments.seed)
        table[name][f"{part}_accuracy"] = held_out_accuracy(model, batches)
        report(name, table, arguments)


def report(name: str, table: Table, arguments: argparse.Namespace) -> None:
    """Show and keep what is done so far."""
    keep(table, arguments)
    figures = {k: round(v, 3) for k, v in table[name].items() if isinstance(v, float)}
    print(f"{name}: {figures}", file=sys.stderr, flush=True)


def table_text(table: Table) -> str:
    """Return the table as aligned text."""
    columns = list(dict.fromkeys(column for row in table.values() for column in row))
    lines = [["mixer", *columns]]
    for name, row in table.items():
        cells = [row.get(column, "") for column in columns]
        lines.append([name, *(f"{c:.3f}" if isinstance(c, float) else str(c) for c in cells)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in lines
    )


if __name__ == "__main__":
    main()
