"""What a study knows, as matrices: evaluated, avoided and pending candidates.

Letters: N evaluated candidates, G genes, M objectives (minimised).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.trial import FrozenTrial, TrialState

from nas.samplers._codec import Codec, IntMatrix
from nas.samplers._conditions import ConditionalCodec
from nas.samplers._design import row_keys
from searchspace.errors import UserError

FloatArray = NDArray[np.float64]

PROPOSAL_KEY = "predictor_guided:levels"


class Archive:
    """Incremental view of a study's trials through a codec.

    Args:
        codec: the space.
        signs: +1 per minimised objective, -1 per maximised one, shape (M,).
    """

    def __init__(self, codec: Codec, signs: FloatArray) -> None:
        self.codec = codec
        self.signs = signs
        self._forget()

    def _forget(self) -> None:
        self.known: set[bytes] = set()
        self._absorbed: set[int] = set()
        self._levels: list[IntMatrix] = []
        self._objectives: list[FloatArray] = []
        self._constraints: list[dict[str, float]] = []
        self._pending: dict[int, IntMatrix] = {}

    def update(self, trials: Sequence[FrozenTrial]) -> bool:
        """Take in trials that finished and note which ones are under way.

        Returns:
            Whether they show that other parameters count than was thought: rows that were
            canonical may be so no more, and those of this archive are taken anew.
        """
        anew = isinstance(self.codec, ConditionalCodec) and self.codec.learn(trials)
        if anew:
            self._forget()
        pending: dict[int, IntMatrix] = {}
        for trial in trials:
            if trial.number in self._absorbed:
                continue
            if trial.state.is_finished():
                self._absorb(trial)
                continue
            row = self._row_of_running(trial)
            if row is not None:
                pending[trial.number] = row
        self._pending = {
            **{n: r for n, r in self._pending.items() if n not in self._absorbed},
            **pending,
        }
        return anew

    def add_pending(self, number: int, row: IntMatrix) -> None:
        """Note that trial `number` is about to evaluate `row`."""
        self._pending[number] = row

    @property
    def num_evaluated(self) -> int:
        """Number of completed trials with finite values."""
        return len(self._levels)

    @property
    def levels(self) -> IntMatrix:
        """Evaluated candidates, shape (N, G)."""
        return _stack(self._levels, len(self.codec.genes))

    @property
    def objectives(self) -> FloatArray:
        """Their values, minimised, shape (N, M)."""
        if not self._objectives:
            return np.empty((0, len(self.signs)))
        return np.array(self._objectives)

    @property
    def measured_constraints(self) -> FloatArray:
        """Constraints told with the trials, shape (N, k), NaN where a trial told none."""
        names = sorted({name for entry in self._constraints for name in entry})
        rows = [[entry.get(name, np.nan) for name in names] for entry in self._constraints]
        return np.array(rows, dtype=np.float64).reshape(len(rows), len(names))

    @property
    def pending(self) -> IntMatrix:
        """Candidates under way, shape (K, G)."""
        return _stack([self._pending[n] for n in sorted(self._pending)], len(self.codec.genes))

    def taken(self) -> set[bytes]:
        """Keys of everything evaluated, failed or under way."""
        return self.known | {key.tobytes() for key in row_keys(self.pending)}

    def _absorb(self, trial: FrozenTrial) -> None:
        self._absorbed.add(trial.number)
        row = self._row(trial.params) if trial.params else self._proposal(trial)
        if row is None:
            return
        self.known.add(row_keys(row[None])[0].tobytes())
        values = trial.values if trial.state == TrialState.COMPLETE else None
        if values is None or len(values) != len(self.signs) or not np.isfinite(values).all():
            return
        self._levels.append(row)
        self._objectives.append(np.array(values, dtype=np.float64) * self.signs)
        self._constraints.append(dict(trial.constraints))

    def _row_of_running(self, trial: FrozenTrial) -> IntMatrix | None:
        proposal = self._proposal(trial)
        if proposal is not None:
            return proposal
        fixed = trial.system_attrs.get("fixed_params", {})
        params = {**fixed, **trial.params}
        return self._row(params) if params else None

    def _proposal(self, trial: FrozenTrial) -> IntMatrix | None:
        stored = trial.system_attrs.get(PROPOSAL_KEY)
        genes = self.codec.genes
        if not isinstance(stored, list) or len(stored) != len(genes):
            return None
        row = np.array(stored, dtype=np.int64)
        limits = np.array([gene.num_levels for gene in genes])
        return row if ((row >= 0) & (row < limits)).all() else None

    def _row(self, params: Mapping[str, Any]) -> IntMatrix | None:
        """Canonical levels of a trial, or None if its parameters do not fit the space."""
        if not any(gene.name in params for gene in self.codec.genes):
            return None
        try:
            levels = self.codec.to_matrix([params])
        except (UserError, KeyError, TypeError):
            return None
        return np.asarray(self.codec.canonical(levels)[0], dtype=np.int64)


def _stack(rows: list[IntMatrix], width: int) -> IntMatrix:
    return np.array(rows, dtype=np.int64).reshape(len(rows), width)
