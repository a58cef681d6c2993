"""Which tiles the kernels of the fused linear map may be launched with.

Shapes: M rows, n outputs, k inputs of a network; N x K of the maximal weight.
"""

from __future__ import annotations

from functools import cache

import torch

from nas_kernels.dispatch import interpreting
from nas_kernels.launching import SHARED_BYTES, Tiles, power_of_two, power_of_two_below

FEW_ROWS = 64
SMALL = Tiles(32, 32, 32, 4, 1)
"""Where kernels are interpreted."""


def product_tiles(
    rows: int, dtype: torch.dtype, gated: bool, x: torch.dtype, weight: torch.dtype
) -> tuple[Tiles, ...]:
    """Return tiles BM x BN of a product of `rows` rows, BK inputs at a time; the default first.

    Args:
        rows: M, the most of a group.
        dtype: in which operands are multiplied.
        gated: whether there are two products.
        x: dtype of the inputs, as they are stored.
        weight: dtype of the weights.
    """
    few = max(16, power_of_two(rows)) if rows <= FEW_ROWS else 0
    return _product_tiles(few, dtype, gated, x, weight, interpreting())


@cache
def _product_tiles(
    few: int,
    dtype: torch.dtype,
    gated: bool,
    x: torch.dtype,
    weight: torch.dtype,
    interpreted: bool,
) -> tuple[Tiles, ...]:
    if few:
        # Few rows: the weight's traffic counts, so many programs, each with long rows of it.
        stages = 4 if few == 16 and weight.itemsize == 2 else 3
        found = [Tiles(few, 32, 128, 4, stages), Tiles(few, 16, 128, 4, 4)]
        found += [Tiles(few, 16, 256, 4, 3), Tiles(few, 32, 64, 4, 4), Tiles(few, 32, 256, 4, 2)]
        found += [Tiles(few, 64, 64, 4, 4), Tiles(few, 64, 128, 4, 2), Tiles(few, 64, 128, 8, 3)]
    elif dtype == torch.float32:
        found = [Tiles(64, 64, 32, 4, 3), Tiles(32, 64, 32, 4, 4), Tiles(64, 32, 64, 4, 3)]
        found += [Tiles(128, 64, 32, 8, 3), Tiles(64, 128, 32, 8, 3), Tiles(128, 128, 16, 8, 3)]
    else:
        # Operands that are wider than they are multiplied in take twice the shared memory.
        stages = 3 if weight == dtype else 2
        found = [Tiles(128, 64 if gated else 128, 64, 8, stages)]
        found += [Tiles(64, 64, 64, 4, 4), Tiles(64, 128, 64, 4, 3), Tiles(128, 64, 64, 4, 4)]
        found += [Tiles(128, 128, 32, 8, 4), Tiles(128, 128, 64, 8, 4), Tiles(64, 128, 128, 8, 2)]
        found += [] if gated else [Tiles(128, 256, 64, 8, 3)]
    stored = x.itemsize, weight.itemsize * (2 if gated else 1)
    fitting = (t for t in found if _shared_bytes(t, *stored) <= SHARED_BYTES)
    return tuple(dict.fromkeys((SMALL,) * interpreted + (*fitting,)))


def weight_tiles(dtype: torch.dtype, gated: bool, x: torch.dtype) -> tuple[Tiles, ...]:
    """Return tiles BN x BK of the weights' gradients, BM rows at a time; the default first.

    Args:
        dtype: in which operands are multiplied, and of the projections' gradients.
        gated: whether there are two weights.
        x: dtype of the inputs, as they are stored.
    """
    return _weight_tiles(dtype, gated, x, interpreting())


@cache
def _weight_tiles(
    dtype: torch.dtype, gated: bool, x: torch.dtype, interpreted: bool
) -> tuple[Tiles, ...]:
    if dtype == torch.float32:
        found = [Tiles(32, 64, 64, 4, 3), Tiles(32, 64, 64, 4, 3, waves=4), Tiles(64, 64, 64, 8, 2)]
        found += [Tiles(32, 32, 64, 4, 3), Tiles(16, 64, 128, 8, 3), Tiles(32, 64, 128, 8, 2)]
    else:
        columns = 64 if gated else 128
        found = [Tiles(64, columns, 128, 8, 3 if x == dtype else 2)]
        found += [Tiles(64, columns, 128, 8, 2, waves=1), Tiles(64, columns, 128, 8, 2, waves=4)]
        found += [Tiles(64, 64, 64, 4, 3), Tiles(32, 64, 128, 4, 4), Tiles(32, columns, 128, 8, 4)]
        found += [Tiles(128, 64, 128, 8, 2)]
    found = [SMALL] * interpreted + found
    return tuple(found)


def num_parts(tiles: int, rows: int, block: Tiles, multiprocessors: int) -> int:
    """Return into how many parts of several blocks of rows a gradient's sum is cut."""
    room = block.waves * multiprocessors // max(tiles, 1)
    return power_of_two_below(min(room, rows // (4 * block.block_m), 8))


def _shared_bytes(tiles: Tiles, x_bytes: int, weight_bytes: int) -> int:
    """Return the operands' part of the shared memory."""
    inputs = tiles.block_m * x_bytes + tiles.block_n * weight_bytes
    return tiles.stages * tiles.block_k * inputs
