"""Names of position encodings: ``"nope"``, ``"alibi"``, ``"rope"`` and variants of rope.

``"rope"`` takes another base or rotates only a fraction of the features when its name says so, such
as ``"rope_b500000_f50"``. This module does not import torch; `searchspace.positions` computes.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

from searchspace.errors import UserError, unknown

KINDS = ("rope", "alibi", "nope")
_ROPE = re.compile(r"rope(?:_b(?P<base>[1-9]\d*))?(?:_f(?P<percent>[1-9]\d?))?")
THETA = 10_000


@dataclass(frozen=True)
class Rope:
    """Which rotary embedding.

    Args:
        base: of the wavelengths.
        percent: share of every head's features that is rotated; the rest carries no position.
    """

    base: int = THETA
    percent: int = 100

    def rotated(self, head_dim: int) -> int:
        """Return how many leading features are rotated (even, at least 2)."""
        return max(2, head_dim * self.percent // 200 * 2)


def position_kind(name: str) -> str:
    """Return ``"rope"``, ``"alibi"`` or ``"nope"``.

    Raises:
        UserError: for an unknown position encoding.
    """
    if name in KINDS:
        return name
    parse_rope(name)
    return "rope"


@functools.cache
def parse_rope(name: str) -> Rope:
    """Read a name such as ``"rope"`` or ``"rope_b500000_f50"``.

    Raises:
        UserError: when it is no rotary embedding, or not in its shortest form.
    """
    match = _ROPE.fullmatch(name)
    if match is None:
        if name.startswith("rope_"):
            raise UserError(
                f"position={name!r} is not understood; write rope, rope_b<base>, rope_f<percent "
                "rotated, 1 to 99> or both, such as rope_b500000_f50"
            )
        raise unknown("position", name, KINDS)
    rope = Rope(int(match["base"] or THETA), int(match["percent"] or 100))
    if match["base"] is not None and rope.base == THETA:
        raise UserError(f"position={name!r}: base {THETA} is the default; leave it out")
    return rope
