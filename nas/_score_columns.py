"""Scores of archs, one column per name that `nas score --by` takes.

Letters: N archs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hw_profiles.latency_table import LatencyTable
from hw_profiles.workload import Workload
from nas._score_cache import FILE, ScoreCache
from nas.progress import Reporter
from predictors.rank_aggregation import COMBINED, rank_aggregate
from predictors.saved import ArchPredictor
from predictors.zero_cost import METRICS, Batch, score_archs
from searchspace.arch import Arch
from searchspace.cost import arch_cost, weight_bytes
from searchspace.errors import UserError, unknown

if TYPE_CHECKING:
    from nas.pipeline import Pipeline

Floats = NDArray[np.float64]
COMBINED_NAME = "combined"
ENCODING = "aggregate+integer"
"""Features of the predictor that is fitted on a run's own evaluations."""


@dataclass(frozen=True)
class Score:
    """One score of every arch.

    Args:
        name: as it was asked for.
        values: shape (N,); NaN where there is none.
        higher_is_better: the direction.
        what: where it comes from, in words.
        std: standard deviation of a prediction, shape (N,).
        reasons: why an arch has no value, by arch id.
        predictor: what has predicted it, if one has.
    """

    name: str
    values: Floats
    higher_is_better: bool
    what: str
    std: Floats | None = None
    reasons: Mapping[str, str] = field(default_factory=dict)
    predictor: ArchPredictor | None = None


