"""Which blocks of rows the kernels of norms may be launched with."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from nas_kernels.launching import power_of_two

TILE = 2048
"""Elements below which a program takes several rows."""
MOST_WARPS = 16


class Blocks(NamedTuple):
    """What one program normalises at a time, and how.

    Attributes:
        rows: at a time.
        warps: of a program.
        programs: for each multiprocessor, among which backward divides all rows.
    """

    rows: int
    warps: int
    programs: int = 1


def padded_width(width: int) -> int:
    """Return the columns of a program."""
    return max(power_of_two(width), 16)


@cache
def forward_blocks(block: int) -> tuple[Blocks, ...]:
    """Return the blocks to choose from for rows of so many columns, the default first."""
    rows = max(TILE // block, 1)
    warps = _num_warps(rows * block, 1024)
    found = [Blocks(rows, warps), Blocks(rows, 2 * warps), Blocks(rows, warps // 2)]
    found += [Blocks(max(rows // 2, 1), warps), Blocks(2 * rows, 2 * warps), Blocks(1, 4)]
    return _distinct(found)


@cache
def backward_blocks(block: int) -> tuple[Blocks, ...]:
    """Return the blocks to choose from for the gradients, the default first."""
    rows = max(TILE // block, 1)
    warps = _num_warps(rows * block, 512)
    programs = MOST_WARPS // warps
    found = [Blocks(rows, warps, programs), Blocks(rows, warps, 2 * programs)]
    found += [Blocks(rows, warps, max(programs // 2, 1)), Blocks(rows, warps, 4 * programs)]
    found += [Blocks(rows, 2 * warps, programs), Blocks(rows, warps // 2, 2 * programs)]
    found += [Blocks(max(rows // 2, 1), warps, programs), Blocks(2 * rows, 2 * warps, programs)]
    return _distinct(found)


def _distinct(found: list[Blocks]) -> tuple[Blocks, ...]:
    return tuple(dict.fromkeys(b for b in found if b.warps <= MOST_WARPS))


def _num_warps(elements: int, each: int) -> int:
    """Return warps so that one holds `each` elements, 4 at least."""
    return min(max(elements // each, 4), MOST_WARPS)
