"""Turning a sub-block or a network and a workload into something to call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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


def runner(module: Any, inputs: torch.Tensor, workload: Workload) -> Callable[[], object]:
    """Return a call that runs the workload once, again and again from the same state.

    A decode step starts from a state that holds `workload.tokens` tokens; the token it adds is
    forgotten before the next call.

    Args:
        module: a sub-block or a `Subnet`, with `init_state`.
        inputs: activations (B, T, D), token ids (B, T) or images; T is 1 for decode.
        workload: what to run.
    """
    if workload.phase == "prefill":
        return lambda: module(inputs)
    state = module.init_state(workload.batch, workload.max_tokens)
    parts = state if isinstance(state, list) else [state]
    held = [part for part in parts if part is not None]
    context = workload.tokens

    def step() -> object:
        for part in held:
            part.length = context
        return module(inputs, state)

    return step
