"""The search space around a checkpoint: it is the largest network, everything smaller is offered.

Heads: H query heads that read G key/value heads, R = H / G of them each.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from nas.importing.recipe import Recipe
from searchspace.errors import UserError, unknown
from searchspace.space import SearchSpace
from searchspace.specs import ABSENT

PRECISIONS = ("fp32", "int8")
MULTIPLE = 8
"""FFN widths are rounded to multiples of it where they are larger."""


@dataclass(frozen=True)
class Choices:
    """What smaller networks are offered.

    Args:
        ffn: FFN widths in percent of the checkpoint's; 0 offers to leave the FFN out.
        heads: key/value heads, with all query heads that read them, in percent.
        width: widths of the residual stream in percent. Less than 100 costs far more quality than
            the others at the same size, so nothing less is offered unless asked for.
        min_depth: layers that are never skipped at once; None for half of them.
        mixers: further mixers, by name, beside the checkpoint's own in shorter windows; ``"none"``
            offers to leave the mixer out.
        precisions: of weights.

    Raises:
        UserError: for a percentage out of range.
    """

    ffn: tuple[int, ...] = (100, 75, 50, 25, 0)
    heads: tuple[int, ...] = (100, 75, 50, 25)
    width: tuple[int, ...] = (100,)
    min_depth: int | None = None
    mixers: tuple[str, ...] = ("sliding_window", ABSENT)
    precisions: tuple[str, ...] = PRECISIONS

    def __post_init__(self) -> None:
        for name, least in (("ffn", 0), ("heads", 1), ("width", 1)):
            percents = getattr(self, name)
            if any(not least <= percent <= 100 for percent in percents):
                raise UserError(
                    f"--{name} {','.join(map(str, percents))} is out of range; give percentages of "
                    f"{least} to 100"
                )
            object.__setattr__(self, name, (100, *(p for p in percents if p != 100)))


def space_around(recipe: Recipe, name: str, choices: Choices, seq_len: int) -> SearchSpace:
    """Return the space whose largest network is a checkpoint.

    Args:
        recipe: of the checkpoint.
        name: of the space.
        choices: what smaller networks are offered.
        seq_len: tokens of the task's inputs, of which shorter windows see a half or a quarter.

    Raises:
        UserError: for an unknown mixer, or sizes that do not fit together.
    """
    layer = recipe.layer
    precisions = tuple(dict.fromkeys(("fp32", *choices.precisions)))
    min_depth = choices.min_depth or (recipe.num_layers + 1) // 2
    own = {key: (value,) for key, value in layer.ffn_options}
    return SearchSpace(
        name=name,
        vocab_size=recipe.vocab_size,
        d_model=_sizes(recipe.d_model, choices.width, 2),
        head_dim=recipe.head_dim,
        num_layers=recipe.num_layers,
        min_depth=min_depth,
        mixers=_mixers(recipe, choices.mixers, seq_len),
        heads=_heads(layer.num_heads, layer.num_kv_heads, choices.heads),
        position=(layer.position,),
        mixer_precision=precisions,
        ffn=(layer.ffn,),
        ffn_options={layer.ffn: own} if own else {},
        intermediate_size=_sizes(layer.intermediate_size, choices.ffn, MULTIPLE),
        ffn_precision=precisions,
        norm=(layer.norm,),
        norm_placement=(layer.norm_placement,),
        family=recipe.family,
    )


def _sizes(largest: int, percents: tuple[int, ...], multiple: int) -> tuple[int, ...]:
    """Return sizes from large to small, those below the largest rounded."""
    sizes = [largest]
    for percent in percents:
        exact = largest * percent / 100
        rounded = round(exact / multiple) * multiple if exact >= multiple else round(exact)
        sizes.append(min(largest, rounded))
    return tuple(sorted(set(sizes), reverse=True))


def _heads(num_heads: int, num_kv: int, percents: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Return (query, key/value) heads; a query head keeps the key/value head that it reads."""
    if num_kv == 1:
        return tuple((heads, 1) for heads in _sizes(num_heads, percents, 1) if heads)
    per_group = num_heads // num_kv
    return tuple((per_group * groups, groups) for groups in _sizes(num_kv, percents, 1) if groups)


def _mixers(
    recipe: Recipe, wanted: tuple[str, ...], seq_len: int
) -> dict[str, dict[str, tuple[Any, ...]]]:
    """Return the mixers with the choices of their options, the checkpoint's own first."""
    from searchspace.mixers import MIXERS

    own, options = recipe.layer.mixer, dict(recipe.layer.mixer_options)
    longest = int(options.get("window", seq_len))
    windows = tuple(w for w in (seq_len // 2, seq_len // 4) if 1 < w < longest)
    found: dict[str, dict[str, tuple[Any, ...]]] = {own: {k: (v,) for k, v in options.items()}}
    for name in wanted:
        if name != ABSENT and name not in MIXERS:
            raise unknown("mixer", name, [*MIXERS, ABSENT])
        if name == "sliding_window":
            if not windows:
                continue
            mine = found.get(name, {}).get("window", ())
            found[name] = {**_known(name, options), "window": (*mine, *windows)}
        else:
            found.setdefault(name, _known(name, options))
    return found


def _known(name: str, options: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    """Return those of the checkpoint's options that another mixer has too."""
    from searchspace.mixers import MIXERS

    if name == ABSENT:
        return {}
    return {k: (v,) for k, v in options.items() if k in MIXERS[name].options and k != "window"}


def space_toml(space: SearchSpace) -> str:
    """Return a space as the TOML text that `SearchSpace.load` reads."""
    return "".join(_tables({k: v for k, v in space.to_dict().items() if k != "name"}, ()))


def _tables(values: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[str]:
    """Yield a table's text, its own values before the tables in it."""
    plain = {key: value for key, value in values.items() if not isinstance(value, Mapping)}
    if path and (plain or not values):
        yield f"\n[{'.'.join(path)}]\n"
    for key, value in plain.items():
        # Numbers, texts, truth values and lists of them are written alike in JSON and TOML.
        yield f"{key} = {json.dumps(value)}\n"
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _tables(value, (*path, key))
