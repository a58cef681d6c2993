"""Bits decided together with the architecture, after it, or without it, by one and the same search.

Letters: N candidates, G genes, A archs, M objectives (the first is the loss).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, CategoricalDistribution

from hw_profiles.latency_table import LatencyTable
from nas.candidates import Objectives, Prices, SpaceCodec
from nas.pareto import non_dominated
from nas.samplers import Codec, GeneCodec, PredictorGuidedSampler
from predictors.encodings import Gene
from searchspace.arch import Arch
from searchspace.space import SearchSpace
from searchspace.space.canonical import Genotypes

Floats = NDArray[np.float64]
PRECISION_GENES = ("mixer_precision", "ffn_precision")
MAX_REPEATS = 8
"""Known archs proposed in a row before a space counts as used up."""


@dataclass(frozen=True)
class Point:
    """An evaluated candidate: its arch and objectives (M,), loss first."""

    arch: Arch
    values: tuple[float, ...]


class BitsCodec(GeneCodec):
    """The bits of every sub-block of some archs whose other choices are settled.

    The gene ``arch`` says which of them, the others are the precisions of its layers. The loss of
    each arch as it was found is a feature of the predictor: what rounding costs adds to it.

    Args:
        space: holds all the archs.
        inner: its codec.
        archs: evaluated already; A of them.
    """

    def __init__(self, space: SearchSpace, inner: SpaceCodec, archs: Sequence[Point]) -> None:
        names = [name for name in space.genes if name.split(".")[-1] in PRECISION_GENES]
        ids = tuple(point.arch.id for point in archs)
        bits = [Gene(name, "categorical", choices=tuple(space.genes[name])) for name in names]
        super().__init__([Gene("arch", "categorical", choices=ids), *bits])
        self._space, self._inner = space, inner
        self._columns = [space.columns[name] for name in names]
        self.bases = np.array([space.encode(point.arch) for point in archs])
        self._losses = np.array([point.values[0] for point in archs])
        self.exact_indices = inner.exact_indices

    def genotypes(self, matrix: Genotypes) -> Genotypes:
        """Return the canonical genotypes of the space, shape (N, its genes)."""
        full = self.bases[matrix[:, 0]]
        full[:, self._columns] = matrix[:, 1:]
        return self._space.canonical(full)

    @property
    def known(self) -> Genotypes:
        """The archs as they were found, shape (A, G)."""
        return np.column_stack([np.arange(len(self.bases)), self.bases[:, self._columns]])

    def canonical(self, matrix: Genotypes) -> Genotypes:
        """Set the bits of absent sub-blocks to the first choice."""
        return np.column_stack([matrix[:, 0], self.genotypes(matrix)[:, self._columns]])

    def exact_objectives(self, matrix: Genotypes) -> Floats:
        """Return the objectives other than the loss."""
        return self._inner.exact_objectives(self.genotypes(matrix))

    def features(self, matrix: Genotypes) -> Floats:
        """Return the logarithm of the parameter count and the loss before rounding, (N, 2)."""
        features = self._inner.features(self.genotypes(matrix))
        return np.column_stack([features, self._losses[matrix[:, 0]]])


def search(
    codec: Codec,
    decode: Callable[[Genotypes], Arch],
    loss: Callable[[Arch], float],
    seed: int,
    evals: int,
    known: Sequence[tuple[dict[str, Any], Point]] = (),
    seed_params: Sequence[dict[str, Any]] = (),
) -> list[Point]:
    """Return what `PredictorGuidedSampler` evaluates, `evals` different archs at most.

    Args:
        codec: what is searched.
        decode: the arch of a row of it.
        loss: of an arch; counted as one evaluation.
        seed: of the sampler.
        evals: evaluations.
        known: parameters and points of candidates that are evaluated already; not counted.
        seed_params: parameters to evaluate first.
    """
    space: dict[str, BaseDistribution] = {
        gene.name: CategoricalDistribution(gene.choices) for gene in codec.genes
    }
    sampler = PredictorGuidedSampler(
        seed=seed, codec=codec, search_space=space, seed_params=seed_params
    )
    num_objectives = 1 + len(codec.exact_indices)
    study = optuna.create_study(directions=["minimize"] * num_objectives, sampler=sampler)
    for params, point in known:
        study.add_trial(
            optuna.trial.create_trial(params=params, distributions=space, values=point.values)
        )
    seen = {point.arch.id for _, point in known}
    points: list[Point] = []
    repeats = 0
    while len(points) < evals and repeats < MAX_REPEATS:
        trial = study.ask(space)
        row = codec.canonical(codec.to_matrix([trial.params]))
        arch = decode(row[0])
        point = Point(arch, (loss(arch), *map(float, codec.exact_objectives(row)[0])))
        study.tell(trial, point.values)
        repeats += 1
        if arch.id not in seen:
            repeats = 0
            seen.add(arch.id)
            points.append(point)
    return points


@dataclass(frozen=True)
class Arms:
    """The ways to decide architecture and bits, at equal numbers of evaluations.

    All begin with the largest arch, in every precision that they may use throughout it.

    Args:
        space: all choices; of the precisions the first one is what networks are trained in.
        table: latencies; None where no objective is one.
        workload: that ``latency_ms`` means.
        objectives: names, ``loss`` first.
        loss: of an arch.
        share: of the evaluations that the architecture gets where it comes first.
    """

    space: SearchSpace
    table: LatencyTable | None
    workload: str
    objectives: tuple[str, ...]
    loss: Callable[[Arch], float]
    share: float = 0.5

    def _codec(self, space: SearchSpace) -> SpaceCodec:
        prices = Prices(space, self.table, self.workload)
        return SpaceCodec(space, prices, Objectives.parse(self.objectives, (), prices.metrics))

    @cached_property
    def whole(self) -> SpaceCodec:
        """Architecture and bits."""
        return self._codec(self.space)

    @cached_property
    def unrounded(self) -> tuple[SearchSpace, SpaceCodec]:
        """Architectures with the first choice of every precision."""
        choices = self.space.all_choices()
        space = self.space.restricted(**{gene: choices[gene][:1] for gene in PRECISION_GENES})
        return space, self._codec(space)

    @cached_property
    def largest(self) -> tuple[SearchSpace, SpaceCodec]:
        """Bits of the largest arch."""
        layer = self.space.largest().layers[0]
        choices = self.space.all_choices()
        fixed: dict[str, Any] = {name: values[:1] for name, values in choices.items()}
        fixed |= {name: choices[name] for name in PRECISION_GENES}
        fixed |= {
            "d_model": [max(self.space.d_model)],
            "heads": [f"{layer.num_heads}x{layer.num_kv_heads}"],
            "intermediate_size": [layer.intermediate_size],
        }
        space = self.space.restricted(**fixed)
        return space, self._codec(space)

    def joint(self, seed: int, evals: int) -> list[Point]:
        """Decide architecture and bits in one genome.

        Source: Sridhar et al., "SimQ-NAS: Simultaneous Quantization Policy and Neural Architecture
        Search" (2023).
        """
        return self._search_space(self.space, self.whole, seed, evals)

    def bits_only(self, seed: int, evals: int) -> list[Point]:
        """Decide the bits of the largest arch."""
        return self._search_space(*self.largest, seed, evals)

    def two_steps(self, seed: int, evals: int) -> list[Point]:
        """Spend a share of the evaluations on architectures, the rest on the bits of their front.

        The second search knows the first one's results, and may round every arch of the front.
        """
        found = self._search_space(*self.unrounded, seed, round(self.share * evals))
        front = non_dominated([point.values for point in found])
        archs = [point for point, on_front in zip(found, front, strict=True) if on_front]
        codec = BitsCodec(self.space, self.whole, archs)
        known = list(zip(codec.to_params(codec.known), archs, strict=True))
        return found + search(
            codec,
            lambda row: self.space.decode(codec.genotypes(row[None])[0]),
            self.loss,
            seed,
            evals - len(found),
            known,
        )

    def _search_space(
        self, space: SearchSpace, codec: SpaceCodec, seed: int, evals: int
    ) -> list[Point]:
        seeds = [space.encode(arch) for arch in _uniformly_rounded(space)]
        return search(
            codec,
            space.decode,
            self.loss,
            seed,
            evals,
            seed_params=space.to_params(np.array(seeds)),
        )


def _uniformly_rounded(space: SearchSpace) -> list[Arch]:
    """Return the largest arch with each precision in all sub-blocks."""
    offered = [name for name in space.mixer_precision if name in space.ffn_precision]
    archs = [space.uniform(mixer_precision=name, ffn_precision=name) for name in offered]
    return list(dict.fromkeys([space.largest(), *archs]))


ARMS: dict[str, Callable[[Arms, int, int], list[Point]]] = {
    "joint": Arms.joint,
    "architecture, then bits": Arms.two_steps,
    "bits only": Arms.bits_only,
}
