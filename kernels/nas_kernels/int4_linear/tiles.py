"""Which tiles the int4 product may be launched with; BLOCK_K is a multiple of a group."""

from __future__ import annotations

import torch

from nas_kernels.int4_linear.ref import GROUP
from nas_kernels.launching import Tiles

_ONE_TOKEN = (
    Tiles(1, 8, 32 * GROUP, 4, 1),
    Tiles(1, 8, 32 * GROUP, 4, 1, waves=8),
    Tiles(1, 4, 32 * GROUP, 4, 1),
    Tiles(1, 8, 16 * GROUP, 4, 1),
    Tiles(1, 16, 16 * GROUP, 4, 1),
    Tiles(1, 8, 64 * GROUP, 8, 1),
    Tiles(1, 16, 32 * GROUP, 8, 1, waves=4),
)
_FEW_TOKENS = (
    Tiles(16, 32, 128, 4, 4),
    Tiles(16, 32, 128, 4, 4, waves=8),
    Tiles(16, 16, 128, 4, 4),
    Tiles(16, 16, 256, 4, 3),
    Tiles(16, 32, 64, 4, 4, waves=4),
    Tiles(16, 64, 64, 4, 4),
    Tiles(16, 64, 128, 8, 3),
)
_SOME_TOKENS = (
    Tiles(64, 64, 64, 4, 3),
    Tiles(64, 64, 64, 4, 4, waves=4),
    Tiles(64, 32, 64, 4, 4),
    Tiles(32, 64, 64, 4, 4),
    Tiles(64, 64, 128, 8, 2),
    Tiles(64, 128, 64, 8, 3),
)
_MANY_TOKENS = (
    Tiles(128, 128, 64, 8, 3),
    Tiles(128, 128, 32, 8, 4),
    Tiles(128, 64, 64, 4, 3),
    Tiles(128, 64, 64, 8, 3),
    Tiles(64, 128, 64, 8, 3),
    Tiles(128, 128, 64, 8, 4),
)


def int4_tiles(num_tokens: int, dtype: torch.dtype) -> tuple[Tiles, ...]:
    """Return the tiles to choose from for tokens of a dtype, the default first.

    Few tokens are bound by reading weights.
    """
    if num_tokens == 1:
        return _ONE_TOKEN
    if num_tokens <= 16:
        return _FEW_TOKENS
    return _SOME_TOKENS if num_tokens <= 64 or dtype == torch.float32 else _MANY_TOKENS
