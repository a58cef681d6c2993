"""The rounds of predictor-guided search: design, fit, inner search, batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from optuna.trial import FrozenTrial

from nas.pareto import non_dominated
from nas.samplers._archive import Archive
from nas.samplers._codec import Codec, IntMatrix, LastCosts, Params
from nas.samplers._design import feasible_pool, initial_design, row_keys, unique_rows
from nas.samplers._inner import choose_batch, search
from nas.samplers._model import Surrogate
from predictors.encodings import GeneEncoding

FloatArray = NDArray[np.float64]

_NUM_DRAWS = 1
_LEAST_CANDIDATES = 25_000
_FRESH_STARTS = 384
_MAX_STARTS = 768


class Proposer:
    """Proposes one candidate at a time for one study; all state is recomputed from its trials.

    Args:
        codec: the space.
        signs: +1 per minimised objective, -1 per maximised one, shape (M,).
        seed: seed of everything random.
        seed_params: candidates to evaluate first.
        num_initial: size of the structured design.
        batch_size: candidates per fit.
        num_candidates: candidates scored per fit.
    """

    def __init__(
        self,
        codec: Codec,
        signs: FloatArray,
        seed: int,
        seed_params: Sequence[Params],
        num_initial: int,
        batch_size: int,
        num_candidates: int,
    ) -> None:
        self.codec = codec
        self.seed = seed
        self._signs = signs
        self._sizes = (num_initial, batch_size, num_candidates)
        self._archive = Archive(codec, signs)
        self._queue: list[IntMatrix] = []
        self._queue_made_at = 0
        self._pool = np.empty((0, len(codec.genes)), dtype=np.int64)
        rng = np.random.default_rng([seed, 0])
        self._reference = feasible_pool(codec, 768, rng)
        self._seeds = self._seed_rows(seed_params)
        costs = LastCosts(codec)
        extra = _extra_columns(codec, costs, self._reference)
        encoding = GeneEncoding(codec.genes, extra, self._reference)
        self._surrogate = Surrogate(codec, encoding, costs, signs)
        self._design: IntMatrix | None = None

    def propose(self, number: int, trials: Callable[[], Sequence[FrozenTrial]]) -> IntMatrix:
        """Return the canonical levels that trial `number` should evaluate, shape (G,).

        Args:
            number: the trial's number; all randomness of this call derives from it and the seed.
            trials: reads the study's trials; called again after a slow fit, so that what other
                workers took meanwhile is seen.
        """
        self._read(number, trials)
        row = self._next_of_design(number)
        if row is None:
            row = self._next_of_queue()
        if row is None:
            rng = np.random.default_rng([self.seed, 1, number])
            self._refill(rng)
            self._read(number, trials)
            row = self._next_of_queue()
            if row is None:
                row = self._fallback(rng)
        self._archive.add_pending(number, row)
        return row

    def _read(self, number: int, trials: Callable[[], Sequence[FrozenTrial]]) -> None:
        """Take in the study's trials but one; rows of other conditions are canonical no more."""
        others = [trial for trial in trials() if trial.number != number]
        if self._archive.update(others):
            self._reference = unique_rows(self.codec.canonical(self._reference))
            self._seeds = unique_rows(self.codec.canonical(self._seeds))
            self._pool = unique_rows(self.codec.canonical(self._pool))
            self._design = None
            self._queue.clear()

    def _next_of_design(self, number: int) -> IntMatrix | None:
        """Seeds first, then the design, unless that many are evaluated or under way already."""
        taken = self._archive.taken()
        for row in self._seeds:
            if _key(row) not in taken:
                return np.asarray(row)
        num_initial = self._sizes[0]
        evaluated = self._archive.num_evaluated
        started = evaluated + len(self._archive.pending)
        if started >= num_initial and evaluated >= min(3, num_initial):
            return None
        if self._design is None:
            rng = np.random.default_rng([self.seed, 2])
            known = np.vstack([self._seeds, self._archive.levels])
            self._design = initial_design(
                self.codec, self._surrogate.encoding, known, num_initial, rng, self._reference
            )
        for row in self._design:
            if _key(row) not in taken:
                return np.asarray(row)
        return None

    def _next_of_queue(self) -> IntMatrix | None:
        if self._archive.num_evaluated - self._queue_made_at >= 2 * self._batch_size():
            self._queue.clear()
        taken = self._archive.taken()
        while self._queue:
            row = self._queue.pop(0)
            if _key(row) not in taken:
                return row
        return None

    def _refill(self, rng: np.random.Generator) -> None:
        """Fit, search and queue a batch."""
        archive, surrogate = self._archive, self._surrogate
        self._queue_made_at = archive.num_evaluated
        if archive.num_evaluated < 2:
            return
        levels = archive.levels
        objectives = surrogate.exact(levels, archive.objectives)
        limits = archive.measured_constraints
        surrogate.fit(levels, objectives, limits, rng, _NUM_DRAWS)
        feasible = ~(limits > 0).any(axis=1) & (surrogate.codec_violation(levels) <= 0)
        front = feasible.copy()
        front[feasible] = non_dominated(objectives[feasible])
        starts = self._starts(levels[front], rng)
        pool = search(surrogate, starts, self._num_candidates(), rng)
        if len(pool.levels) == 0:
            return
        self._pool = pool.levels
        self._queue = list(
            choose_batch(
                pool,
                self._current_front(levels[feasible]),
                self._batch_size(),
                archive.taken(),
                rng,
            )
        )

    def _batch_size(self) -> int:
        """Small batches while every label changes the model, the full size later."""
        return min(self._sizes[1], max(1, self._archive.num_evaluated // 16))

    def _num_candidates(self) -> int:
        """As many per evaluation for a small batch as for a full one, but enough for a front."""
        _, batch_size, num_candidates = self._sizes
        share = num_candidates * self._batch_size() // batch_size
        return min(num_candidates, max(_LEAST_CANDIDATES, share))

    def _current_front(self, levels: IntMatrix) -> FloatArray:
        """What candidates evaluated and under way are worth, by the predictor.

        Where labels are noisy the luckiest would otherwise stand in the way of better ones.
        """
        return self._surrogate.predict(np.vstack([levels, self._archive.pending]))[0]

    def _starts(self, front: IntMatrix, rng: np.random.Generator) -> IntMatrix:
        fresh = feasible_pool(self.codec, _FRESH_STARTS, rng)
        old = self._pool
        room = _MAX_STARTS - len(fresh)
        if len(old) > room:
            old = old[rng.choice(len(old), room, replace=False)]
        return unique_rows(np.vstack([front, old, fresh]))

    def _fallback(self, rng: np.random.Generator) -> IntMatrix:
        """A random feasible candidate, new if there is one left."""
        pool = feasible_pool(self.codec, 256, rng)
        taken = self._archive.taken()
        fresh = [row for row in pool if _key(row) not in taken]
        options = fresh or list(pool)
        return np.asarray(options[int(rng.integers(len(options)))])

    def _seed_rows(self, seed_params: Sequence[Params]) -> IntMatrix:
        if not seed_params:
            return np.empty((0, len(self.codec.genes)), dtype=np.int64)
        return unique_rows(self.codec.canonical(self.codec.to_matrix(seed_params)))


def _extra_columns(
    codec: Codec, costs: LastCosts, reference: IntMatrix
) -> Callable[[IntMatrix], FloatArray] | None:
    """The caller's features and the exact objectives, logged where they are positive."""
    exact = costs(reference)
    extra = codec.features(reference)
    if exact.shape[1] + extra.shape[1] == 0:
        return None
    positive = (exact > 0).all(axis=0)

    def columns(levels: IntMatrix) -> FloatArray:
        values = costs(levels)
        logged = np.log(np.maximum(values, 1e-300))
        return np.hstack([np.where(positive, logged, values), codec.features(levels)])

    return columns


def _key(row: IntMatrix) -> bytes:
    return bytes(row_keys(row[None])[0].tobytes())
