"""Database storage whose cost does not grow with the trials that this process works on.

Optuna reads every unfinished trial again at each look at the study, and writes each parameter in a
transaction of its own. A process knows its own trials without reading them, and nobody looks at
their parameters before they are claimed.
"""

from __future__ import annotations

import contextlib
import copy
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, cast

from optuna.distributions import (
    BaseDistribution,
    check_distribution_compatibility,
    distribution_to_json,
)
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage, RDBStorage
from optuna.storages._cached_storage import _CachedStorage, _StudyInfo
from optuna.storages._rdb.models import (
    TrialModel,
    TrialParamModel,
    TrialSystemAttributeModel,
    TrialUserAttributeModel,
)
from optuna.storages._rdb.storage import _create_scoped_session
from optuna.trial import FrozenTrial, TrialState


@dataclass
class Pending:
    """What is not written yet of an own trial.

    Args:
        params: by name, in Optuna's internal form, with their distributions.
        attrs: (model of the table, key, value).
        is_open: whether attributes are collected too.
    """

    params: dict[str, tuple[float, BaseDistribution]] = field(default_factory=dict)
    attrs: list[tuple[Any, str, Any]] = field(default_factory=list)
    is_open: bool = False


@contextlib.contextmanager
def together(storage: BaseStorage, trial_id: int) -> Iterator[None]:
    """Write what the block sets of a trial at once at its end, where the storage can do so."""
    if isinstance(storage, OwnTrialsStorage):
        with storage.together(trial_id):
            yield
    else:
        yield


