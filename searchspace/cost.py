"""Costs that add up over sub-blocks: parameters, bytes of weights and state, FLOPs, table latency.

Nothing here is a second, hand-written formula: each figure is read off the module itself, built on
the meta device, once per different sub-block.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.flop_counter import FlopCounterMode

from searchspace.arch import Arch
from searchspace.ends import example_inputs
from searchspace.errors import UserError
from searchspace.space.halves import FFNHalf, MixerHalf
from searchspace.specs import EndsSpec, MixerSpec, SubBlockSpec
from searchspace.sub_blocks import build_sub_block
from searchspace.subnet import state_bytes as module_state_bytes
from searchspace.subnet import weight_bytes as module_weight_bytes

if TYPE_CHECKING:
    from searchspace.space import SearchSpace

SpecCost = Callable[[SubBlockSpec], float]
SpecCosts = Callable[[SubBlockSpec], tuple[float, ...]]

CHUNK = 16_384
"""Genotypes priced at once: few enough for the caches."""


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
def state_bytes(spec: SubBlockSpec, batch: int, max_tokens: int) -> int:
    """Return the bytes of a causal sub-block's state; none where it reads an earlier layer's.

    For a `CostTable` or `arch_cost`, fix the sizes:
    ``partial(state_bytes, batch=1, max_tokens=257)``.

    Args:
        spec: of the sub-block; the ends have no state.
        batch: number of sequences.
        max_tokens: tokens of each that the state has room for.

    Raises:
        UserError: for a bidirectional mixer, which has none.
    """
    if isinstance(spec, MixerSpec) and not spec.causal:
        raise UserError(
            f"{spec.key} has no state: it sees all tokens at once; ask for the state of decoders"
        )
    if isinstance(spec, MixerSpec) and spec.kv_shared:
        return 0
    with torch.device("meta"):
        return module_state_bytes([build_sub_block(spec).init_state(batch, max_tokens)])


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
    """Additive costs of every choice of a space, to price many genotypes at once.

    Args:
        space: the search space.
        cost: cost of one sub-block, in any unit, or a tuple of several costs.
        intercept: added once per network.
    """

    def __init__(
        self,
        space: SearchSpace,
        cost: SpecCost | SpecCosts,
        intercept: float = 0.0,
    ) -> None:
        self.space = space
        self._halves: tuple[MixerHalf | FFNHalf, ...] = (space.mixer_half, space.ffn_half)
        ends = [cost(EndsSpec(d, space.vocab_size, space.family)) for d in space.d_model]
        self._ends = np.array(ends, dtype=np.float64) + intercept
        nothing = np.zeros(self._ends.shape[1:])

        def priced(spec: SubBlockSpec | None) -> Any:
            return nothing if spec is None else cost(spec)

        # The last row is a layer that is skipped.
        self._tables = [
            np.array(
                [
                    [*(priced(half.spec(layer, d)) for layer in half.layers), nothing]
                    for d in space.d_model
                ],
                dtype=np.float64,
            )
            for half in self._halves
        ]

    def of(self, genotypes: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the costs of each row of canonical `genotypes` (n, genes).

        Returns:
            Shape (n,), or (n, costs) where the cost of a sub-block is a tuple.
        """
        chunks = [
            self._of(genotypes[begin : begin + CHUNK]) for begin in range(0, len(genotypes), CHUNK)
        ]
        return np.concatenate([self._ends[:0], *chunks])

    def _of(self, genotypes: NDArray[np.int64]) -> NDArray[np.float64]:
        space, genotypes = self.space, np.asfortranarray(genotypes)
        width = space.indices(genotypes, "d_model")
        total = self._ends[width]
        for half, table in zip(self._halves, self._tables, strict=True):
            num_rows = table.shape[1]
            flat, begin = table.reshape(-1, *table.shape[2:]), width * num_rows
            for slot in range(space.num_layers):
                skipped = space.indices(genotypes, f"layers.{slot}.skip") != 0
                row = np.where(skipped, num_rows - 1, half.index(genotypes, slot))
                total += flat[begin + row]
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
