"""The sub-blocks and networks that are timed, and what they are timed on."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import nn

from hw_profiles.process import single_threaded
from hw_profiles.workload import Workload
from searchspace.arch import Arch
from searchspace.ends import example_inputs
from searchspace.errors import UserError
from searchspace.packing import pack
from searchspace.space import SearchSpace
from searchspace.specs import EndsSpec, SubBlockSpec
from searchspace.sub_blocks import build_sub_block, reset_sub_block
from searchspace.subnet import Subnet

# Initialisation only depends on depth through a factor; latency does not depend on it.
ANY_DEPTH = 4


def build_for_timing(spec: SubBlockSpec, generator: torch.Generator) -> nn.Module:
    """Return a sub-block with random weights, int8 layers in their packed form."""
    with torch.no_grad(), single_threaded():
        block = build_sub_block(spec)
        reset_sub_block(block, generator, ANY_DEPTH)
        pack(block)
    return block.eval().requires_grad_(False)


def sub_block_inputs(
    spec: SubBlockSpec, workload: Workload, generator: torch.Generator
) -> torch.Tensor:
    """Return random input of the workload's shape: token ids or images for the ends, else
    activations (a class token is not counted).
    """
    shape = (workload.batch, workload.new_tokens)
    if isinstance(spec, EndsSpec):
        return example_inputs(spec, *shape, generator)
    return torch.randn(*shape, spec.d_model, generator=generator)


def random_subnets(archs: Iterable[Arch], seed: int) -> dict[str, Subnet]:
    """Return packed networks with random weights in evaluation mode, by arch id."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad(), single_threaded():
        return {arch.id: Subnet(arch).reset(generator).pack().eval() for arch in archs}


def archs_at_even_ranks(
    space: SearchSpace, cost: Callable[[Arch], float], num: int, pool: int, seed: int
) -> list[Arch]:
    """Return random archs at even ranks of a cost, both extremes included.

    Args:
        space: the search space.
        cost: of one arch; those that it raises a `UserError` for are left out.
        num: archs at most.
        pool: random archs to choose from.
        seed: of the archs.
    """
    rows = space.sample_genotypes(np.random.default_rng(seed), pool)
    costs: dict[str, tuple[float, Arch]] = {}
    for arch in {arch.id: arch for arch in map(space.decode, rows)}.values():
        try:
            costs[arch.id] = cost(arch), arch
        except UserError:
            continue
    ranked = sorted(costs.values(), key=lambda priced: priced[0])
    return [ranked[rank][1] for rank in even_ranks(len(ranked), num)]


def even_ranks(total: int, num: int) -> list[int]:
    """Return at most `num` different ranks below `total`, evenly spaced, both ends included."""
    ranks = np.linspace(0, total - 1, min(num, total))
    return list(dict.fromkeys(round(rank) for rank in ranks))
