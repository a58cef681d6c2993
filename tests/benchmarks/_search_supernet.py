"""The search problem of a finished run: losses that networks have with the supernet's weights.

Letters: N genotypes, G genes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nas.calibration import calibrated_view
from nas.candidates import Objectives, SpaceCodec
from nas.config import load_config
from nas.evaluation import evaluation_amount, held_out_loss
from nas.pipeline import Pipeline
from nas.progress import Reporter
from nas.search_stage import anchors
from tests.benchmarks._search_problems import FloatArray, IntArray


class SupernetProblem:
    """A run folder's space, latency table and supernet; every loss is evaluated once and kept.

    Anchors are those of `nas search`: the largest network, its neighbours, uniform networks.

    Args:
        folder: a finished run.
        objectives: ``loss`` and metrics of the latency table, loss first.
        num_tokens: held-out tokens per evaluation.
        cache: a JSON file of losses by arch id, read and written; None keeps them in memory.
    """

    def __init__(
        self, folder: Path, objectives: Sequence[str], num_tokens: int, cache: Path | None
    ) -> None:
        config = load_config(str(folder / "config.json"), out=str(folder))
        pipeline = Pipeline(config, Reporter(quiet=True))
        self._supernet, self._task, self._space = pipeline.supernet, pipeline.task, pipeline.space
        parsed = Objectives.parse(tuple(objectives), (), pipeline.prices.metrics)
        self._codec = SpaceCodec(self._space, pipeline.prices, parsed)
        self.name = f"supernet {folder.name} {' '.join(objectives[1:])}"
        self.genes, self.objectives = self._codec.genes, tuple(objectives)
        levels = np.array([self._space.encode(arch) for arch in anchors(self._space)])
        self.anchors: Sequence[dict[str, Any]] = self._codec.to_params(levels)
        amount = evaluation_amount(self._task, num_tokens)
        self._batches = self._task.evaluation_batches("validation", amount, 8)
        self._cache = cache
        known = cache is not None and cache.is_file()
        self._losses: dict[str, float] = json.loads(cache.read_text()) if known and cache else {}

    def canonical(self, levels: IntArray) -> IntArray:
        return self._space.canonical(levels)

    def quality(self, levels: IntArray) -> FloatArray:
        return np.array([self._loss(row) for row in levels])

    def costs(self, levels: IntArray) -> FloatArray:
        return self._codec.exact_objectives(levels)

    def best_known(self) -> None:
        return None

    def _loss(self, row: IntArray) -> float:
        arch = self._space.decode(row)
        if arch.id not in self._losses:
            view = calibrated_view(self._supernet, arch, self._task)
            self._losses[arch.id] = held_out_loss(view, self._batches, self._task)
            if self._cache is not None:
                self._cache.write_text(json.dumps(self._losses))
        return self._losses[arch.id]
