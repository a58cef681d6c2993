"""What the training-free metrics of one network cost: each alone, and all of them shared.

    python -m tests.benchmarks.metric_cost --json > metric_cost.json

A decoder, an encoder and a ViT of about 10 M parameters are scored at random weights; building the
network counts. Alone, every metric has a network and its passes to itself; shared, all metrics are
made of the same passes. Rounds take turns, and the median is printed; a round of its own warms up.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hw_profiles.process import prepare_process
from predictors.zero_cost import METRICS, score_archs
from searchspace.arch import Arch, LayerArch
from searchspace.cost import arch_cost, num_params
from searchspace.ends import example_inputs
from searchspace.family import DECODER, Family
from tests.benchmarks._sub_blocks import aligned

D_MODEL, HEAD_DIM, NUM_LAYERS, CLASSES, VOCAB, TOKENS = 320, 32, 8, 10, 512, 32
ENCODER = Family(
    kind="encoder", num_classes=CLASSES, embedding_position="learned", max_tokens=TOKENS
)
VIT = Family(
    kind="vit",
    num_classes=CLASSES,
    image_size=32,
    channels=3,
    patch_size=4,
    pooling="class_token",
    embedding_position="learned",
)
FAMILIES = {"decoder": DECODER, "encoder": ENCODER, "vit": VIT}
ALL = "all shared"


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--metrics", nargs="+", choices=METRICS, default=list(METRICS))
    parser.add_argument("--layers", type=int, default=NUM_LAYERS)
    parser.add_argument("--sequences", type=int, default=8, help="of the batch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    prepare_process(arguments.threads)
    result = {name: measure(FAMILIES[name], arguments) for name in arguments.families}
    print(json.dumps(result, indent=1) if arguments.json else table_text(result))


def measure(family: Family, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the seconds of every metric alone and of all shared, for one family."""
    arch = arch_of(family, arguments.layers)
    batch = batch_of(arch, arguments.sequences, arguments.seed)
    groups = {name: [name] for name in arguments.metrics} | {ALL: list(arguments.metrics)}
    score_archs(arguments.metrics, [arch], batch, arguments.seed)
    seconds: dict[str, list[float]] = {name: [] for name in groups}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in groups}
    for _ in range(arguments.rounds):
        for name, metrics in groups.items():
            wall, cpu = timed(metrics, arch, batch, arguments.seed)
            seconds[name].append(wall)
            cpu_seconds[name].append(cpu)
    return {
        "params": arch_cost(arch, num_params),
        "inputs": list(batch[0].shape),
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "cpu_seconds": {name: statistics.median(values) for name, values in cpu_seconds.items()},
    }


def arch_of(family: Family, layers: int) -> Arch:
    """Return softmax attention and SwiGLU, 1.24 M parameters a layer."""
    layer = LayerArch(
        mixer="softmax",
        num_heads=D_MODEL // HEAD_DIM,
        num_kv_heads=D_MODEL // HEAD_DIM,
        position="rope" if family.kind == "decoder" else "nope",
        ffn="swiglu",
        intermediate_size=864,
    )
    vocab_size = 0 if family.kind == "vit" else VOCAB
    return Arch(D_MODEL, HEAD_DIM, vocab_size, (layer,) * layers, family)


def batch_of(arch: Arch, sequences: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return random inputs and targets."""
    generator = torch.Generator().manual_seed(seed)
    inputs = example_inputs(arch.ends, sequences, TOKENS, generator)
    if arch.family.kind == "decoder":
        return inputs, torch.randint(VOCAB, inputs.shape, generator=generator)
    return inputs, torch.arange(sequences) % CLASSES


def timed(
    metrics: Sequence[str], arch: Arch, batch: tuple[Tensor, Tensor], seed: int
) -> tuple[float, float]:
    """Return the seconds that scoring takes: on the clock, and of all threads together."""
    start, cpu_start = time.perf_counter(), time.process_time()
    score_archs(metrics, [arch], batch, seed)
    return time.perf_counter() - start, time.process_time() - cpu_start


def table_text(result: dict[str, Any]) -> str:
    """Return the seconds as text for a terminal."""
    rows = [["seconds", *result]]
    rows.append(["M parameters", *(f"{found['params'] / 1e6:.1f}" for found in result.values())])
    rows.append(["inputs", *("x".join(map(str, found["inputs"])) for found in result.values())])
    columns = [found["seconds"] for found in result.values()]
    rows += [[name, *(f"{column[name]:.3f}" for column in columns)] for name in columns[0]]
    cpu = [f"{found['cpu_seconds'][ALL]:.3f}" for found in result.values()]
    rows.append([f"{ALL}, CPU seconds", *cpu])
    return aligned(rows)


if __name__ == "__main__":
    main()
