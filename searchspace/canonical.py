"""Genotypes of the same function brought to the same row.

A gene that has no effect (the window of a softmax layer, every gene of a skipped slot, ...) is set
to 0. Works on int matrices of shape (n, genes), all rows at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from searchspace.mixers import MIXERS
from searchspace.specs import ABSENT

if TYPE_CHECKING:
    from searchspace.space import SearchSpace

Genotypes = NDArray[np.int64]
Rows = NDArray[np.bool_]
MIXER_GENES = ("heads", "position", "mixer_precision")
FFN_GENES = ("ffn", "ffn_precision")


def canonicalise(space: SearchSpace, genotypes: Genotypes) -> Genotypes:
    """Return a copy with every gene that does not count set to 0, and enough layers.

    Where fewer than `min_depth` slots are active, leading slots are switched on.
    """
    out = np.array(genotypes, dtype=np.int64, copy=True)
    for slot in range(space.num_layers):
        _clear_slot(space, out, f"layers.{slot}.")
    _switch_on_layers(space, out)
    return out


def _clear(
    space: SearchSpace, out: Genotypes, prefix: str, genes: Iterable[str], rows: Rows
) -> None:
    for gene in genes:
        column = space.columns.get(prefix + gene)
        if column is not None:
            out[rows, column] = 0


def _clear_slot(space: SearchSpace, out: Genotypes, prefix: str) -> None:
    mixer = space.indices(out, prefix + "mixer")
    skip = space.indices(out, prefix + "skip") == 1
    size = np.asarray(space.intermediate_size)[space.indices(out, prefix + "intermediate_size")]
    no_ffn, no_mixer = size == 0, np.zeros(len(out), dtype=bool)
    for index, name in enumerate(space.mixers):
        chosen = mixer == index
        others = [key for key in space.mixer_options() if not key.startswith(name + ".")]
        _clear(space, out, prefix, others, chosen)
        if name == ABSENT:
            no_mixer = chosen
            _clear(space, out, prefix, MIXER_GENES, chosen)
        elif not set(space.position) <= set(MIXERS[name].positions):
            _clear(space, out, prefix, ["position"], chosen)
    _clear(space, out, prefix, FFN_GENES, no_ffn)
    skip |= no_mixer & no_ffn
    _clear(space, out, prefix, space.layer_choices(), skip)
    if prefix + "skip" in space.columns:
        out[skip, space.columns[prefix + "skip"]] = 1


def _switch_on_layers(space: SearchSpace, out: Genotypes) -> None:
    if "layers.0.skip" not in space.columns:
        return
    columns = [space.columns[f"layers.{slot}.skip"] for slot in range(space.num_layers)]
    for column in columns:
        missing = (out[:, columns] == 0).sum(axis=1) < space.min_depth
        out[missing & (out[:, column] == 1), column] = 0
