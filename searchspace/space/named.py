"""Archs of a space with a name: its extremes, uniform ones, one change from the largest."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from searchspace.arch import Arch
from searchspace.errors import UserError, unknown
from searchspace.layer_arch import LayerArch

if TYPE_CHECKING:
    from searchspace.space import SearchSpace


def largest(space: SearchSpace) -> Arch:
    """Return the arch with every dimension at its maximum and first choices elsewhere."""
    return _uniform(
        space, max(space.d_model), max(space.heads), max(space.intermediate_size), space.num_layers
    )


def smallest(space: SearchSpace) -> Arch:
    """Return the arch with every dimension at its minimum above 0, first choices elsewhere."""
    nonzero = [size for size in space.intermediate_size if size] or [0]
    return _uniform(space, min(space.d_model), min(space.heads), min(nonzero), space.min_depth)


def uniform(space: SearchSpace, **choices: Any) -> Arch:
    """Return the arch with the same layer in `depth` evenly spread slots.

    Args:
        choices: `d_model`, `depth`, `cla_factor` (so many layers in a row use the keys and
            values of the first), and values of layer genes (`mixer="softmax"`,
            `heads="6x2"`, ...); what is not given takes the largest arch's value.

    Raises:
        UserError: for an unknown gene, or a value the space does not offer.
    """
    d_model = choices.pop("d_model", max(space.d_model))
    depth = choices.pop("depth", space.num_layers)
    cla_factor = choices.pop("cla_factor", 1)
    if not space.min_depth <= depth <= space.num_layers:
        raise UserError(
            f"depth={depth} is not in space {space.name!r}; choose {space.min_depth} to "
            f"{space.num_layers}"
        )
    base = _default_choice(space, max(space.heads), max(space.intermediate_size))
    for name in choices:
        if name not in base:
            raise unknown("gene", name, base)
    arch = _stack(space, d_model, space.layer({**base, **choices}), depth, cla_factor)
    space.encode(arch)
    return arch


def one_change_from_largest(space: SearchSpace) -> list[Arch]:
    """Return every arch that differs from the largest in one gene, changed in all slots.

    Together with the largest it is the one-factor-at-a-time design around the network that
    people start from: it shows what each choice costs where networks are good.
    """
    start = largest(space)
    base = _default_choice(space, max(space.heads), max(space.intermediate_size))
    changed: list[dict[str, Any]] = [{"d_model": width} for width in space.d_model]
    changed += [{"depth": depth} for depth in range(space.min_depth, space.num_layers)]
    for gene, choices in space.layer_choices().items():
        if gene != "skip":
            changed += [{gene: choice} for choice in choices if choice != base[gene]]
    for kind, operators in (("mixer", space.mixers), ("ffn", space.ffn_options)):
        changed += [
            {kind: name, f"{name}.{option}": choice}
            for name, options in operators.items()
            for option, choices in options.items()
            for choice in choices
        ]
    archs = {arch.id: arch for arch in (uniform(space, **change) for change in changed)}
    archs.pop(start.id, None)
    return list(archs.values())


def _default_choice(space: SearchSpace, heads: tuple[int, int], size: int) -> dict[str, Any]:
    first = {gene: choices[0] for gene, choices in space.layer_choices().items()}
    return {**first, "heads": f"{heads[0]}x{heads[1]}", "intermediate_size": size}


def _uniform(
    space: SearchSpace, d_model: int, heads: tuple[int, int], size: int, depth: int
) -> Arch:
    return _stack(space, d_model, space.layer(_default_choice(space, heads, size)), depth)


def _stack(
    space: SearchSpace, d_model: int, layer: LayerArch, depth: int, cla_factor: int = 1
) -> Arch:
    active = [round(i * space.num_layers / depth) for i in range(depth)]
    layers = [LayerArch()] * space.num_layers
    for number, slot in enumerate(active):
        layers[slot] = replace(layer, kv_shared=True) if number % cla_factor else layer
    return space.arch(d_model, tuple(layers))
