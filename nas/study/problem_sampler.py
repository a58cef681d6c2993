"""A sampler by name, given what is known of a search's problem and it can use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from optuna.samplers import BaseSampler

from nas.candidates import SpaceCodec
from nas.samplers import make_sampler
from nas.study.problem import SearchProblem, distributions
from searchspace.arch import Arch

TAKES_CODEC = ("predictor", "moead", "age_moea", "linas", "regularized_evolution", "promotion")
TAKES_POPULATION = ("nsga2", "nsga3", "moead", "age_moea", "linas", "regularized_evolution")


def sampler_of(
    problem: SearchProblem,
    name: str,
    seed: int,
    codec: SpaceCodec,
    seeds: Sequence[Arch],
    population: int,
) -> BaseSampler:
    """Make a sampler.

    Args:
        problem: what is searched.
        name: in `nas.samplers.SAMPLERS`.
        seed: of the sampler.
        codec: the space with its costs.
        seeds: archs to evaluate first, for samplers that take them.
        population: for evolutionary samplers.
    """
    space, scores = problem.space, problem.scores
    options: dict[str, Any] = {}
    if name in TAKES_CODEC:
        options |= {"codec": codec, "search_space": distributions(space)}
    if name in TAKES_POPULATION:
        options["population_size"] = population
    if name == "predictor":
        options["seed_params"] = space.to_params(np.array([space.encode(a) for a in seeds]))
    if name == "promotion" and scores is not None:
        options["score"] = lambda params: scores(space.canonical(space.to_genotypes(params)))
    return make_sampler(name, seed=seed, **options)
