"""The sub-blocks that are timed, and what they are timed on."""

from __future__ import annotations

import torch
from torch import nn

from hw_profiles.process import single_threaded
from hw_profiles.workload import Workload
from searchspace.ends import example_inputs
from searchspace.packing import pack
from searchspace.specs import EndsSpec, SubBlockSpec
from searchspace.sub_blocks import build_sub_block, reset_sub_block

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
