"""Optuna's own samplers, such that a resumed study goes on instead of drawing the same again."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import (
    BaseSampler,
    GPSampler,
    NSGAIIISampler,
    NSGAIISampler,
    RandomSampler,
    TPESampler,
)
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from nas.samplers._level_sampler import derived_seed, fresh_seed
from searchspace.errors import UserError


class ResumableSampler(BaseSampler):
    """A sampler of Optuna whose randomness depends on where the study stands when it joins.

    A seeded sampler of Optuna starts its random numbers anew in every process, so a resumed study
    would get the trials of its beginning once more, and so would a second worker. The seed of the
    inner sampler is derived from `seed` and the number of the first trial that it works on.

    Args:
        make: from a seed to a sampler.
        seed: seed of everything random; None draws one.
    """

    def __init__(self, make: Callable[[int], BaseSampler], seed: int | None = None) -> None:
        self._make = make
        self._seed = fresh_seed() if seed is None else seed
        self._inner: BaseSampler | None = None
        make(self._seed)  # a wrong option is said now and not at the first trial

    def reseed_rng(self) -> None:
        """Take a fresh seed, so that a copy of this sampler does not propose the same."""
        self._seed = fresh_seed()
        self._inner = None

    def begin(self) -> None:
        """Make the inner sampler now, so that a saved state can be put into it."""
        if self._inner is None:
            self._inner = self._make(self._seed)

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Ask the inner sampler."""
        return self._sampler(trial).infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Ask the inner sampler."""
        return self._sampler(trial).sample_relative(study, trial, search_space)

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Ask the inner sampler."""
        return self._sampler(trial).sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Tell the inner sampler."""
        self._sampler(trial).before_trial(study, trial)

    def after_trial(
        self,
        study: Study,
        trial: FrozenTrial,
        state: TrialState,
        values: Sequence[float] | None,
    ) -> None:
        """Tell the inner sampler."""
        self._sampler(trial).after_trial(study, trial, state, values)

    def _sampler(self, trial: FrozenTrial) -> BaseSampler:
        if self._inner is None:
            start = trial.number
            self._inner = self._make(derived_seed(self._seed, start) if start else self._seed)
        return self._inner


def random(seed: int | None = None) -> BaseSampler:
    """Return a sampler that draws every parameter independently and uniformly."""
    return ResumableSampler(lambda seed: RandomSampler(seed=seed), seed)


def nsga2(seed: int | None = None, **options: Any) -> BaseSampler:
    """Return Optuna's NSGA-II.

    Source: Deb et al., "A Fast and Elitist Multiobjective Genetic Algorithm: NSGA-II" (2002).
    """
    return ResumableSampler(lambda seed: NSGAIISampler(seed=seed, **options), seed)


def nsga3(seed: int | None = None, **options: Any) -> BaseSampler:
    """Return Optuna's NSGA-III.

    Source: Deb and Jain, "An Evolutionary Many-Objective Optimization Algorithm Using
        Reference-Point-Based Nondominated Sorting Approach" (2014).
    """

    def make(seed: int) -> BaseSampler:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            return NSGAIIISampler(seed=seed, **options)

    return ResumableSampler(make, seed)


def tpe(seed: int | None = None, **options: Any) -> BaseSampler:
    """Return Optuna's tree-structured Parzen estimator, one parameter at a time by default.

    Source: Ozaki et al., "Multiobjective Tree-Structured Parzen Estimator" (2022).
    """
    return ResumableSampler(lambda seed: TPESampler(seed=seed, **options), seed)


def gp(seed: int | None = None, **options: Any) -> BaseSampler:
    """Return Optuna's Gaussian process sampler; its log-EHVI takes several objectives.

    Raises:
        UserError: when torch or scipy is not installed.

    Source: Daulton et al., "Differentiable Expected Hypervolume Improvement for Parallel
        Multi-Objective Bayesian Optimization" (2020); Ament et al., "Unexpected Improvements to
        Expected Improvement for Bayesian Optimization" (2023), for the logarithm.
    """
    missing = [name for name in ("torch", "scipy") if find_spec(name) is None]
    if missing:
        raise UserError(
            f"sampler 'gp' needs {' and '.join(missing)}; pip install {' '.join(missing)}, or "
            "choose sampler 'predictor'"
        )
    return ResumableSampler(lambda seed: GPSampler(seed=seed, **options), seed)
