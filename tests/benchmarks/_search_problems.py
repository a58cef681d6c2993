"""Problems that samplers are compared on: public surrogates and a synthetic layered network.

A genotype is a row of levels, one per gene. Objective 0 is the one that costs an evaluation; all
others are exact and free. Letters: N genotypes, G genes, M objectives (minimised).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nas.pareto import non_dominated
from nas.samplers import GeneCodec
from nas.samplers._design import tilted_levels
from predictors.benchmarks.hwgpt import HwGptSpace
from predictors.encodings import Gene, layer_groups
from searchspace.errors import UserError

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

SHUFFLES = ("labels", "each", "names")


class Problem(Protocol):
    """A space with a costly quality (objective 0) and free costs (all others)."""

    @property
    def name(self) -> str:
        """What the table calls it."""
        ...

    @property
    def genes(self) -> Sequence[Gene]:
        """One per column of a genotype."""
        ...

    @property
    def objectives(self) -> tuple[str, ...]:
        """Names; the first costs an evaluation."""
        ...

    @property
    def anchors(self) -> Sequence[dict[str, Any]]:
        """What a user would evaluate first, as parameters; the structured design begins so."""
        ...

    def canonical(self, levels: IntArray) -> IntArray:
        """Set genes that do not count to a default."""
        ...

    def quality(self, levels: IntArray) -> FloatArray:
        """Return objective 0 without noise, shape (N,)."""
        ...

    def costs(self, levels: IntArray) -> FloatArray:
        """Return the other objectives, shape (N, M - 1)."""
        ...

    def best_known(self) -> FloatArray | None:
        """Return the best front that is known, shape (points, M), or None."""
        ...


class ProblemCodec(GeneCodec):
    """The vectorised view of a problem that samplers take."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.genes)
        self.problem = problem
        self.exact_indices = tuple(range(1, len(problem.objectives)))

    def canonical(self, matrix: IntArray) -> IntArray:
        return self.problem.canonical(matrix)

    def exact_objectives(self, matrix: IntArray) -> FloatArray:
        return self.problem.costs(matrix)


class HwGpt:
    """HW-GPT-Bench: perplexity against parameters (``pp``), memory (``pm``) or both (``three``)."""

    anchors: Sequence[dict[str, Any]] = ()

    def __init__(self, folder: Path, space: str, pair: str) -> None:
        self._space = HwGptSpace.load(folder, space)
        self.name, self.genes = f"{space} {pair}", tuple(self._space.genes)
        costs = {"pp": ("params_m",), "pm": ("memory_mb",), "three": ("params_m", "memory_mb")}
        self.objectives: tuple[str, ...] = ("perplexity", *costs[pair])
        self._path = folder / f"front_{space}_{pair}.npz"

    def canonical(self, levels: IntArray) -> IntArray:
        return self._space.canonical(levels)

    def quality(self, levels: IntArray) -> FloatArray:
        return self._space.perplexity(levels)

    def costs(self, levels: IntArray) -> FloatArray:
        known = {
            "params_m": lambda: self._space.num_params(levels) / 1e6,
            "memory_mb": lambda: self._space.bf16_memory_mb(levels),
        }
        return np.stack([known[name]() for name in self.objectives[1:]], axis=1)

    def best_known(self) -> FloatArray | None:
        if len(self.objectives) > 2:
            return None
        if not self._path.is_file():
            raise UserError(f"{self._path} is absent; give the folder that holds the fronts")
        with np.load(self._path, allow_pickle=False) as arrays:
            return np.asarray(arrays["F"], dtype=np.float64)


