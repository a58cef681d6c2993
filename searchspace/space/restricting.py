"""A space with fewer choices: the same archs, less some of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from searchspace.errors import UserError, unknown
from searchspace.space.files import PLAIN_LAYER_KEYS

if TYPE_CHECKING:
    from searchspace.space import SearchSpace
    from searchspace.space.halves import Operators


def restricted(space: SearchSpace, choices: Mapping[str, Sequence[Any]]) -> SearchSpace:
    """Return the part of a space that keeps only these choices; see `SearchSpace.restricted`."""
    offered = space.all_choices()
    for gene, wanted in choices.items():
        _check(gene, wanted, offered)
    kept = {
        gene: tuple(value for value in values if value in choices.get(gene, values))
        for gene, values in offered.items()
    }
    if kept["skip"] == (True,):
        raise UserError("skip=[True] leaves no layer; keep False")
    plain: dict[str, Any] = {key: kept[key] for key in PLAIN_LAYER_KEYS}
    return replace(
        space,
        d_model=kept["d_model"],
        min_depth=space.min_depth if True in kept["skip"] else space.num_layers,
        mixers=_kept_operators(space.mixers, kept["mixer"], kept),
        heads=tuple(pair for pair in space.heads if f"{pair[0]}x{pair[1]}" in kept["heads"]),
        ffn_options=_kept_operators(space.ffn_options, kept["ffn"], kept),
        **plain,
    )


def _check(gene: str, wanted: Sequence[Any], offered: Mapping[str, tuple[Any, ...]]) -> None:
    if gene not in offered:
        raise unknown("gene", gene, offered)
    if isinstance(wanted, str):
        raise UserError(f"{gene}={wanted!r} is one choice; give a list of choices to keep")
    for value in wanted:
        if value not in offered[gene]:
            raise unknown(f"choice of {gene}", str(value), [str(v) for v in offered[gene]])


def _kept_operators(
    operators: Operators, names: Sequence[str], kept: Mapping[str, tuple[Any, ...]]
) -> Operators:
    return {
        name: {option: kept[f"{name}.{option}"] for option in options}
        for name, options in operators.items()
        if name in names
    }
