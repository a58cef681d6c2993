"""Rewrites of a network for export: other structure and values, the same function.

All of them work on a meta device, so that a stored network can be rebuilt before it is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from searchspace.errors import unknown
from searchspace.rewrites.centring import layernorm_to_rmsnorm
from searchspace.rewrites.folding import fold_norms

if TYPE_CHECKING:
    from searchspace.subnet import Subnet

REWRITES: dict[str, Callable[[Subnet], None]] = {"layernorm_to_rmsnorm": layernorm_to_rmsnorm}
"""Rewrites on demand, by the name an exported network records; `fold_norms` belongs to packing."""


def rewrite(subnet: Subnet, name: str) -> None:
    """Apply a rewrite to a network that is not packed yet, and record it for the checkpoint.

    Raises:
        UserError: for an unknown name, or a network that it does not fit.
    """
    if name not in REWRITES:
        raise unknown("rewrite", name, REWRITES)
    REWRITES[name](subnet)
    subnet.rewrites = (*subnet.rewrites, name)


__all__ = ["REWRITES", "fold_norms", "layernorm_to_rmsnorm", "rewrite"]
