"""The part that evolutionary and predictor-in-the-loop baselines share: rounds over a study.

A strategy looks at what is evaluated so far and says what to evaluate next; everything it needs is
in the study, so that a search goes on after a kill, and several workers can share it.
Letters: N candidates, G genes, M objectives (minimised).
"""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from nas.samplers._archive import PROPOSAL_KEY, Archive
from nas.samplers._codec import CandidateFunction, Codec, IntMatrix, VectorFunction, gene_of
from nas.samplers._conditions import ConditionalCodec
from nas.samplers._design import row_keys, total_violation
from searchspace.errors import UserError

FloatArray = NDArray[np.float64]

_REFILLS = 8


class Strategy(Protocol):
    """One search algorithm, as a function of what is evaluated."""

    def num_used(self, num_evaluated: int) -> int:
        """Return how many of the evaluated candidates, in order, decide what comes next."""
        ...

    def candidates(
        self, levels: IntMatrix, objectives: FloatArray, rng: np.random.Generator
    ) -> IntMatrix:
        """Return candidates in the order in which to evaluate them, shape (K, G).

        Args:
            levels: the used candidates, canonical, shape (N, G); N only grows.
            objectives: their values, minimised, shape (N, M).
            rng: generator of this call.
        """
        ...


@dataclass
class _Rounds:
    """The state for one study; all of it follows from the study's trials."""

    key: object
    codec: Codec
    archive: Archive
    strategy: Strategy
    queue: IntMatrix
    used: int = -1
    lock: threading.RLock = field(default_factory=threading.RLock)


class LevelSampler(BaseSampler):
    """Base of samplers that propose whole candidates, by levels, in rounds.

    Nothing that is evaluated, failed or under way is proposed again while anything new is found,
    and no candidate that breaks an exact constraint. A candidate whose measured constraints are
    broken counts as worse than every other.

    Args:
        seed: seed of everything random; None draws one.
        search_space: parameter name -> distribution, where known ahead; otherwise the parameters
            that completed trials had.
        codec: the space in vectorised form; stands in for the next one.
        exact_objectives: objective index -> function from a dictionary of parameters to the value,
            for samplers that use them.
        vectorized: whether these functions take a list of n dictionaries and return n values.

    Raises:
        UserError: for a codec given together with what it stands in for.
    """

    def __init__(
        self,
        *,
        seed: int | None = None,
        search_space: Mapping[str, BaseDistribution] | None = None,
        codec: Codec | None = None,
        exact_objectives: Mapping[int, CandidateFunction | VectorFunction] | None = None,
        vectorized: bool = False,
    ) -> None:
        if codec is not None and exact_objectives is not None:
            raise UserError(
                "codec was given together with exact_objectives; the codec computes them, so "
                "give one or the other"
            )
        self._seed = fresh_seed() if seed is None else seed
        self._search_space = None if search_space is None else dict(search_space)
        self._codec = codec
        self._functions = {"exact_objectives": exact_objectives, "vectorized": vectorized}
        self._rounds: _Rounds | None = None

    @abstractmethod
    def _strategy(self, codec: Codec, signs: FloatArray) -> Strategy:
        """Return a new strategy; signs (M,) are -1 for maximised objectives, else 1."""

    def reseed_rng(self) -> None:
        """Take a fresh seed, so that a copy of this sampler does not propose the same."""
        self._seed = fresh_seed()
        self._rounds = None

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Return the space given ahead, else every parameter that a completed trial had."""
        if self._search_space is not None:
            return dict(self._search_space)
        found: dict[str, BaseDistribution] = {}
        for other in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
            found.update(other.distributions)
        return dict(sorted(found.items()))

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Propose a whole candidate, and record it on the trial for other workers to see."""
        if not search_space:
            return {}
        rounds = self._rounds_of(study, search_space)
        with rounds.lock:
            row = self._next(rounds, study, trial.number)
            rounds.archive.add_pending(trial.number, row)
            study._storage.set_trial_system_attr(
                trial._trial_id, PROPOSAL_KEY, [int(level) for level in row]
            )
            params = rounds.codec.to_params(row[None])[0]
        return {name: params[name] for name in search_space if name in params}

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Draw one parameter that is not known yet; the draw depends on seed and trial alone."""
        rng = RandomSampler(seed=derived_seed(self._seed, trial.number, *param_name.encode()))
        return rng.sample_independent(study, trial, param_name, param_distribution)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the rounds, which are recomputed."""
        return {**self.__dict__, "_rounds": None}

    def _rounds_of(self, study: Study, search_space: dict[str, BaseDistribution]) -> _Rounds:
        """Return the state for this study and space, made anew when either changed."""
        key = (study.study_name, tuple(study.directions), tuple(search_space.items()))
        if self._rounds is None or self._rounds.key != key:
            codec = self._codec or ConditionalCodec(
                [gene_of(*item) for item in search_space.items()], **self._functions
            )
            signs = np.array(
                [-1.0 if d == StudyDirection.MAXIMIZE else 1.0 for d in study.directions]
            )
            strategy = self._strategy(codec, signs)
            empty = np.empty((0, len(codec.genes)), dtype=np.int64)
            self._rounds = _Rounds(key, codec, Archive(codec, signs), strategy, empty)
        return self._rounds

    def _next(self, rounds: _Rounds, study: Study, number: int) -> IntMatrix:
        taken = _read(rounds.archive, study, number)
        used = rounds.strategy.num_used(rounds.archive.num_evaluated)
        if used != rounds.used:
            rounds.used, rounds.queue = used, rounds.queue[:0]
        for attempt in range(_REFILLS):
            row = first_new(rounds.codec.canonical(rounds.queue), taken)
            if row is not None:
                return row
            rounds.queue = self._refilled(
                rounds, np.random.default_rng([self._seed, used, attempt])
            )
            # A strategy may take a while: see what other workers took meanwhile.
            taken = _read(rounds.archive, study, number)
        pool = uniform_levels(rounds.codec, 512, np.random.default_rng([self._seed, 3, number]))
        pool = pool[np.argsort(total_violation(rounds.codec, pool), kind="stable")]
        row = first_new(pool, taken)
        return np.asarray(pool[0]) if row is None else row

    def _refilled(self, rounds: _Rounds, rng: np.random.Generator) -> IntMatrix:
        """Ask the strategy and keep what breaks no exact constraint."""
        levels, objectives = rounds.archive.levels, _penalised(rounds.archive)
        found = rounds.strategy.candidates(levels[: rounds.used], objectives[: rounds.used], rng)
        found = rounds.codec.canonical(found)
        return np.asarray(found[total_violation(rounds.codec, found) <= 0])


