"""Fewer choices of a space, to be scored in less time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from searchspace.errors import UserError, unknown
from searchspace.space import SearchSpace


def only(space: SearchSpace, texts: Sequence[str]) -> SearchSpace:
    """Return a space with fewer choices of some genes.

    Args:
        space: all choices.
        texts: each ``GENE=CHOICE,...``, such as ``d_model=192`` or ``mixer=softmax,gla``.

    Raises:
        UserError: for an unknown gene or choice.
    """
    changes: dict[str, Any] = {}
    genes = {name: choices for name, choices in space.all_choices().items() if "." not in name}
    del genes["skip"]
    for text in texts:
        gene, equals, values = text.partition("=")
        if not equals or not values:
            raise UserError(f"--only {text!r} is not understood; write GENE=CHOICE,...")
        if gene not in genes:
            raise unknown("gene", gene, genes)
        wanted = values.split(",")
        by_text = {str(choice): choice for choice in genes[gene]}
        for value in wanted:
            if value not in by_text:
                raise unknown(f"choice of {gene}", value, by_text)
        kept = [choice for name, choice in by_text.items() if name in wanted]
        changes |= _field(space, gene, kept)
    return replace(space, **changes)


def _field(space: SearchSpace, gene: str, kept: Sequence[Any]) -> Mapping[str, Any]:
    """Return the fields of `SearchSpace` that say which choices of a gene there are."""
    if gene == "mixer":
        return {"mixers": {name: space.mixers[name] for name in kept}}
    if gene == "heads":
        pairs = [tuple(map(int, text.split("x"))) for text in kept]
        return {"heads": tuple(pairs)}
    if gene == "ffn":
        options = {name: own for name, own in space.ffn_options.items() if name in kept}
        return {"ffn": tuple(kept), "ffn_options": options}
    return {gene: tuple(kept)}
