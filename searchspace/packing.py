"""Packing: the form of a network that is deployed."""

from __future__ import annotations

from torch import nn

from searchspace.linear import Linear
from searchspace.rewrites.folding import fold_norms


def pack(module: nn.Module) -> None:
    """Bring a network or sub-block into the form that is deployed.

    Norms that are affine maps at inference are folded into the maps beside them, and every
    quantised layer takes the form that is stored and run.
    """
    fold_norms(module)
    for child in module.modules():
        if isinstance(child, Linear):
            child.pack()
