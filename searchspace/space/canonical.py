"""Genotypes of the same function brought to the same row.

A gene that has no effect (the window of a softmax layer, every gene of a skipped slot, ...) is set
to the first index that means the same. Which choices mean the same is asked of `LayerArch`, which
is canonical by construction (see `halves`); only sharing between layers and depth are decided here
as well. Works on int matrices of shape (n, genes), all rows at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from searchspace.space import SearchSpace

Genotypes = NDArray[np.int64]


def canonicalise(space: SearchSpace, genotypes: Genotypes) -> Genotypes:
    """Return a copy with every gene that does not count set to 0, and enough layers.

    Where fewer than `min_depth` slots are active, leading slots are switched on.
    """
    out = np.array(genotypes, dtype=np.int64, copy=True)
    for slot in range(space.num_layers):
        _settle_slot(space, out, slot)
    _switch_on_layers(space, out)
    if len(space.kv_shared) > 1:
        _resolve_sharing(space, out)
    return out


def _settle_slot(space: SearchSpace, out: Genotypes, slot: int) -> None:
    absent = np.ones(len(out), dtype=bool)
    for half in (space.mixer_half, space.ffn_half):
        place = half.index(out, slot)
        absent &= half.absent[place]
        genes, columns = half.varying[slot]
        out[:, columns] = half.canonical[place][:, genes]
    skip = absent | (space.indices(out, f"layers.{slot}.skip") == 1)
    out[np.ix_(skip, space.slot_columns[slot])] = 0
    if f"layers.{slot}.skip" in space.columns:
        out[skip, space.columns[f"layers.{slot}.skip"]] = 1


def _switch_on_layers(space: SearchSpace, out: Genotypes) -> None:
    if "layers.0.skip" not in space.columns:
        return
    columns = [space.columns[f"layers.{slot}.skip"] for slot in range(space.num_layers)]
    for column in columns:
        missing = (out[:, columns] == 0).sum(axis=1) < space.min_depth
        out[missing & (out[:, column] == 1), column] = 0


def _resolve_sharing(space: SearchSpace, out: Genotypes) -> None:
    """Drop `kv_shared` where no earlier layer provides; see `arch.resolve_sharing`."""
    shares = list(space.kv_shared).index(True)
    unshared = list(space.kv_shared).index(False)
    provider = np.full(len(out), -2)
    for slot in range(space.num_layers):
        active = space.indices(out, f"layers.{slot}.skip") == 0
        kind = np.where(active, space.mixer_half.sharing[space.mixer_half.index(out, slot)], -1)
        column = space.columns[f"layers.{slot}.kv_shared"]
        shared = (out[:, column] == shares) & (kind >= 0) & (kind == provider)
        out[:, column] = np.where(shared, shares, np.where(active & (kind >= 0), unshared, 0))
        provider = np.where((kind >= 0) & ~shared, kind, provider)
