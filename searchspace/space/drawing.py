"""Random archs of a space: drawn, mutated and crossed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from searchspace.space.canonical import Genotypes

if TYPE_CHECKING:
    from searchspace.arch import Arch
    from searchspace.space import SearchSpace

MAX_KEPT = 0.9
"""Largest share of genes that a random arch keeps at the first choice."""


def sample_genotypes(space: SearchSpace, rng: np.random.Generator, num: int) -> Genotypes:
    """Draw `num` canonical genotypes; see `SearchSpace.sample_genotypes`."""
    out = np.zeros((num, len(space.genes)), dtype=np.int64)
    keep = rng.random((num, 1)) * MAX_KEPT
    shares: dict[str, NDArray[np.float64]] = {}
    for name, choices in space.genes.items():
        gene = name.split(".", 2)[-1]
        if gene not in shares:
            shares[gene] = rng.dirichlet(np.ones(len(choices)), size=num).cumsum(axis=1)
        drawn = (rng.random((num, 1)) > shares[gene][:, :-1]).sum(axis=1)
        # Depth stays spread evenly.
        kept = (rng.random(num) < keep[:, 0]) & (gene != "skip")
        out[:, space.columns[name]] = np.where(kept, 0, drawn)
    return space.canonical(out)


def random_of_size(
    space: SearchSpace, rng: np.random.Generator, params: int, num_draws: int
) -> Arch:
    """Draw the arch of `num_draws` whose parameter count is nearest to `params`."""
    from searchspace.cost import CostTable, num_params

    genotypes = sample_genotypes(space, rng, num_draws)
    distance = np.abs(CostTable(space, num_params).of(genotypes) - params)
    return space.decode(genotypes[int(distance.argmin())])


def mutate(space: SearchSpace, arch: Arch, rng: np.random.Generator, rate: float) -> Arch:
    """Redraw every gene with probability `rate`, at least one."""
    row = space.encode(arch)
    change = rng.random(len(row)) < rate
    change[rng.integers(len(row))] = True
    sizes = np.array([len(choices) for choices in space.genes.values()])
    return space.decode(np.where(change, rng.integers(0, sizes), row))


def crossover(space: SearchSpace, first: Arch, second: Arch, rng: np.random.Generator) -> Arch:
    """Take every whole layer slot, and the width, from either parent."""
    a, b = space.encode(first), space.encode(second)
    from_first = rng.random(space.num_layers + 1) < 0.5
    slots = [int(n.split(".")[1]) if "." in n else space.num_layers for n in space.genes]
    return space.decode(np.where(from_first[slots], a, b))
