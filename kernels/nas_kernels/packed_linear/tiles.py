"""Which tiles the product with packed codes may be launched with."""

from __future__ import annotations

import torch

from nas_kernels.launching import Tiles


def _one_token(codes: int) -> tuple[Tiles, ...]:
    """Tiles for one token, which is not for the matrix units; a byte holds so many codes."""
    return (
        Tiles(1, 8, 512 * codes, 4, 1),
        Tiles(1, 8, 512 * codes, 4, 1, waves=8),
        Tiles(1, 4, 512 * codes, 4, 1),
        Tiles(1, 4, 1024 * codes, 4, 1),
        Tiles(1, 8, 1024 * codes, 8, 1),
        Tiles(1, 16, 256 * codes, 4, 1),
        Tiles(1, 16, 512 * codes, 8, 1, waves=4),
    )


_ONE_TOKEN = {codes: _one_token(codes) for codes in (1, 4)}
_FEW_TOKENS_FP32 = (
    Tiles(16, 32, 128, 4, 4),
    Tiles(16, 32, 128, 4, 3, waves=4),
    Tiles(16, 16, 256, 4, 3),
    Tiles(16, 64, 64, 4, 4),
)
_FEW_TOKENS = (
    Tiles(16, 32, 256, 4, 4),
    Tiles(16, 32, 256, 4, 3, waves=4),
    Tiles(16, 32, 128, 4, 4, waves=4),
    Tiles(16, 16, 256, 4, 4),
    Tiles(16, 64, 128, 4, 4),
    Tiles(16, 64, 256, 8, 3),
    Tiles(16, 128, 128, 8, 3),
)
_FP32 = (
    Tiles(64, 64, 64, 4, 3),
    Tiles(64, 64, 32, 4, 4),
    Tiles(32, 64, 64, 4, 3),
    Tiles(64, 128, 32, 8, 3),
    Tiles(128, 64, 32, 8, 3),
)
_SOME_TOKENS = (
    Tiles(64, 64, 128, 4, 3),
    Tiles(64, 64, 128, 4, 4, waves=4),
    Tiles(64, 32, 128, 4, 4),
    Tiles(32, 64, 128, 4, 4),
    Tiles(64, 64, 256, 8, 3),
    Tiles(64, 128, 128, 8, 3),
)


def _many_tokens(block_k: int) -> tuple[Tiles, ...]:
    return (
        Tiles(128, 128, block_k, 8, 3),
        Tiles(128, 128, 64, 8, 4),
        Tiles(64, 128, 64, 4, 4),
        Tiles(128, 64, 64, 4, 4),
        Tiles(64, 64, 128, 4, 3),
        Tiles(128, 256, 64, 8, 3),
    )


_MANY_TOKENS, _MANY_TOKENS_INT8 = _many_tokens(64), _many_tokens(128)


def packed_tiles(num_tokens: int, codes: int, dtype: torch.dtype) -> tuple[Tiles, ...]:
    """Return the tiles to choose from, the default first.

    Args:
        num_tokens: M.
        codes: in a byte, 1 or 4.
        dtype: of the inputs; the tiles of all stages have to fit in shared memory.
    """
    if num_tokens == 1:
        return _ONE_TOKEN[codes]
    if num_tokens <= 16:
        return _FEW_TOKENS_FP32 if dtype == torch.float32 else _FEW_TOKENS
    if dtype == torch.float32:
        return _FP32
    if num_tokens <= 64:
        return _SOME_TOKENS
    return _MANY_TOKENS_INT8 if dtype == torch.int8 else _MANY_TOKENS
