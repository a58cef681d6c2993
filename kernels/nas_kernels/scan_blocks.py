"""Which blocks of tokens and channels the kernels of scans may be launched with."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

from nas_kernels.launching import power_of_two

MAX_CHUNK = 64
MAX_CHANNELS = 32


class Blocks(NamedTuple):
    """Tokens and channels of a program, and its warps."""

    chunk: int
    channels: int
    warps: int = 4


def block_choices(shape_BTC: Sequence[int], chunk: int | None) -> tuple[Blocks, ...]:
    """Return the blocks to choose from, the default first; with a given chunk only that."""
    _, tokens, channels = (power_of_two(size) for size in shape_BTC)
    if chunk is not None:
        return (Blocks(chunk, min(channels, MAX_CHANNELS)),)
    return _block_choices(min(tokens, MAX_CHUNK), min(channels, 2 * MAX_CHANNELS))


@cache
def _block_choices(chunk: int, most: int) -> tuple[Blocks, ...]:
    channels, shorter = min(most, MAX_CHANNELS), max(chunk // 2, 1)
    fewer = max(channels // 2, 1)
    found = [Blocks(chunk, channels), Blocks(chunk, channels, 8), Blocks(chunk, fewer)]
    found += [Blocks(2 * chunk, fewer), Blocks(shorter, channels), Blocks(shorter, fewer)]
    found += [Blocks(shorter, most), Blocks(chunk, most, 8)]
    return tuple(dict.fromkeys(found))