def first_new(rows: IntMatrix, taken: set[bytes]) -> IntMatrix | None:
    """Return the first row whose key is not taken, or None."""
    keys = (key.tobytes() for key in row_keys(rows))
    return next((row for row, key in zip(rows, keys, strict=True) if key not in taken), None)


def uniform_levels(codec: Codec, count: int, rng: np.random.Generator) -> IntMatrix:
    """Draw canonical candidates with every gene uniform over its levels, shape (count, G)."""
    limits = [gene.num_levels for gene in codec.genes]
    return codec.canonical(rng.integers(0, limits, (count, len(limits))))


def fresh_seed() -> int:
    """Return a seed from the operating system."""
    return int(np.random.SeedSequence().generate_state(1)[0])


def derived_seed(*entropy: int) -> int:
    """Return a seed that depends on all of the given numbers."""
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


def _read(archive: Archive, study: Study, number: int) -> set[bytes]:
    """Take in the study's trials but one; return the keys of what is not to be proposed."""
    trials = [t for t in study.get_trials(deepcopy=False) if t.number != number]
    archive.update(trials)
    return archive.taken()


def _penalised(archive: Archive) -> FloatArray:
    """Return objectives, those of candidates that broke a limit behind all others, shape (N, M)."""
    values = archive.objectives
    excess = np.nan_to_num(np.maximum(archive.measured_constraints, 0.0)).sum(axis=1)
    broken = excess > 0
    if not broken.any():
        return values
    worst, best = values.max(axis=0), values.min(axis=0)
    share = excess[broken, None] / excess.max()
    values = values.copy()
    values[broken] = worst + np.maximum(worst - best, 1e-12) * share
    return values
