"""Costs that add up over sub-blocks: parameters, bytes of weights and state, FLOPs, table latency.

Nothing here is a second, hand-written formula: each figure is read off the module itself, built on
the meta device, once per different sub-block.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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

Indices = NDArray[np.int64]
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


@dataclass(frozen=True)
class Rows:
    """Which sub-blocks some genotypes (n, genes) consist of, as places in a `CostTable`.

    Args:
        ends: of the ends, shape (n,).
        halves: of each half's table, one array (n,) per slot.
    """

    ends: Indices
    halves: tuple[tuple[Indices, ...], ...]


def rows_of(space: SearchSpace, genotypes: Indices) -> Iterator[Rows]:
    """Yield the rows of canonical genotypes (n, genes), some thousands at a time."""
    for begin in range(0, len(genotypes), CHUNK):
        chunk = np.asfortranarray(genotypes[begin : begin + CHUNK])
        width = space.indices(chunk, "d_model")
        skipped = [space.indices(chunk, f"layers.{i}.skip") != 0 for i in range(space.num_layers)]
        halves = []
        for half in (space.mixer_half, space.ffn_half):
            # The last row of each width is a layer that is skipped.
            num = len(half.layers)
            first = width * (num + 1)
            halves.append(
                tuple(
                    first + np.where(skip, num, half.index(chunk, slot))
                    for slot, skip in enumerate(skipped)
                )
            )
        yield Rows(width, tuple(halves))


class CostTable:
    """Costs of every choice of a space, to price many genotypes at once.

    Args:
        space: the search space.
        cost: cost of one sub-block, in any unit, or a tuple of several costs.
        intercept: added once per network.
        combine: what makes a network's cost of its sub-blocks', whose 0 changes nothing.
    """

    def __init__(
        self,
        space: SearchSpace,
        cost: SpecCost | SpecCosts,
        intercept: float = 0.0,
        combine: np.ufunc = np.add,
    ) -> None:
        self.space = space
        self._intercept = intercept
        self._combine = combine
        ends = [cost(EndsSpec(d, space.vocab_size, space.family)) for d in space.d_model]
        self._ends = np.array(ends)
        nothing = np.zeros(self._ends.shape[1:], self._ends.dtype)

        def priced(spec: SubBlockSpec | None) -> Any:
            return nothing if spec is None else cost(spec)

        halves: tuple[MixerHalf | FFNHalf, ...] = (space.mixer_half, space.ffn_half)
        self._tables = [
            np.array(
                [
                    row
                    for d in space.d_model
                    for row in (*(priced(half.spec(layer, d)) for layer in half.layers), nothing)
                ]
            )
            for half in halves
        ]

    def of(self, genotypes: Indices) -> NDArray[Any]:
        """Return the costs of each row of canonical `genotypes` (n, genes).

        Returns:
            Shape (n,), or (n, costs) where the cost of a sub-block is a tuple.
        """
        chunks = [self.total(rows) for rows in rows_of(self.space, genotypes)]
        return np.concatenate([self._ends[:0], *chunks])

    def total(self, rows: Rows) -> NDArray[Any]:
        """Return the costs of each row."""
        total = self._ends[rows.ends]
        for table, slots in zip(self._tables, rows.halves, strict=True):
            for row in slots:
                total = self._combine(total, table[row])
        return total + self._intercept if self._intercept else total


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
