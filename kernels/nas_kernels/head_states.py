"""What kernels with a matrix of state per key/value head have in common.

Shapes: B batch, H query heads, G key/value heads, T tokens, N chunks of C tokens, K key width,
V value width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nas_kernels.dispatch import launching_on
from nas_kernels.launching import MIN_TILE, cdiv, dot_dtype, dot_precision, step_tile, tile
from nas_kernels.tiles.types import triton_dtype

MAX_CHUNK = 64
MOST_WARPS = 8


class Blocks(NamedTuple):
    """What one program computes, and how.

    Attributes:
        chunk: tokens.
        block_k: features of keys.
        block_v: features of values.
        warps: of a program; twice as many where registers would spill.
        stages: blocks of operands that are under way at a time.
        columns: most features of values where a program holds all those of keys.
    """

    chunk: int
    block_k: int
    block_v: int
    warps: int = 4
    stages: int = 2
    columns: int = 32


@dataclass(frozen=True)
class Plan:
    """Sizes and blocks of one call; with the decay, where there is one.

    Attributes:
        decay: none, one per head or one per feature: 0, 1, 2.
        floor: lowest log decay of a token.
        dot: in which operands are multiplied.
        precision: of products in fp32.
    """

    batch: int
    heads: int
    groups: int
    tokens: int
    key_dim: int
    value_dim: int
    blocks: Blocks
    dot: torch.dtype
    precision: str
    decay: int = 0
    floor: float = 0.0

    @property
    def num_chunks(self) -> int:
        """N."""
        return cdiv(self.tokens, self.blocks.chunk)

    @property
    def pairs(self) -> int:
        """States at a time, B * G."""
        return self.batch * self.groups

    @property
    def repeats(self) -> int:
        """Query heads that share a state, H / G."""
        return self.heads // self.groups

    @property
    def sizes(self) -> tuple[int, int, int]:
        """T, K and V."""
        return self.tokens, self.key_dim, self.value_dim

    @property
    def num_blocks(self) -> tuple[int, int]:
        """Blocks of the features of keys and of values."""
        return cdiv(self.key_dim, self.blocks.block_k), cdiv(self.value_dim, self.blocks.block_v)

    @property
    def more_warps(self) -> int:
        """For kernels whose registers would spill."""
        return min(2 * self.blocks.warps, MOST_WARPS)

    def constants(self, **others: Any) -> dict[str, Any]:
        """Return the constants that all kernels take, and some that replace or follow them."""
        return {
            "C": self.blocks.chunk,
            "BK": self.blocks.block_k,
            "BV": self.blocks.block_v,
            "DOT": triton_dtype(self.dot),
            "PRECISION": self.precision,
            "num_warps": self.blocks.warps,
            "num_stages": self.blocks.stages,
        } | others

    def empty_states(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return memory for the states of all chunks (B, G, N + 1, K, V) and one in fp32."""
        shape = (self.batch, self.groups, self.num_chunks + 1, self.key_dim, self.value_dim)
        states = torch.empty(shape, device=like.device, dtype=self.dot)
        return states, torch.empty(shape[:2] + shape[3:], device=like.device, dtype=torch.float32)


def plan_of(
    q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, decay: int = 0, floor: float = 0.0
) -> Plan:
    """Return the plan of a call; `q` is (B, H, T, K), `k` and `v` are (B, G, T, K or V)."""
    (batch, heads, tokens, key_dim), groups, value_dim = q.shape, k.shape[1], v.shape[3]
    dot, precision = dot_dtype(q, k, v), dot_precision(q, k, v)
    sizes = batch, heads, groups, tokens, key_dim, value_dim
    return Plan(*sizes, blocks, dot, precision, decay, floor)


def block_choices(
    q: Tensor, k: Tensor, v: Tensor, chunk: int | None, fp32_chunk: int = MAX_CHUNK
) -> tuple[Blocks, ...]:
    """Return the blocks to choose from, the default first; with a given chunk only that.

    Args:
        q: (B, H, T, K).
        k: (B, G, T, K).
        v: (B, G, T, V).
        chunk: what the caller asks for.
        fp32_chunk: longest of tensors in fp32.
    """
    bf16 = dot_dtype(q, k, v) == torch.bfloat16
    # Tiles in fp32 take twice the shared memory.
    side = 64 if bf16 else 32
    length = chunk or tile(q.shape[2], MAX_CHUNK if bf16 else fp32_chunk)
    found = _block_choices(length, tile(q.shape[3], side), tile(v.shape[3], side))
    return found if chunk is None else found[:1]


@cache
def _block_choices(chunk: int, block_k: int, block_v: int) -> tuple[Blocks, ...]:
    short, few_k, few_v = (max(side // 2, MIN_TILE) for side in (chunk, block_k, block_v))
    found = (
        Blocks(chunk, block_k, block_v),
        Blocks(chunk, block_k, block_v, warps=8),
        Blocks(chunk, block_k, block_v, stages=3),
        Blocks(chunk, block_k, block_v, stages=1, columns=64),
        Blocks(chunk, block_k, few_v, columns=16),
        Blocks(chunk, few_k, few_v),
        Blocks(short, block_k, block_v),
        Blocks(short, few_k, few_v, stages=3),
    )
    return tuple(dict.fromkeys(found))


def launch_step(
    kernel: Any,
    tensors: Sequence[Tensor],
    state_BGKV: Tensor | None,
    new_state_BGKV: Tensor,
    out_BHV: Tensor,
    *numbers: float,
    **flags: Any,
) -> Tensor:
    """Launch a kernel that takes every state one token further; return `out_BHV`.

    Args:
        kernel: takes tensors, the old and the new state, the output, strides of all but that one,
            G, H / G, K, V, `numbers` and `flags`.
        tensors: its inputs.
        state_BGKV: the state before the token; None means zeros.
        new_state_BGKV: is written; may be the state before.
        out_BHV: is written.
        numbers: see `kernel`.
        flags: see `kernel`.
    """
    batch, groups, key_dim, value_dim = new_state_BGKV.shape
    old = new_state_BGKV if state_BGKV is None else state_BGKV
    given = (*tensors, old, new_state_BGKV)
    block_k, block_v, num_warps = step_tile(key_dim, value_dim)
    with launching_on(out_BHV):
        kernel[(batch * groups, cdiv(value_dim, block_v))](
            *given,
            out_BHV,
            *(stride for x in given for stride in x.stride()),
            *(groups, out_BHV.shape[1] // groups, key_dim, value_dim, *numbers),
            HAS_STATE=state_BGKV is not None,
            BK=block_k,
            BV=block_v,
            num_warps=num_warps,
            **flags,
        )
    return out_BHV