class Layered:
    """Synthetic: saturating layer gains, mixer synergies and position effects."""

    name = "layered"
    objectives: tuple[str, ...] = ("loss", "cost")
    genes: Sequence[Gene]
    anchors: Sequence[dict[str, Any]] = ()

    def __init__(self, num_layers: int = 12, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self._layers = num_layers
        genes = [Gene("width", "categorical", (64, 96, 128))]
        for i in range(num_layers):
            genes += [
                Gene(f"layers.{i}.mixer", "categorical", ("softmax", "window", "linear", "none")),
                Gene(f"layers.{i}.heads", "int", low=1, high=4),
                Gene(f"layers.{i}.ffn", "categorical", (0, 1, 2, 4)),
            ]
        self.genes = genes
        self._mixer_value = np.array([1.0, 0.8, 0.6, 0.0])
        self._mixer_cost = np.array([1.0, 0.6, 0.4, 0.0])
        self._position = rng.uniform(0.6, 1.4, num_layers)
        self._synergy = rng.normal(0.0, 0.15, (4, 4))

    def canonical(self, levels: IntArray) -> IntArray:
        out = levels.copy()
        out[:, 2::3][levels[:, 1::3] == 3] = 0
        return out

    def costs(self, levels: IntArray) -> FloatArray:
        width, mixer, heads, ffn = self._split(levels)
        size = np.array([64, 96, 128])[width] / 64.0
        per_layer = self._mixer_cost[mixer] * (0.4 + 0.15 * heads)
        per_layer = per_layer + 0.5 * np.array([0, 1, 2, 4])[ffn]
        return np.asarray(size**1.5 * per_layer.sum(axis=1) + 2 * size)[:, None]

    def quality(self, levels: IntArray) -> FloatArray:
        width, mixer, heads, ffn = self._split(levels)
        gain = self._mixer_value[mixer] * (1 + 0.2 * np.log1p(heads))
        gain = gain + 0.7 * np.log1p(np.array([0, 1, 2, 4])[ffn])
        total = (gain * self._position).sum(axis=1) / self._layers
        pairs = self._synergy[mixer[:, :-1], mixer[:, 1:]].mean(axis=1)
        size = np.array([0.8, 0.95, 1.05])[width]
        return np.asarray(1.2 + 2.0 * np.exp(-size * (total + pairs)))

    def best_known(self) -> FloatArray | None:
        return evolved_front(self)

    def _split(self, levels: IntArray) -> tuple[IntArray, ...]:
        return levels[:, 0], levels[:, 1::3], levels[:, 2::3], levels[:, 3::3]


class Shuffled:
    """A problem whose labels say nothing: choices without numbers, layers in another order.

    Args:
        problem: the problem behind it.
        how: ``labels`` renames the choices of each kind of gene and permutes the layers; ``each``
            renames the choices of every gene differently; ``names`` is ``labels`` with parameter
            names that do not show which genes belong together.
        seed: of the permutations.
    """

    anchors: Sequence[dict[str, Any]] = ()

    def __init__(self, problem: Problem, how: str, seed: int) -> None:
        rng = np.random.default_rng([seed, 31])
        self.name, self.objectives, self._inner = problem.name, problem.objectives, problem
        self._column = np.arange(len(problem.genes))
        groups = layer_groups(problem.genes)
        order = rng.permutation(max((len(columns) for columns in groups.values()), default=0))
        for columns in groups.values():
            if len(columns) == len(order):
                self._column[columns] = np.array(columns)[order]
        kinds = {column: name for name, columns in groups.items() for column in columns}
        orders: dict[str, IntArray] = {}
        self._value, genes = [], []
        for place, gene in enumerate(problem.genes):
            kind = gene.name if how == "each" else kinds.get(place, gene.name)
            value = orders.setdefault(kind, rng.permutation(gene.num_levels))
            name = f"g{rng.integers(10**9)}" if how == "names" else gene.name
            labels = tuple(f"c{level}" for level in range(gene.num_levels))
            self._value.append(value)
            genes.append(Gene(name, "categorical", labels))
        self.genes = genes

    def _true(self, levels: IntArray) -> IntArray:
        out = np.empty_like(levels)
        for place, value in enumerate(self._value):
            out[:, self._column[place]] = value[levels[:, place]]
        return out

    def canonical(self, levels: IntArray) -> IntArray:
        true = self._inner.canonical(self._true(levels))
        out = np.empty_like(levels)
        for place, value in enumerate(self._value):
            out[:, place] = np.argsort(value)[true[:, self._column[place]]]
        return out

    def quality(self, levels: IntArray) -> FloatArray:
        return self._inner.quality(self._true(levels))

    def costs(self, levels: IntArray) -> FloatArray:
        return self._inner.costs(self._true(levels))

    def best_known(self) -> FloatArray | None:
        return self._inner.best_known()


def evolved_front(problem: Problem, rounds: int = 150, keep: int = 1500) -> FloatArray:
    """Return a near-optimal front: long evolution on the noise-free functions themselves."""
    rng = np.random.default_rng(5)

    def values(levels: IntArray) -> FloatArray:
        return np.column_stack([problem.quality(levels), problem.costs(levels)])

    kept = problem.canonical(tilted_levels(problem.genes, 4000, rng))
    for _ in range(rounds):
        a, b = (kept[rng.integers(0, len(kept), 3000)] for _ in range(2))
        children = np.where(rng.random(a.shape) < rng.choice([0.0, 0.5], (3000, 1)), a, b)
        fresh = tilted_levels(problem.genes, 3000, rng)
        children = np.where(rng.random(a.shape) < 2.0 / a.shape[1], fresh, children)
        kept = np.unique(np.vstack([kept, problem.canonical(children)]), axis=0)
        kept = kept[non_dominated(values(kept))]
        kept = kept[rng.permutation(len(kept))[:keep]]
    return values(kept)
