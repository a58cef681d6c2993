"""Which parameters exist only under a condition, learned from a study's trials.

Optuna's define-by-run trials say which parameters they had, not why. A parameter that some trials
lack is explained by one other parameter where that is possible: it is absent at certain levels of
it and present at all others. Letters: N trials or candidates, G genes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.trial import FrozenTrial

from nas.samplers._codec import CallableCodec, IntMatrix
from predictors.encodings import Gene
from searchspace.errors import UserError

_MAX_LEVELS = 64


class ConditionalCodec(CallableCodec):
    """A codec that finds out which genes do not count, so that equal candidates are recognised.

    Args:
        genes: one per matrix column.
        **functions: see `CallableCodec`.
    """

    def __init__(self, genes: Sequence[Gene], **functions: Any) -> None:
        super().__init__(genes, **functions)
        self._num_seen = 0
        self._rules: list[tuple[int, int, NDArray[np.bool_]]] = []

    def learn(self, trials: Sequence[FrozenTrial]) -> bool:
        """Find the rules that the finished trials with parameters obey; return if they changed."""
        finished = [trial.params for trial in trials if trial.state.is_finished() and trial.params]
        if len(finished) == self._num_seen:
            return False
        self._num_seen = len(finished)
        present = np.array([[g.name in params for g in self.genes] for params in finished])
        if present.all():
            return False
        try:
            levels = self.to_matrix(finished)
        except UserError:  # trials of another space say nothing about this one
            return False
        before, self._rules = self._rules, condition_rules(self.genes, levels, present)
        return [_plain(rule) for rule in before] != [_plain(rule) for rule in self._rules]

    def canonical(self, matrix: IntMatrix) -> IntMatrix:
        """Set genes to 0 where the parameter would not exist."""
        out = super().canonical(matrix).copy()
        for gene, cause, absent in self._rules:
            out[absent[out[:, cause]], gene] = 0
        return out


def _plain(rule: tuple[int, int, NDArray[np.bool_]]) -> tuple[int, int, list[bool]]:
    gene, cause, absent = rule
    return gene, cause, absent.tolist()


def condition_rules(
    genes: Sequence[Gene], levels: IntMatrix, present: NDArray[np.bool_]
) -> list[tuple[int, int, NDArray[np.bool_]]]:
    """Return (gene, its cause, mask of the cause's levels at which the gene is absent).

    Args:
        genes: one per column.
        levels: of trials, shape (N, G).
        present: whether the trial had the parameter, shape (N, G).
    """
    always = np.asarray(present.all(axis=0))
    causes = [c for c, gene in enumerate(genes) if always[c] and gene.num_levels <= _MAX_LEVELS]
    causes.sort(key=lambda c: genes[c].num_levels)
    rules = []
    for gene in np.flatnonzero(~always):
        for cause in causes:
            there = np.bincount(levels[present[:, gene], cause], minlength=genes[cause].num_levels)
            gone = np.bincount(levels[~present[:, gene], cause], minlength=genes[cause].num_levels)
            if not ((there > 0) & (gone > 0)).any():
                rules.append((int(gene), cause, gone > 0))
                break
    return rules
