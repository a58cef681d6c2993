"""The exact number of different archs of a space."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from searchspace.arch import sharing_kind
from searchspace.specs import ABSENT

if TYPE_CHECKING:
    from searchspace.arch import LayerArch
    from searchspace.space import SearchSpace

Kind = Any


def count_archs(space: SearchSpace) -> int:
    """Return how many archs a space has, skipped slots and shared keys and values counted right.

    Slots are independent of each other but for one thing: a layer may share keys and values only
    with a matching provider before it. So ways are counted slot by slot, for every depth so far
    and every kind of last provider.
    """
    own, sharing = _ways_of_a_layer(space)
    can_skip = space.min_depth < space.num_layers
    ways: dict[tuple[int, Kind], int] = {(0, None): 1}
    for _ in range(space.num_layers):
        after: Counter[tuple[int, Kind]] = Counter()
        for (depth, provider), count in ways.items():
            if can_skip:
                after[depth, provider] += count
            for kind, layers in own.items():
                after[depth + 1, kind or provider] += count * layers
            if provider in sharing:
                after[depth + 1, provider] += count * sharing[provider]
        ways = dict(after)
    stacks = sum(count for (depth, _), count in ways.items() if depth >= space.min_depth)
    return len(space.d_model) * stacks


def _ways_of_a_layer(space: SearchSpace) -> tuple[Counter[Kind], Counter[Kind]]:
    """Return how many active layers there are by the kind they provide, and those that share."""
    own: Counter[Kind] = Counter()
    sharing: Counter[Kind] = Counter()
    ffns = Counter(_norm_of(layer) for layer in set(space.ffn_half.layers) if not layer.skip)
    without_ffn = 0 in space.intermediate_size
    for layer in set(space.mixer_half.layers):
        if layer.mixer != ABSENT:
            kind = sharing_kind(layer, space.head_dim) if True in space.kv_shared else None
            counter = sharing if layer.kv_shared else own
            counter[kind] += ffns[_norm_of(layer)] + without_ffn
    if ABSENT in space.mixers:
        own[None] += ffns.total()
    return own, sharing


def _norm_of(layer: LayerArch) -> tuple[str, str]:
    return layer.norm, layer.norm_placement
