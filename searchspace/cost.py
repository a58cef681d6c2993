"""Costs that add up over sub-blocks: parameters, bytes, FLOPs, table latency.

Nothing here is a second, hand-written formula: each figure is read off the module itself, built on
the meta device, once per different sub-block.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.flop_counter import FlopCounterMode

from searchspace.arch import Arch
from searchspace.ends import example_inputs
from searchspace.space.halves import FFNHalf, MixerHalf
from searchspace.specs import EndsSpec, SubBlockSpec
from searchspace.sub_blocks import build_sub_block
from searchspace.subnet import weight_bytes as module_weight_bytes

if TYPE_CHECKING:
    from searchspace.space import SearchSpace

SpecCost = Callable[[SubBlockSpec], float]


@functools.cache
def num_params(spec: SubBlockSpec) -> int:
    """Return the number of parameters of a sub-block."""
    with torch.device("meta"):
        return sum(p.numel() for p in build_sub_block(spec).parameters())


@functools.cache
def weight_bytes(spec: SubBlockSpec) -> int:
    """Return the bytes of a sub-block's weights once packed."""
    with torch.device("meta"):
        return module_weight_bytes(build_sub_block(spec))


@functools.cache
def flops(spec: SubBlockSpec, tokens: int) -> int:
    """Return the FLOPs of the matrix products of one forward pass over `tokens` tokens."""
    with torch.device("meta"), torch.no_grad():
        block = build_sub_block(spec).eval()
        if isinstance(spec, EndsSpec):
            inputs = example_inputs(spec, 1, tokens)
        else:
            inputs = torch.zeros(1, tokens, spec.d_model)
        with FlopCounterMode(display=False) as counter:
            block(inputs)
    return int(counter.get_total_flops())


def arch_cost(arch: Arch, cost: SpecCost) -> float:
    """Return the sum of a cost over an arch's sub-blocks, the ends included."""
    return sum(cost(spec) for spec in arch.sub_blocks())


class CostTable:
    """An additive cost of every choice of a space, to price many genotypes at once.

    Args:
        space: the search space.
        cost: cost of one sub-block, in any unit.
        intercept: added once per network.
    """

    def __init__(
        self,
        space: SearchSpace,
        cost: SpecCost,
        intercept: float = 0.0,
    ) -> None:
        self.space = space
        self._intercept = intercept
        self._halves: tuple[MixerHalf | FFNHalf, ...] = (space.mixer_half, space.ffn_half)

        def priced(spec: SubBlockSpec | None) -> float:
            return 0.0 if spec is None else cost(spec)

        self._ends = np.array(
            [priced(EndsSpec(d, space.vocab_size, space.family)) for d in space.d_model]
        )
        self._tables = [
            np.array(
                [[priced(half.spec(layer, d)) for layer in half.layers] for d in space.d_model]
            )
            for half in self._halves
        ]

    def of(self, genotypes: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the cost of each row of canonical `genotypes` (n, genes), shape (n,)."""
        space = self.space
        width = space.indices(genotypes, "d_model")
        total = self._ends[width] + self._intercept
        for slot in range(space.num_layers):
            active = space.indices(genotypes, f"layers.{slot}.skip") == 0
            for half, table in zip(self._halves, self._tables, strict=True):
                total = total + active * table[width, half.index(genotypes, slot)]
        return total


def reachable_specs(space: SearchSpace) -> list[SubBlockSpec]:
    """Return every different sub-block an arch of the space can contain, the ends last."""
    found: dict[SubBlockSpec, None] = {}
    for half in (space.mixer_half, space.ffn_half):
        for d_model in space.d_model:
            for layer in half.layers:
                spec = half.spec(layer, d_model)
                if spec is not None:
                    found[spec] = None
    for d_model in space.d_model:
        found[EndsSpec(d_model, space.vocab_size, space.family)] = None
    return list(found)
