"""What each norm costs: sub-blocks with it against the same sub-block without any.

    python -m tests.benchmarks.norms --json > norms.json

One softmax attention block and one FFN block per norm, placement `pre`, in the form that is
deployed: foldable norms (prepbn, unified_norm) are merged into the maps behind them. Beside them
the same norms unfolded, and the block that `layernorm_to_rmsnorm` makes of the layernorm one.
Printed is the latency as a ratio to the block without a norm, which is timed twice: how far the
second is from 1 is what the ratios are uncertain by. What a folded norm leaves is its shift, as
biases of the maps behind it; a block without norm but with such biases says what those cost.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from torch import nn

from hw_profiles.backends.eager import EagerBackend
from hw_profiles.process import prepare_process
from hw_profiles.targets import ANY_DEPTH, build_for_timing
from hw_profiles.timing import measured_sentinel
from hw_profiles.workload import Workload
from searchspace.arch import Arch, LayerArch
from searchspace.family import Family
from searchspace.norms import NORMS
from searchspace.rewrites import rewrite
from searchspace.rewrites.centring import NAME as REWRITE
from searchspace.specs import SubBlockSpec
from searchspace.sub_blocks import ResidualBlock, build_sub_block, reset_sub_block
from searchspace.subnet import Subnet
from tests.benchmarks._sub_blocks import Block, add_timing_arguments, aligned, latencies_ms

HEAD_DIM = 32
FLOOR, AGAIN, BIASED = "no norm", "no norm, again", "no norm, biases"


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--d-model", type=int, default=192)
    parser.add_argument("--norms", nargs="+", default=list(NORMS))
    add_timing_arguments(parser, ["prefill_b1_t256", "decode_b1_t256"])
    arguments = parser.parse_args()
    prepare_process(arguments.threads)
    result = run(arguments)
    print(json.dumps(result, indent=1) if arguments.json else table_text(result))


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure; returns latency and ratio by workload, kind of sub-block and row."""
    sentinel_us = measured_sentinel(EagerBackend(), arguments.realtime).reference_us
    kinds: dict[str, dict[str, Block]] = {
        kind: blocks_of(kind, arguments) for kind in ("mixer", "ffn")
    }
    result: dict[str, Any] = {"d_model": arguments.d_model, "workloads": {}}
    for name in arguments.workloads:
        workload = Workload.parse(name)
        by_kind = result["workloads"][name] = {}
        for kind, blocks in kinds.items():
            latencies = latencies_ms(blocks, workload, sentinel_us, arguments)
            by_kind[kind] = {
                row: {"latency_ms": value, "ratio": value / latencies[FLOOR]}
                for row, value in latencies.items()
            }
    return result


def arch_of(norm: str, d_model: int) -> Arch:
    """Return the network of one layer that all sub-blocks are taken from."""
    heads = d_model // HEAD_DIM
    layer = LayerArch(
        mixer="softmax",
        num_heads=heads,
        num_kv_heads=heads,
        position="rope",
        ffn="swiglu",
        intermediate_size=8 * d_model // 3 // 32 * 32,
        norm=norm,
    )
    return Arch(d_model, HEAD_DIM, 64, (layer,), Family(final_norm=norm))


def blocks_of(kind: str, arguments: argparse.Namespace) -> dict[str, Block]:
    """Return the sub-blocks of a kind, by row of the table."""
    generator = torch.Generator().manual_seed(arguments.seed)
    specs = {norm: spec_of(norm, kind, arguments.d_model) for norm in arguments.norms}
    floor = spec_of("rmsnorm", kind, arguments.d_model)
    blocks: dict[str, Block] = {}
    for name in (FLOOR, AGAIN, BIASED):
        blocks[name] = floor, without_norm(floor, name == BIASED, generator)
    for norm, spec in specs.items():
        block = build_for_timing(spec, generator)
        folded = isinstance(block.norm, nn.Identity)
        blocks[f"{norm}, folded" if folded else norm] = spec, block
        if folded:
            blocks[f"{norm}, unfolded"] = spec, unfolded(spec, generator)
    if "layernorm" in specs:
        blocks[REWRITE] = specs["layernorm"], rewritten(kind, arguments.d_model, generator)
    return blocks


def spec_of(norm: str, kind: str, d_model: int) -> SubBlockSpec:
    """Return a kind of sub-block of `arch_of`."""
    return arch_of(norm, d_model).sub_blocks()[("mixer", "ffn").index(kind)]


@torch.no_grad()
def without_norm(spec: SubBlockSpec, biases: bool, generator: torch.Generator) -> nn.Module:
    """Return a sub-block without its norm, with biases in the maps behind it or without."""
    block = build_for_timing(spec, generator)
    assert isinstance(block, ResidualBlock)
    block.norm = nn.Identity()
    for linear in block.op.input_linears() if biases else ():
        linear.add_bias(torch.zeros(linear.weight.shape[0]))
    return block


@torch.no_grad()
def unfolded(spec: SubBlockSpec, generator: torch.Generator) -> nn.Module:
    """Return a sub-block in the form it is trained in."""
    block = build_sub_block(spec)
    reset_sub_block(block, generator, ANY_DEPTH)
    return block.eval().requires_grad_(False)


@torch.no_grad()
def rewritten(kind: str, d_model: int, generator: torch.Generator) -> nn.Module:
    """Return the sub-block of a layernorm network after the rewrite."""
    subnet = Subnet(arch_of("layernorm", d_model)).reset(generator)
    rewrite(subnet, REWRITE)
    block: nn.Module = subnet.pack().eval().requires_grad_(False).blocks[f"layer0_{kind}"]
    return block


def table_text(result: dict[str, Any]) -> str:
    """Return the ratios as text for a terminal."""
    columns = [(name, kind) for name, kinds in result["workloads"].items() for kind in kinds]
    rows = [
        [f"d_model {result['d_model']}", *(name for name, _ in columns)],
        ["ratio to no norm", *(kind for _, kind in columns)],
    ]
    cells = [result["workloads"][name][kind] for name, kind in columns]
    rows += [[row, *(f"{cell[row]['ratio']:.3f}" for cell in cells)] for row in cells[0]]
    rows.append(["no norm, in ms", *(f"{cell[FLOOR]['latency_ms']:.3f}" for cell in cells)])
    return aligned(rows)


if __name__ == "__main__":
    main()