class OwnTrialsStorage(_CachedStorage):
    """Keeps the trials that this process works on in memory too, and writes parameters together.

    What another process does to such a trial shows when it is written to, as an
    `UpdateFinishedTrialError`. The parameters of a trial are written before anything else of it,
    and other processes see what they would see without this.

    Args:
        backend: the database.
    """

    def __init__(self, backend: RDBStorage) -> None:
        super().__init__(backend)
        self._own: dict[int, FrozenTrial] = {}
        self._pending: defaultdict[int, Pending] = defaultdict(Pending)
        self._ended: set[int] = set()
        self._last_read: dict[int, int] = {}
        self._as_json: dict[str, tuple[BaseDistribution, str]] = {}

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        """Create a trial; a running one is this process's own."""
        trial_id = super().create_new_trial(study_id, template_trial)
        with self._lock:
            number = self._trial_id_to_study_id_and_number[trial_id][1]
            trial = self._studies[study_id].trials[number]
            if trial.state == TrialState.RUNNING:
                self._own[trial_id] = trial
                if trial_id == self._last_read.get(study_id, -1) + 1:
                    # There is nothing between the last one that was read and this one.
                    self._last_read[study_id] = trial_id
        return trial_id

    def set_trial_param(
        self,
        trial_id: int,
        param_name: str,
        param_value_internal: float,
        distribution: BaseDistribution,
    ) -> None:
        """Set a parameter; of an own trial it is written with its other parameters."""
        with self._lock:
            study_id, _ = self._trial_id_to_study_id_and_number[trial_id]
            known = self._studies[study_id].param_distribution.get(param_name)
            trial = self._own.get(trial_id)
            if trial is not None and known is not None:
                check_distribution_compatibility(known, distribution)
                self._pending[trial_id].params[param_name] = (param_value_internal, distribution)
        if trial is None or known is None:
            super().set_trial_param(trial_id, param_name, param_value_internal, distribution)
        value = distribution.to_external_repr(param_value_internal)
        self._update(trial_id, "_params", param_name, value)
        self._update(trial_id, "_distributions", param_name, distribution)

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        """Set a user attribute."""
        self._set_attr(TrialUserAttributeModel, trial_id, key, value)
        self._update(trial_id, "_user_attrs", key, value)

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        """Set a system attribute."""
        self._set_attr(TrialSystemAttributeModel, trial_id, key, value)
        self._update(trial_id, "_system_attrs", key, value)

    @contextlib.contextmanager
    def together(self, trial_id: int) -> Iterator[None]:
        """Write the attributes that the block sets of an own trial in one transaction."""
        with self._lock:
            if trial_id in self._own:
                self._pending[trial_id].is_open = True
        try:
            yield
        finally:
            with self._end_noticed(trial_id):
                self._write(trial_id)

    def set_trial_intermediate_value(
        self, trial_id: int, step: int, intermediate_value: float
    ) -> None:
        """Set an intermediate value; the trial is read again from now on."""
        self._write(trial_id)
        self._disown(trial_id)
        super().set_trial_intermediate_value(trial_id, step, intermediate_value)

    def set_trial_state_values(
        self, trial_id: int, state: TrialState, values: Sequence[float] | None = None
    ) -> bool:
        """Set the state; a trial that this call starts is this process's own until it ends."""
        with self._end_noticed(trial_id):
            self._write(trial_id)
            done = super().set_trial_state_values(trial_id, state, values)
        if state.is_finished():
            self._finish(trial_id, state, values)
        elif done and state == TrialState.RUNNING:
            trial = self._backend.get_trial(trial_id)
            with self._lock:
                self._own[trial_id] = trial
                study_id, number = self._trial_id_to_study_id_and_number[trial_id]
                self._studies[study_id].trials[number] = trial
        return done

    def get_trial(self, trial_id: int) -> FrozenTrial:
        """Return a trial, one that this process works on from memory; it may be changed."""
        with self._lock:
            own = self._own.get(trial_id)
        if own is None:
            return super().get_trial(trial_id)
        trial = copy.copy(own)
        for part in ("_params", "_distributions", "_user_attrs", "_system_attrs"):
            setattr(trial, part, dict(getattr(own, part)))
        return trial

    def _read_trials_from_remote_storage(self, study_id: int) -> None:
        with self._lock:
            study = self._studies.setdefault(study_id, _StudyInfo())
            trials = self._backend._get_trials(
                study_id,
                states=None,
                included_trial_ids=study.unfinished_trial_ids - self._own.keys(),
                trial_id_greater_than=self._last_read.get(study_id, -1),
            )
            if not trials:
                return
            # Every unfinished one up to here is in the set or an own one: only later ones are new.
            last = max(trial._trial_id for trial in trials)
            self._last_read[study_id] = max(last, self._last_read.get(study_id, -1))
            for trial in trials:
                if trial._trial_id in self._own or trial._trial_id in self._ended:
                    # It is known better here.
                    continue
                self._add_trials_to_cache(study_id, [trial])
                if trial.state.is_finished():
                    study.unfinished_trial_ids.discard(trial._trial_id)
                else:
                    study.unfinished_trial_ids.add(trial._trial_id)
            self._ended = {i for i in self._ended if i > self._last_read[study_id]}

    def _update(self, trial_id: int, part: str, key: str, value: Any) -> None:
        """Change an own trial; who has it already keeps the older state."""
        with self._lock:
            trial = self._own.get(trial_id)
            if trial is None:
                return
            changed = copy.copy(trial)
            setattr(changed, part, {**getattr(trial, part), key: value})
            study_id, number = self._trial_id_to_study_id_and_number[trial_id]
            self._own[trial_id] = self._studies[study_id].trials[number] = changed

    @contextlib.contextmanager
    def _end_noticed(self, trial_id: int) -> Iterator[None]:
        """Give an own trial up when another process has ended it."""
        try:
            yield
        except UpdateFinishedTrialError:
            self._disown(trial_id)
            raise

    def _set_attr(self, model: Any, trial_id: int, key: str, value: Any) -> None:
        with self._lock:
            self._pending[trial_id].attrs.append((model, key, value))
            is_open = self._pending[trial_id].is_open
        if not is_open:
            with self._end_noticed(trial_id):
                self._write(trial_id)

    def _finish(self, trial_id: int, state: TrialState, values: Sequence[float] | None) -> None:
        """Keep an own trial as it ended; it never changes again, so it is not read either."""
        with self._lock:
            trial = self._own.pop(trial_id, None)
            if trial is None:
                return
            ended = copy.copy(trial)
            ended.state, ended.datetime_complete = state, datetime.now()
            ended.values = None if values is None else [float(value) for value in values]
            study_id, number = self._trial_id_to_study_id_and_number[trial_id]
            self._studies[study_id].trials[number] = ended
            self._studies[study_id].unfinished_trial_ids.discard(trial_id)
            self._ended.add(trial_id)

    def _disown(self, trial_id: int) -> None:
        """Read a trial from the database from now on."""
        with self._lock:
            self._pending.pop(trial_id, None)
            if self._own.pop(trial_id, None) is not None:
                study_id, _ = self._trial_id_to_study_id_and_number[trial_id]
                self._studies[study_id].unfinished_trial_ids.add(trial_id)

    def _write(self, trial_id: int) -> None:
        """Write what is not written yet of a trial, in one transaction."""
        with self._lock:
            pending = self._pending.pop(trial_id, None)
            if pending is None or not (pending.params or pending.attrs):
                return
            with _create_scoped_session(self._backend.scoped_session, True) as session:
                trial = TrialModel.find_or_raise_by_id(trial_id, session)
                self._backend.check_trial_is_updatable(trial_id, cast(TrialState, trial.state))
                session.add_all(
                    TrialParamModel(
                        trial_id=trial_id,
                        param_name=name,
                        param_value=value,
                        distribution_json=self._json_of(name, distribution),
                    )
                    for name, (value, distribution) in pending.params.items()
                )
                for model, key, value in pending.attrs:
                    self._backend._set_trial_attr_without_commit(
                        session, model, trial_id, key, value
                    )

    def _json_of(self, name: str, distribution: BaseDistribution) -> str:
        known = self._as_json.get(name)
        if known is None or known[0] != distribution:
            known = self._as_json[name] = (distribution, distribution_to_json(distribution))
        return known[1]