@dataclass(frozen=True)
class Scorer:
    """What scores need.

    Args:
        pipeline: task, space and config.
        folder: the run folder; None where there is none.
        seed: of random weights.
        reporter: shows what is going on.
    """

    pipeline: Pipeline
    folder: Path | None
    seed: int
    reporter: Reporter

    def check(self, names: Sequence[str]) -> None:
        """Refuse a name before anything is computed.

        Raises:
            UserError: for an unknown name, or a prediction that the run folder has nothing for.
        """
        exact = [*METRICS, COMBINED_NAME, "weight_bytes", "loss", *self._latencies]
        for name in names:
            if name == "loss" and self.folder is None:
                raise UserError(
                    "--by loss predicts from what a search has evaluated; give its run folder"
                )
            if name.endswith(".safetensors"):
                ArchPredictor.load(Path(name))
            if name in exact or name.endswith(".safetensors"):
                continue
            if name.endswith("_ms") and not self._latencies:
                raise UserError(
                    f"--by {name} needs the latency table of a run folder; give one that "
                    "`nas profile` has written to"
                )
            raise unknown("score", name, [*exact, "FILE.safetensors"])

    def scores(self, names: Sequence[str], archs: Sequence[Arch]) -> list[Score]:
        """Return one score per name, in order.

        Raises:
            UserError: for an unknown name, or one that no arch has a value of (with the reason).
        """
        self.check(names)
        predicted = {name: self._predictor(name) for name in names if _is_predicted(name)}
        metrics = [name for name in names if name in METRICS]
        metrics += COMBINED if COMBINED_NAME in names else ()
        metrics += [name for p, _ in predicted.values() for name in p.metrics]
        found = {score.name: score for score in self.metric_scores(metrics, archs)}
        columns = []
        for name in names:
            if name in predicted:
                columns.append(self._predicted(name, *predicted[name], archs, found))
            elif name == COMBINED_NAME:
                columns.append(_combined(found))
            else:
                columns.append(found[name] if name in METRICS else self._priced(name, archs))
        for score in columns:
            if archs and np.isnan(score.values).all():
                reason = next(iter(score.reasons.values()), "no arch has a value")
                raise UserError(f"nothing can be scored by {score.name}: {reason}")
        return columns

    def metric_scores(self, names: Sequence[str], archs: Sequence[Arch]) -> list[Score]:
        """Return training-free metrics of archs; those that the run folder keeps are read."""
        names = tuple(dict.fromkeys(names))
        if not names:
            return []
        batch = self.pipeline.metric_batch()
        cache = ScoreCache(self.folder / FILE if self.folder else None, batch, self.seed)
        values: dict[str, list[float]] = {name: [] for name in names}
        reasons: dict[str, dict[str, str]] = {name: {} for name in names}
        try:
            with self.reporter.bar("training-free metrics") as bar:
                for index, arch in enumerate(archs):
                    known = {name: cache.get(name, arch.id) for name in names}
                    missing = [name for name, value in known.items() if value is None]
                    new, errors = _score_one(missing, arch, batch, self.seed)
                    cache.put(arch.id, new)
                    for name in names:
                        value = known[name]
                        values[name].append(new.get(name, math.nan) if value is None else value)
                    for name, reason in errors.items():
                        reasons[name][arch.id] = reason
                    bar.update((index + 1) / len(archs), f"{index + 1} of {len(archs)} archs")
        finally:
            cache.write()
        return [
            Score(name, np.array(values[name]), True, "training-free", reasons=reasons[name])
            for name in names
        ]

    def _priced(self, name: str, archs: Sequence[Arch]) -> Score:
        if name == "weight_bytes":
            exact = np.array([arch_cost(arch, weight_bytes) for arch in archs])
            return Score(name, exact, False, "exact")
        assert self._table is not None
        workload, table = self._latencies[name], self._table
        values, reasons = [], {}
        for arch in archs:
            try:
                values.append(table.latency_ms(arch, workload))
            except UserError as error:
                values.append(math.nan)
                reasons[arch.id] = str(error)
        what = f"{workload.name}, predicted by the latency table"
        return Score(name, np.array(values), False, what, reasons=reasons)

    @cached_property
    def _table(self) -> LatencyTable | None:
        path = self.pipeline.folder.table
        return LatencyTable.load(path) if self.folder and path.exists() else None

    @cached_property
    def _latencies(self) -> dict[str, Workload]:
        """The workload that each latency's name means; see `SearchConfig.objectives`."""
        if self._table is None:
            return {}
        workloads = self._table.workloads
        wanted = self.pipeline.config.search.workload
        main = next((w for w in workloads if w.name == wanted), workloads[0])
        found = {"latency_ms": main}
        for workload in workloads:
            found.setdefault(f"{workload.phase}_ms", workload)
        return found

    def _predictor(self, name: str) -> tuple[ArchPredictor, str]:
        """Return what predicts a name, and where its prediction comes from, in words."""
        if name != "loss":
            predictor = ArchPredictor.load(Path(name))
            return predictor, f"{predictor.target}, predicted"
        from nas._score_quality import fitted_on_run

        assert self.folder is not None
        predictor, num = fitted_on_run(self.folder, self.pipeline, ENCODING)
        unit = self.pipeline.task.unit
        return predictor, f"nats/{unit}, predicted from {num} evaluated archs"

    def _predicted(
        self,
        name: str,
        predictor: ArchPredictor,
        what: str,
        archs: Sequence[Arch],
        metrics: Mapping[str, Score],
    ) -> Score:
        scores = {metric: metrics[metric].values for metric in predictor.metrics}
        mean, std = predictor.predict(archs, self.pipeline.space, scores)
        return Score(name, mean, not predictor.lower_is_better, what, std, predictor=predictor)


def _is_predicted(name: str) -> bool:
    return name == "loss" or name.endswith(".safetensors")


def _combined(metrics: Mapping[str, Score]) -> Score:
    values = rank_aggregate({name: metrics[name].values for name in COMBINED})
    what = f"mean normal score of the ranks by {', '.join(COMBINED)}"
    return Score(COMBINED_NAME, values, True, what)


def _score_one(
    names: Sequence[str], arch: Arch, batch: Batch, seed: int
) -> tuple[dict[str, float], dict[str, str]]:
    """Return the values of an arch, and the reasons of those that cannot be had."""
    if not names:
        return {}, {}
    try:
        # Together, as they share passes; one by one only where one of them fails.
        scores = score_archs(names, [arch], batch, seed)
        return {name: float(values[0]) for name, values in scores.items()}, {}
    except UserError as error:
        if len(names) == 1:
            return {}, {names[0]: str(error)}
    values: dict[str, float] = {}
    reasons: dict[str, str] = {}
    for name in names:
        new, errors = _score_one([name], arch, batch, seed)
        values |= new
        reasons |= errors
    return values, reasons
