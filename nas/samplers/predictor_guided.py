"""An Optuna sampler that fits cheap predictors and evaluates only what they find promising."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from nas.samplers._archive import PROPOSAL_KEY
from nas.samplers._codec import CandidateFunction, Codec, Params, VectorFunction, gene_of
from nas.samplers._conditions import ConditionalCodec
from nas.samplers._proposer import Proposer
from searchspace.errors import UserError

__all__ = ["PredictorGuidedSampler"]


class PredictorGuidedSampler(BaseSampler):
    """Structured initial design, then batches chosen on predictors for hypervolume gain.

    Works for one to four objectives of any direction on int, float and categorical parameters,
    conditional ones included. Parameters named ``layers.<i>.<gene>`` are one repeated gene. All
    finished trials of the study teach it, whoever proposed them; running ones count as pending.
    Give `search_space` where it is known: Optuna shows a sampler the parameters only after the
    first trial, which is random otherwise.

    Args:
        seed: seed of everything random; None draws one.
        search_space: parameter name -> distribution, known ahead.
        codec: the space in vectorised form; stands in for the next five.
        exact_objectives: objective index -> function from a dictionary of parameters to the value,
            in the unit and direction told to the study. Computed, not predicted.
        constraints: function from such a dictionary to a value or k values, satisfied where <= 0.
            Cheap and exact: no evaluation is spent on a violating candidate unless none is found.
        canonicalize: sets the parameters that do not count to a default. Candidates with equal
            canonical form are the same and never proposed twice.
        features: function from such a dictionary to f extra predictor columns.
        vectorized: whether these functions, `canonicalize` apart, take a list of n dictionaries
            and return n values or rows: 100,000 candidates are asked about per batch.
        seed_params: candidates to evaluate first.
        num_initial: size of the structured design before the first fit.
        batch_size: candidates chosen per fit.
        num_candidates: candidates scored on the predictors for a full batch; for a smaller one
            in proportion.

    Raises:
        UserError: for sizes below 1, or a codec given together with what it stands in for.
    """

    def __init__(
        self,
        *,
        seed: int | None = None,
        search_space: Mapping[str, BaseDistribution] | None = None,
        codec: Codec | None = None,
        exact_objectives: Mapping[int, CandidateFunction | VectorFunction] | None = None,
        constraints: CandidateFunction | VectorFunction | None = None,
        canonicalize: Callable[[Params], Params] | None = None,
        features: CandidateFunction | VectorFunction | None = None,
        vectorized: bool = False,
        seed_params: Sequence[Params] = (),
        num_initial: int = 8,
        batch_size: int = 8,
        num_candidates: int = 100_000,
    ) -> None:
        _check_sizes(num_initial=num_initial, batch_size=batch_size, num_candidates=num_candidates)
        functions = {
            "exact_objectives": exact_objectives,
            "constraints": constraints,
            "canonicalize": canonicalize,
            "features": features,
        }
        if codec is not None and any(f is not None for f in functions.values()):
            raise UserError(
                "codec was given together with exact_objectives, constraints, canonicalize or "
                "features; the codec stands in for them, so give one or the other"
            )
        self._seed = int(np.random.SeedSequence().generate_state(1)[0]) if seed is None else seed
        self._search_space = None if search_space is None else dict(search_space)
        self._codec = codec
        self._functions = {**functions, "vectorized": vectorized}
        self._seed_params = [dict(p) for p in seed_params]
        self._sizes = (num_initial, batch_size, num_candidates)
        self._independent = RandomSampler(seed=self._seed)
        self._proposer: Proposer | None = None
        self._proposer_for: object = None
        self._seen_space: dict[str, BaseDistribution] = {}
        self._seen_trials: set[int] = set()
        self._seen_study: str | None = None
        self._lock = threading.RLock()

    def reseed_rng(self) -> None:
        """Take a fresh seed, so that a copy of this sampler does not propose the same."""
        self._seed = int(np.random.SeedSequence().generate_state(1)[0])
        self._independent.reseed_rng()
        if self._proposer is not None:
            self._proposer.seed = self._seed

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Return the space given ahead, else every parameter that a completed trial had."""
        if self._search_space is not None:
            return dict(self._search_space)
        with self._lock:
            if self._seen_study != study.study_name:
                self._seen_study = study.study_name
                self._seen_space, self._seen_trials = {}, set()
            for other in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
                if other.number not in self._seen_trials:
                    self._seen_trials.add(other.number)
                    self._seen_space.update(other.distributions)
            return dict(sorted(self._seen_space.items()))

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Propose a whole candidate, and record it on the trial for other workers to see."""
        if not search_space:
            return {}
        with self._lock:
            proposer = self._proposer_of(study, search_space)
            row = proposer.propose(trial.number, lambda: study.get_trials(deepcopy=False))
            study._storage.set_trial_system_attr(
                trial._trial_id, PROPOSAL_KEY, [int(level) for level in row]
            )
            params = proposer.codec.to_params(row[None])[0]
        return {name: params[name] for name in search_space if name in params}

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Draw one parameter that is not known yet: from `seed_params` or at random."""
        if trial.number < len(self._seed_params):
            seed_params = self._seed_params[trial.number]
            if param_name in seed_params:
                value = seed_params[param_name]
                if param_distribution._contains(param_distribution.to_internal_repr(value)):
                    return value
        with self._lock:
            return self._independent.sample_independent(
                study, trial, param_name, param_distribution
            )

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the lock; queue and models are recomputed."""
        return {**self.__dict__, "_lock": None, "_proposer": None, "_proposer_for": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore with a lock of its own."""
        self.__dict__.update(state)
        self._lock = threading.RLock()

    def _proposer_of(self, study: Study, search_space: dict[str, BaseDistribution]) -> Proposer:
        """Return the proposer for this study and space, made anew when either changed."""
        key = (study.study_name, tuple(study.directions), tuple(search_space.items()))
        if self._proposer is None or self._proposer_for != key:
            signs = np.array(
                [-1.0 if d == StudyDirection.MAXIMIZE else 1.0 for d in study.directions]
            )
            self._proposer = Proposer(
                self._codec_of(search_space), signs, self._seed, self._seed_params, *self._sizes
            )
            self._proposer_for = key
        return self._proposer

    def _codec_of(self, search_space: dict[str, BaseDistribution]) -> Codec:
        if self._codec is not None:
            missing = {gene.name for gene in self._codec.genes} - set(search_space)
            if missing and self._search_space is not None:
                raise UserError(
                    f"codec has gene {min(missing)!r}, which search_space lacks; "
                    "make their names equal"
                )
            return self._codec
        genes = [gene_of(name, distribution) for name, distribution in search_space.items()]
        return ConditionalCodec(genes, **self._functions)


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise UserError(f"{name}={size} is too small; choose at least 1")
