"""The search: an Optuna study as the archive of everything that was really evaluated.

The study lives in an SQLite file of the run folder, or at any Optuna storage URL.
"""

from __future__ import annotations

from nas.study.archive import (
    Evaluated,
    Snapshot,
    evaluated,
    nearest,
    nearest_sentence,
    read_evaluated,
    search_summary,
    snapshot,
)
from nas.study.generations import adopt, evaluations, open_study, studies_at
from nas.study.problem import SearchProblem, distributions, space_key, weights_key
from nas.study.search_run import SearchRun
from nas.study.storage import STUDY_NAME, check_storage, open_storage, shared_storage, sqlite_url

__all__ = [
    "STUDY_NAME",
    "Evaluated",
    "SearchProblem",
    "SearchRun",
    "Snapshot",
    "adopt",
    "check_storage",
    "distributions",
    "evaluated",
    "evaluations",
    "nearest",
    "nearest_sentence",
    "open_storage",
    "open_study",
    "read_evaluated",
    "search_summary",
    "shared_storage",
    "snapshot",
    "space_key",
    "sqlite_url",
    "studies_at",
    "weights_key",
]
