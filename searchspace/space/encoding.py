"""Archs as genotypes and as mappings from gene to value, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from searchspace.arch import Arch
from searchspace.errors import UserError
from searchspace.layer_arch import LayerArch
from searchspace.space.canonical import Genotypes

if TYPE_CHECKING:
    from searchspace.space import SearchSpace


def decode(space: SearchSpace, genotype: Sequence[int] | Genotypes) -> Arch:
    """Return the arch of a genotype (canonicalised first).

    Raises:
        UserError: when the length or an index is out of range.
    """
    row = np.asarray(genotype, dtype=np.int64)
    sizes = np.array([len(choices) for choices in space.genes.values()])
    if row.shape != sizes.shape or (row < 0).any() or (row >= sizes).any():
        raise UserError(
            f"a genotype of space {space.name!r} has {len(sizes)} indices below their number "
            f"of choices; got {row.tolist()}"
        )
    row = space.canonical(row[None])[0]
    layers = tuple(_decode_layer(space, row, slot) for slot in range(space.num_layers))
    d_model = space.d_model[row[space.columns["d_model"]] if "d_model" in space.columns else 0]
    return space.arch(d_model, layers)


def _decode_layer(space: SearchSpace, row: Genotypes, slot: int) -> LayerArch:
    choice = {
        gene: choices[space.indices(row[None], f"layers.{slot}.{gene}")[0]]
        for gene, choices in space.layer_choices().items()
    }
    return space.layer(choice)


def encode(space: SearchSpace, arch: Arch) -> Genotypes:
    """Return the canonical genotype of an arch.

    Raises:
        UserError: naming the field that the space does not offer.
    """
    _check_fixed(space, arch)
    row: Genotypes = to_genotypes(space, [{"d_model": arch.d_model}])[0]
    for slot, layer in enumerate(arch.layers):
        for gene, index in _indices_of(space, layer, slot).items():
            if (column := space.columns.get(f"layers.{slot}.{gene}")) is not None:
                row[column] = index
    return row


def _check_fixed(space: SearchSpace, arch: Arch) -> None:
    for field, given, fixed in (
        ("layer slots", len(arch.layers), space.num_layers),
        ("head_dim", arch.head_dim, space.head_dim),
        ("vocab_size", arch.vocab_size, space.vocab_size),
        ("family", arch.family, space.family),
    ):
        if given != fixed:
            raise UserError(
                f"the arch has {field}={given}, all of space {space.name!r} have {fixed}; "
                "choose an arch of the space"
            )
    if arch.depth < space.min_depth:
        raise UserError(
            f"the arch has depth {arch.depth}, below min_depth={space.min_depth} of space "
            f"{space.name!r}; skip fewer layers"
        )


def _indices_of(space: SearchSpace, layer: LayerArch, slot: int) -> dict[str, int]:
    """Return the index of every gene of a slot that counts in a layer."""
    if layer.skip:
        return {"skip": 1}
    return space.mixer_half.choice(layer, slot) | space.ffn_half.choice(layer, slot)


def to_genotypes(space: SearchSpace, params: Sequence[Mapping[str, Any]]) -> Genotypes:
    """Return the int matrix of mappings from gene name to value; absent genes are 0."""
    out = np.zeros((len(params), len(space.genes)), dtype=np.int64)
    fixed = space.all_choices()
    for row, values in enumerate(params):
        for name, value in values.items():
            choices = space.genes.get(name)
            if choices is None:
                choices = fixed.get(name.split(".", 2)[-1] if "." in name else name, ())
            if value not in choices:
                raise UserError(
                    f"{name}={value!r} is not in space {space.name!r}; choose one of "
                    f"{', '.join(map(str, choices)) or 'its own fields'}"
                )
            if name in space.columns:
                out[row, space.columns[name]] = choices.index(value)
    return out


def to_params(space: SearchSpace, genotypes: Genotypes) -> list[dict[str, Any]]:
    """Return one mapping from gene name to value per row."""
    items = list(space.genes.items())
    return [
        {name: choices[index] for (name, choices), index in zip(items, row, strict=True)}
        for row in genotypes.tolist()
    ]
