"""Which networks the final front and the groups beside it hold."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nas.candidates import SpaceCodec
from nas.pareto import greedy_hypervolume_subset, non_dominated, normalise
from nas.study import Evaluated
from searchspace.arch import Arch
from searchspace.errors import UserError
from searchspace.space import SearchSpace
from searchspace.specs import ABSENT


def select_front(items: Sequence[Evaluated], size: int) -> list[Evaluated]:
    """Return at most `size` feasible, non-dominated candidates: extremes, then by hypervolume.

    Raises:
        UserError: when no candidate is feasible; says the best that was reached.
    """
    feasible = [item for item in items if item.feasible]
    if not feasible:
        best = min((item.values[0] for item in items), default=float("nan"))
        raise UserError(
            f"none of {len(items)} evaluated archs keeps every constraint; the best first "
            f"objective that was reached is {best:.4g}; loosen the constraint or search longer"
        )
    values = np.array([item.values for item in feasible], dtype=np.float64)
    rows = np.flatnonzero(non_dominated(values))
    scaled = normalise(values[rows], values[rows].min(axis=0), values[rows].max(axis=0))
    chosen = list(dict.fromkeys(int(i) for i in scaled.argmin(axis=0)))[:size]
    rest = [i for i in range(len(rows)) if i not in chosen]
    reference = np.full(values.shape[1], 1.1)
    picked = greedy_hypervolume_subset(scaled[chosen], scaled[rest], reference, size - len(chosen))
    return [feasible[rows[i]] for i in [*chosen, *(rest[p] for p in picked)]]


def uniform_networks(space: SearchSpace) -> dict[str, Arch]:
    """Return the networks a person would try first, by name: one layer repeated, several sizes.

    The layer has softmax attention, or the first mixer of a space without it. Every width at full,
    half and the least depth; all heads, rotary positions and fp32 where the space has them, and
    the FFN width that is nearest to four times the model width.
    """
    mixers = [name for name in space.mixers if name != ABSENT] or [ABSENT]
    mixer = "softmax" if "softmax" in mixers else mixers[0]
    plain = {"position": "rope", "mixer_precision": "fp32", "ffn_precision": "fp32"}
    choices = {gene: value for gene, value in plain.items() if value in getattr(space, gene)}
    sizes = [size for size in space.intermediate_size if size or mixer != ABSENT]
    depths = {space.num_layers, max(space.num_layers // 2, space.min_depth), space.min_depth}
    networks: dict[str, Arch] = {}
    for d_model in space.d_model:
        size = min(sizes, key=lambda width: abs(width - 4 * d_model))
        for depth in sorted(depths, reverse=True):
            name = f"{mixer} d{d_model} L{depth}" if mixer != ABSENT else f"ffn d{d_model} L{depth}"
            networks[name] = space.uniform(
                d_model=d_model, depth=depth, mixer=mixer, intermediate_size=size, **choices
            )
    return networks


def random_archs(space: SearchSpace, codec: SpaceCodec, count: int, seed: int) -> list[Arch]:
    """Return `count` different random archs that keep the exact constraints."""
    rng = np.random.default_rng([seed, 11])
    found: dict[str, Arch] = {}
    for _ in range(200):
        rows = space.sample_genotypes(rng, 4 * count)
        for row in rows[(codec.constraints(rows) <= 0).all(axis=1)]:
            arch = space.decode(row)
            found.setdefault(arch.id, arch)
            if len(found) == count:
                return list(found.values())
    return list(found.values())
