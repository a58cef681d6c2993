"""What is searched, and how a study says that it is a study of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution

from nas.candidates import Objectives, Prices, metrics_of
from searchspace.arch import Arch
from searchspace.space import SearchSpace


@dataclass(frozen=True)
class SearchProblem:
    """What is searched.

    Args:
        space: the archs there are.
        prices: their exact costs.
        objectives: what is minimised, under which limits.
        evaluate: the held-out loss of an arch; raises `EvaluationFailed` with a reason.
        scores: a training-free score of genotypes for the predictor, or None.
        seeds: archs to evaluate first.
        weights: says which supernet the losses are of, see `weights_key`; empty for none.
    """

    space: SearchSpace
    prices: Prices
    objectives: Objectives
    evaluate: Callable[[Arch], float]
    scores: Any = None
    seeds: tuple[Arch, ...] = ()
    weights: str = ""

    def exact_metrics(self, arch: Arch) -> dict[str, float]:
        """Return every cost of an arch that is known without running it."""
        return dict(metrics_of(self.prices, self.space.encode(arch)))


def distributions(space: SearchSpace) -> dict[str, BaseDistribution]:
    """Return a space's genes as Optuna distributions."""
    return {name: CategoricalDistribution(choices) for name, choices in space.genes.items()}


def weights_key(supernet: Path) -> str:
    """Return a short text that is equal for equal weights; empty where there are none.

    Args:
        supernet: folder of a trained supernet.
    """
    path = supernet / "model.safetensors"
    if not path.is_file():
        return ""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:16]


def space_key(space: SearchSpace) -> str:
    """Return a short text that is equal for equal spaces: same genes, choices and family."""
    genes = {name: list(choices) for name, choices in space.genes.items()}
    whole = {key: value for key, value in space.largest().to_dict().items() if key != "layers"}
    content = json.dumps([genes, whole], sort_keys=True, default=str)
    return f"{space.name} {hashlib.sha256(content.encode()).hexdigest()[:10]}"
