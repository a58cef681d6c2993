"""`nas score`: archs of a space, ranked by training-free metrics and predictors."""

from __future__ import annotations

import inspect
import json
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from nas._score_archs import drawn_archs, read_archs
from nas._score_columns import COMBINED_NAME, Score, Scorer
from nas._score_table import Ranking
from nas.config import ExperimentConfig, load_config
from nas.pipeline import Pipeline
from nas.progress import Reporter
from nas.run_folder import RunFolder
from nas.tasks.registry import TASKS
from predictors.rank_aggregation import COMBINED
from predictors.zero_cost import METRICS
from searchspace.arch import Arch
from searchspace.errors import UserError, unknown
from searchspace.files import read_json, write_text

TRAIN_BYTES = 500_000
"""Bytes of text that are read where no run folder keeps a prepared task."""


def score_command(options: Namespace) -> int:
    """Score archs, and print them ranked.

    Raises:
        UserError: when names, archs, config and folder do not go together.
    """
    if options.list:
        return _print_list(options.json)
    names = tuple(dict.fromkeys(options.by or [COMBINED_NAME]))
    sort = options.sort or names[0]
    if sort not in names:
        raise unknown("score to sort by", sort, names)
    if options.save and "loss" not in names:
        raise UserError("--save writes the predictor of the loss; add --by loss")
    if options.importance:
        from nas._score_figure import check_figure_path

        check_figure_path(Path(options.importance))
    given = read_archs(Path(options.archs)) if options.archs else None
    reporter = Reporter(options.quiet)
    with _pipeline(options, reporter) as (pipeline, folder):
        seed = pipeline.config.seed if options.seed is None else options.seed
        if seed < 0:
            raise UserError(f"--seed {seed} is negative; choose 0 or more")
        scorer = Scorer(pipeline, folder, seed, reporter)
        scorer.check(names)
        archs = given or drawn_archs(pipeline.space, options.num, seed)
        scores = scorer.scores(names, archs)
        _write_predictor(options, scores, archs, scorer)
    whose = options.archs or f"space {pipeline.space.name}"
    ranking = Ranking.of(f"{len(archs)} archs of {whose}, by {sort}", sort, archs, scores)
    if options.out:
        write_text(Path(options.out), ranking.csv())
    if options.json:
        print(json.dumps({"seed": seed, **ranking.facts()}))
    else:
        from rich.console import Console

        Console().print(ranking.table(options.top))
    return 0


@contextmanager
def _pipeline(options: Namespace, reporter: Reporter) -> Iterator[tuple[Pipeline, Path | None]]:
    """Open the run folder that is meant, or prepare the task in passing where there is none."""
    folder = Path(options.config) if options.config and Path(options.config).is_dir() else None
    config = load_config(
        str(folder / "config.json") if folder else options.config,
        options.set,
        preset=options.preset,
        task__name=options.task or ("text" if options.data else None),
        task__data=options.data,
        out=str(folder) if folder else None,
    )
    if folder or _holds_run(config):
        yield Pipeline(config, reporter), Path(config.out)
        return
    with tempfile.TemporaryDirectory(prefix="nas-score-") as temporary:
        yield Pipeline(_in_passing(config, temporary), reporter), None


def _holds_run(config: ExperimentConfig) -> bool:
    """Whether the config's own run folder holds a run of the same task and space."""
    path = RunFolder(Path(config.out)).config
    if not path.is_file():
        return False
    there = ExperimentConfig.from_dict(read_json(path, "run config"))
    return (there.preset, there.task, there.seed) == (config.preset, config.task, config.seed)


def _in_passing(config: ExperimentConfig, folder: str) -> ExperimentConfig:
    task = config.task
    if "max_train_bytes" in TASKS[task.name].uses:
        task = replace(task, max_train_bytes=min(task.max_train_bytes, TRAIN_BYTES))
    return replace(config, out=folder, task=task)


def _write_predictor(
    options: Namespace, scores: Sequence[Score], archs: Sequence[Arch], scorer: Scorer
) -> None:
    """Write the predictor of the loss, and the figure of what a predictor listens to."""
    found = [score for score in scores if score.predictor is not None]
    if options.save:
        loss = next(score for score in found if score.name == "loss")
        assert loss.predictor is not None
        loss.predictor.save(Path(options.save))
        scorer.reporter.say(f"predictor: {options.save}")
    if not options.importance:
        return
    if not found:
        raise UserError("--importance draws a predictor; add --by loss or --by FILE.safetensors")
    from nas._score_figure import draw_importance
    from predictors.importance import permutation_importance

    predictor = found[0].predictor
    assert predictor is not None
    known = {score.name: score.values for score in scorer.metric_scores(predictor.metrics, archs)}
    features = predictor.features(archs, scorer.pipeline.space, known)
    rng = np.random.default_rng(scorer.seed)
    importance = permutation_importance(predictor.mean_of, features, rng)
    draw_importance(Path(options.importance), importance, predictor.target)
    scorer.reporter.say(f"importance: {options.importance}")


def _print_list(as_json: bool) -> int:
    rows = [*_metric_rows(), *_other_rows()]
    if as_json:
        print(json.dumps(rows))
        return 0
    for row in rows:
        print(row["name"])
        print(f"    {row['what']}")
        if row["source"]:
            print(f"    Source: {row['source']}")
    return 0


def _metric_rows() -> list[dict[str, Any]]:
    rows = []
    for name, metric in METRICS.items():
        text = inspect.getdoc(metric) or ""
        paragraphs = [" ".join(part.split()) for part in text.split("\n\n")]
        source = next((p for p in paragraphs if p.startswith("Source: ")), "")
        what = paragraphs[0].replace("``", "`")
        rows.append({"name": name, "what": what, "source": source.removeprefix("Source: ")})
    return rows


def _other_rows() -> list[dict[str, Any]]:
    described = {
        COMBINED_NAME: f"The mean normal score of the archs' ranks by {', '.join(COMBINED)}.",
        "weight_bytes": "Bytes of the stored weights, exact; fewer are better.",
        "latency_ms": "Predicted by the run folder's latency table (also prefill_ms, decode_ms).",
        "loss": "Predicted from what the run folder's search has evaluated.",
        "FILE.safetensors": "Predicted by a predictor that --save has written.",
    }
    return [{"name": name, "what": what, "source": ""} for name, what in described.items()]
