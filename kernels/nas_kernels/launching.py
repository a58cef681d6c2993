"""What the launchers of several kernels need: tiles, types and the precision of products."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

HALVES = (torch.bfloat16, torch.float16)
MIN_TILE = 16
"""`tl.dot` takes no side below this one."""
SHARED_BYTES = 227 * 1024
"""Shared memory that a program may have on compute capability 9.0."""
STEP_ELEMENTS = 4096
"""Numbers of a state that one program of a single-step kernel updates."""


class Tiles(NamedTuple):
    """The part of a matrix product that one program computes, and how.

    Attributes:
        block_m: rows of the part.
        block_n: its columns.
        block_k: numbers that are multiplied and added at a time.
        warps: of a program.
        stages: blocks of operands that are under way at a time.
        waves: programs for each multiprocessor that a sum may be cut up for.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    waves: int = 2


def power_of_two(number: int) -> int:
    """Return the smallest power of two that is not below `number`."""
    return 1 << max(number - 1, 0).bit_length()


def power_of_two_below(number: int) -> int:
    """Return the largest power of two that is not above `number`, 1 at least.

    For numbers that kernels are compiled for, and that change from call to call.
    """
    return 1 << max(number.bit_length() - 1, 0)


def tile(number: int, largest: int) -> int:
    """Return a side of the operands of `tl.dot`: a power of two from 16 to `largest`."""
    return min(max(power_of_two(number), MIN_TILE), largest)


def step_tile(key_dim: int, value_dim: int) -> tuple[int, int, int]:
    """Return the sides of a state's tile that has all features, and the warps that process it.

    There are no more warps than have numbers of their own: the state is updated in place, and a
    second reader of a number might find it updated already.
    """
    block_k = power_of_two(key_dim)
    block_v = min(power_of_two(value_dim), max(STEP_ELEMENTS // block_k, 1))
    return block_k, block_v, min(max(block_k * block_v // 128, 1), 4)


def cdiv(number: int, divisor: int) -> int:
    """Divide and round up."""
    return -(-number // divisor)


def dot_dtype(*tensors: Tensor) -> torch.dtype:
    """Return bf16 where every tensor has it, else fp32: how operands of products are rounded."""
    if all(x.dtype == torch.bfloat16 for x in tensors):
        return torch.bfloat16
    return torch.float32


def dot_precision(*tensors: Tensor) -> str:
    """Return how fp32 operands are multiplied: as TF32 where PyTorch may too, else in three parts.

    Three products in TF32 are about as precise as fp32 and run on tensor cores; one in fp32 does
    not, and needs more registers than there are. The operands of fp16 tensors are fp32, which keeps
    exponents in range; TF32 has fp16's mantissa.
    """
    half = any(x.dtype == torch.float16 for x in tensors)
    return "tf32" if half or tf32_allowed() else "tf32x3"


def tf32_allowed() -> bool:
    """Whether PyTorch may round fp32 operands to TF32, which has 10 bits of mantissa."""
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:
        # PyTorch answers only in the way that it was told, of which there are two.
        return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


def as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast to the type in which autocast, where it is on, would multiply matrices."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(device)) for x in tensors)


def empty_like_dense(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return memory for a tensor of this shape, row after row without gaps."""
    return torch.empty(x.shape, device=x.device, dtype=dtype or x.dtype)


def check_heads(q: Tensor, k: Tensor, v: Tensor, state: Tensor | None) -> None:
    """Refuse what kernels with a state per key/value head would read beyond its memory.

    Args:
        q: (B, H, ..., K).
        k: (B, G, ..., K).
        v: (B, G, ..., V).
        state: (B, G, K, V) or None.

    Raises:
        ValueError: when shapes do not fit, or H is no multiple of G.
    """
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"{k.shape[1]} key/value heads do not divide {q.shape[1]} query heads; choose a divisor"
        )
    batch, groups, key_dim, value_dim = *k.shape[:2], k.shape[-1], v.shape[-1]
    check_shape("q", q, (batch, q.shape[1], *k.shape[2:]))
    check_shape("v", v, (*k.shape[:-1], value_dim))
    if state is not None:
        check_shape("state", state, (batch, groups, key_dim, value_dim))


def check_shape(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    """Raise a ValueError when a tensor has another shape than the others ask for."""
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} has the shape {tuple(x.shape)}, but {shape} is needed")


def check_written(name: str, x: Tensor) -> None:
    """Raise a ValueError when numbers that are to be written share memory."""
    if any(size > 1 and stride == 0 for size, stride in zip(x.shape, x.stride(), strict=True)):
        raise ValueError(
            f"{name} is updated in place, but some of its numbers share memory; copy it"
        )
