"""Which blocks the kernel of split-KV decoding may be launched with."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

from nas_kernels.launching import HALVES, tile


class Blocks(NamedTuple):
    """What one program attends to, and how.

    Attributes:
        block_r: rows: query heads that share keys, times new tokens.
        block_s: keys at a time.
        warps: of a program.
        stages: blocks of keys that are under way at a time.
        waves: programs for each multiprocessor that keys are cut up for.
    """

    block_r: int
    block_s: int
    warps: int
    stages: int
    waves: int = 2


def block_choices(rows: int, width: int, dtype: torch.dtype) -> tuple[Blocks, ...]:
    """Return the blocks to choose from, the default first.

    Args:
        rows: that share keys.
        width: of a key or a value, the larger.
        dtype: of the queries.
    """
    half, wide = dtype in HALVES, width > 128
    # Compiled for compute capability 9.0, larger tiles of fp32 or wide heads spill registers.
    return _block_choices(tile(rows, (32 if wide else 64) if half else 16), half, wide)


@cache
def _block_choices(block_r: int, half: bool, wide: bool) -> tuple[Blocks, ...]:
    block_s, warps = 64 if half and not wide else 32, 8 if wide and not half else 4
    # fp32 keys and values of 256 wide heads are held twice, not three times, by older GPUs.
    stages = 3 if block_r == 16 and (half or not wide) else 2
    found = [
        Blocks(block_r, block_s, warps, stages),
        Blocks(block_r, block_s, warps, stages, waves=1),
        Blocks(block_r, block_s, warps, stages, waves=4),
        Blocks(block_r, block_s, warps, 5 - stages),
        Blocks(block_r, block_s // 2, 4, 3, waves=4),
    ]
    if half:
        found += [Blocks(block_r, 2 * block_s, 8, 2), Blocks(block_r, 2 * block_s, 4, 2)]
    return tuple(found)
