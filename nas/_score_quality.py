"""The quality predictor of a run: fitted on everything that its search has evaluated."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nas.study import Evaluated, read_evaluated
from predictors.encodings import encode_archs
from predictors.saved import ArchPredictor
from searchspace.errors import UserError

if TYPE_CHECKING:
    from nas.pipeline import Pipeline

MIN_LABELS = 5


def fitted_on_run(folder: Path, pipeline: Pipeline, encoding: str) -> tuple[ArchPredictor, int]:
    """Return a predictor of the search loss, and the number of archs that it was fitted on.

    The loss is in nats per unit of the task, of held-out data, with inherited weights.

    Args:
        folder: the run folder.
        pipeline: its config and space.
        encoding: of the archs.

    Raises:
        UserError: when the folder holds no search, or too few archs were evaluated.
    """
    from predictors.quality import QualityRegressor

    items = evaluated_archs(folder, pipeline)
    losses = [item.values[pipeline.config.search.objectives.index("loss")] for item in items]
    features = encode_archs([item.arch for item in items], pipeline.space, encoding)
    regressor = QualityRegressor(random_state=pipeline.config.seed)
    regressor.fit(features.values, np.array(losses))
    return ArchPredictor(regressor, "quality", encoding, features.names, "loss"), len(items)


def evaluated_archs(folder: Path, pipeline: Pipeline) -> list[Evaluated]:
    """Return what a run's search has evaluated, at least `MIN_LABELS` archs.

    Raises:
        UserError: when there are fewer.
    """
    found: list[Evaluated] = []
    if (folder / "study.db").exists() or pipeline.config.search.storage:
        found = read_evaluated(pipeline.storage, pipeline.config.search.objectives)
    if len(found) < MIN_LABELS:
        raise UserError(
            f"{folder} holds {len(found)} evaluated archs, and a predictor of the loss needs at "
            f"least {MIN_LABELS}; run `nas search` first"
        )
    return found
