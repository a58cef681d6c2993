"""Who evaluates what, when several processes share a study: no arch twice, and no more than asked.

A process asks for a candidate, writes its arch id on its trial, and then looks at all others. It
claims the candidate when no other trial under way has the same arch and a place is left even if
every other trial under way takes one. Otherwise the trial with the lower number goes first: the
later one withdraws, the earlier one waits until the later ones have claimed or withdrawn. Since
everybody writes before looking, of two processes at least one sees the other, so they never both
claim; since numbers are ordered, they never both wait. Only reads and writes of single trials are
needed, which every storage has.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass

from optuna.exceptions import UpdateFinishedTrialError
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from nas.study.generations import INTERRUPTED, LOSS, evaluations
from nas.study.owners import Watch

ARCH_ID = "arch_id"
CLAIMED = "claimed"
LATE = "told_late"
"""On a trial whose loss another process found on it: when it ended says nothing."""
QUEUED = "queued_arch_id"
POLL_S = 0.05


@dataclass(frozen=True)
class Outcome:
    """What came of an attempt to claim a candidate.

    Args:
        result: ``"mine"``, ``"known"`` (was evaluated), ``"taken"`` (is under way elsewhere) or
            ``"full"`` (as many as asked for are evaluated or under way).
        trial: the other trial, of a candidate that is known or taken.
    """

    result: str
    trial: FrozenTrial | None = None


class Claims:
    """The claims on one study, seen from one process.

    Args:
        study: the shared study.
        watch: tells whose owner is gone.
    """

    def __init__(self, study: Study, watch: Watch | None = None) -> None:
        self._study = study
        self._watch = watch or Watch()

    def look(self) -> tuple[dict[str, FrozenTrial], list[FrozenTrial]]:
        """Return the evaluations by arch id, and the trials under way.

        Both come from one look at the study, so that a trial that ends meanwhile is in one of
        them. What gone processes were at work on is queued again on the way.
        """
        trials = self._study.get_trials(deepcopy=False)
        under_way: list[FrozenTrial] = []
        for trial in trials:
            if trial.state == TrialState.RUNNING:
                if self._watch.is_lost(trial):
                    self.requeue(trial, "its process is gone")
                else:
                    under_way.append(trial)
        return {t.user_attrs[ARCH_ID]: t for t in evaluations(trials)}, under_way

    def has_place(self, limit: int | None) -> bool:
        """Return whether one more evaluation than those done and under way is wanted."""
        done, under_way = self.look()
        return limit is None or len(done) + len(under_way) < limit

    def claim(self, number: int, trial_id: int, arch_id: str, limit: int | None) -> Outcome:
        """Try to become the one that evaluates a candidate.

        Args:
            number: of this process's trial.
            trial_id: of this process's trial.
            arch_id: of its candidate.
            limit: evaluations that are wanted in all; None for any number.
        """
        self._set(trial_id, ARCH_ID, arch_id)
        while True:
            done, under_way = self.look()
            if arch_id in done:
                return Outcome("known", done[arch_id])
            others = [trial for trial in under_way if trial.number != number]
            before = [t for t in others if CLAIMED in t.user_attrs or t.number < number]
            same = [t for t in others if t.user_attrs.get(ARCH_ID) == arch_id]
            if first := [trial for trial in before if trial in same]:
                return Outcome("taken", first[0])
            if limit is not None and len(done) + len(before) >= limit:
                return Outcome("full")
            if not same and (limit is None or len(done) + len(others) < limit):
                self._set(trial_id, CLAIMED, True)
                return Outcome("mine")
            time.sleep(POLL_S)

    def requeue(self, trial: FrozenTrial, reason: str) -> None:
        """End a trial that nobody works on, and queue its candidate if it had one.

        One whose loss is there already only has to be told. Otherwise the candidate is queued
        first: a kill in between at worst queues it twice, and the second time it is known.
        One that has ended meanwhile is left alone.
        """
        if trial.state.is_finished():
            return
        if LOSS in trial.user_attrs and self._tell(trial):
            return
        # One that was taken from the queue a moment before its process was killed says so itself.
        arch_id = trial.user_attrs.get(ARCH_ID, trial.user_attrs.get(QUEUED))
        params = trial.system_attrs.get("fixed_params", {}) | trial.params
        if arch_id is not None and params:
            waiting = self._study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
            if all(other.user_attrs.get(QUEUED) != arch_id for other in waiting):
                self._study.enqueue_trial(params, {QUEUED: arch_id})
            reason += "; queued again"
        self.end(trial._trial_id, f"{INTERRUPTED}: {reason}")

    def end(self, trial_id: int, reason: str) -> None:
        """Fail a trial with its reason; one that another process has ended is left alone."""
        with contextlib.suppress(UpdateFinishedTrialError):
            self._set(trial_id, "reason", reason)
            self._study._storage.set_trial_state_values(trial_id, TrialState.FAIL)

    def _tell(self, trial: FrozenTrial) -> bool:
        """Complete a trial with what it says; return whether that is all there has to be."""
        metrics = {**trial.user_attrs.get("metrics", {}), LOSS: trial.user_attrs[LOSS]}
        names = self._study.metric_names
        if names is None or not set(names) <= set(metrics):
            return False
        values = [float(metrics[name]) for name in names]
        with contextlib.suppress(UpdateFinishedTrialError):
            self._set(trial._trial_id, LATE, True)
            self._study._storage.set_trial_state_values(
                trial._trial_id, TrialState.COMPLETE, values
            )
        return True

    def _set(self, trial_id: int, key: str, value: object) -> None:
        self._study._storage.set_trial_user_attr(trial_id, key, value)
