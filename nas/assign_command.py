"""`nas assign`: the best block for every layer under hard limits."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

from nas._assign_study import evaluated_losses
from nas._assign_table import Results
from nas.assignment import Assignment, Limit, assign, reasons, sweep
from nas.assignment.choices import LayerChoices
from nas.assignment.costs import CostModel, cost_model
from nas.assignment.highs import INFEASIBLE, TIME_OUT
from nas.assignment.programmes import DepthProgramme, depth_programmes
from nas.assignment.restrict import only
from nas.assignment.score_file import FILE, ScoreFile, weights_key
from nas.assignment.scores import Scorer
from nas.config import load_config
from nas.evaluation import evaluation_amount
from nas.pipeline import Pipeline
from nas.progress import Reporter
from nas.training.state import read_state
from searchspace.errors import UserError, unknown

BATCH_SIZE = 8
EXIT_IMPOSSIBLE = 2


def assign_command(options: Namespace) -> int:
    """Score what has no score yet, solve, evaluate the result, and print it.

    Raises:
        UserError: when names, numbers, limits and folder do not go together.
    """
    _check_numbers(options)
    run = _Run(options)
    limits = run.limits
    tried = list(run.budgets(limits))
    budgets = [budget for budget in tried if budget.found]
    if not budgets:
        return _impossible(run, tried[0], options.time_limit, options.json)
    wanted = [item.arch for budget in budgets for item in budget.found[: options.evaluate]]
    losses = evaluated_losses(run.pipeline, list({a.id: a for a in wanted}.values()), run.reporter)
    results = Results(
        budgets, losses, run.pipeline.table, run.workloads, run.pipeline.task.unit
    )  # fmt: skip
    if options.json:
        print(json.dumps({"folder": str(run.pipeline.folder.path), **results.facts()}))
        return 0
    from rich.console import Console

    console = Console()
    console.print(results.rich())
    for budget in budgets:
        if budget.status == TIME_OUT:
            console.print(
                f"{' and '.join(map(str, budget.limits))}: time ran out; the lowest predicted loss "
                f"may be lower by up to {budget.gap:.2g}"
            )
    return 0


class _Run:
    """A run folder, its scores, and the programmes they make."""

    def __init__(self, options: Namespace) -> None:
        folder = Path(options.folder)
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder} holds no run (it has no config.json); give a run folder")
        self._options = options
        self.reporter = Reporter(options.quiet)
        config = load_config(str(folder / "config.json"), out=str(folder))
        self.pipeline = Pipeline(config, self.reporter)
        self._space = only(self.pipeline.space, options.only)

    @cached_property
    def _model(self) -> CostModel:
        return cost_model(self._space, self.pipeline.table, self.pipeline.workload)

    @property
    def workloads(self) -> dict[str, str]:
        """By latency metric the workload that it means."""
        found = {"latency_ms": self.pipeline.workload}
        for workload in self.pipeline.table.workloads:
            found.setdefault(f"{workload.phase}_ms", workload.name)
        return found

    @cached_property
    def limits(self) -> list[Limit]:
        """The limits that were given, or those of the run's own search."""
        known = self._model.metrics
        given = self._options.constraint
        if given is None:
            kept = self.pipeline.objectives.exact_constraints
            limits = [Limit(constraint.metric, constraint.limit) for constraint in kept]
        else:
            limits = [Limit.parse(text, known) for text in given]
        if self._options.sweep and self._options.sweep[0] not in known:
            raise unknown("metric", self._options.sweep[0], known)
        if not limits and not self._options.sweep:
            raise UserError(
                "nothing limits the choice; give --constraint 'latency_ms<=8' or "
                "--sweep latency_ms 8"
            )
        return limits

    def budgets(self, limits: Sequence[Limit]) -> Iterator[Assignment]:
        """Yield one assignment per budget."""
        seconds = self._options.time_limit
        if not self._options.sweep:
            yield assign(self.programmes, limits, seconds)
            return
        metric, num = self._options.sweep[0], int(self._options.sweep[1])
        with self.reporter.bar("budgets") as bar:
            for index, budget in enumerate(sweep(self.programmes, limits, metric, num, seconds)):
                bar.update((index + 1) / num, f"{index + 1} of {num}")
                yield budget

    @cached_property
    def programmes(self) -> list[DepthProgramme]:
        """One programme per width and depth; what has no score yet is scored now."""
        space = self._space
        if True in space.kv_shared:
            self.reporter.say(
                "layers that share keys and values are left out: what they cost and do depends on "
                "another layer, so it does not add up"
            )
        scorer, programmes = self._scorer(), []
        for d_model in space.d_model:
            choices = LayerChoices.of(space, d_model)
            with self.reporter.bar("scores") as bar:
                scores = scorer.score(choices, bar)
            depths = depth_programmes(
                scores, self._model, space.min_depth, self._options.depth_by,
                lambda slots, of=choices: scorer.loss(of.without(slots)),  # type: ignore[misc]
            )  # fmt: skip
            with self.reporter.bar("depths") as bar:
                for programme in depths:
                    depth = len(programme.stay)
                    bar.update(1 - depth / space.num_layers, f"width {d_model}, {depth} layers")
                    programmes.append(programme)
                bar.update(1.0, f"width {d_model}")
        return programmes

    def _scorer(self) -> Scorer:
        pipeline, num_tokens = self.pipeline, self._options.score_tokens
        supernet = pipeline.supernet
        state = read_state(pipeline.folder.supernet)
        assert state is not None
        key = weights_key(pipeline.folder.supernet / state.file, num_tokens)
        amount = evaluation_amount(pipeline.task, num_tokens)
        batches = pipeline.task.evaluation_batches("validation", amount, BATCH_SIZE)
        known = ScoreFile(pipeline.folder.path / FILE, key)
        return Scorer(supernet, pipeline.task, batches, known)


def _check_numbers(options: Namespace) -> None:
    for name, least in (("score_tokens", 1), ("evaluate", 0)):
        if getattr(options, name) < least:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} {getattr(options, name)} is too small; give {least} or more")
    if not options.time_limit > 0:
        raise UserError(f"--time-limit {options.time_limit:g} is not positive; give seconds")
    if options.sweep and not (options.sweep[1].isdigit() and int(options.sweep[1]) > 1):
        raise UserError(
            f"--sweep {options.sweep[0]} {options.sweep[1]}: give the number of budgets, at least 2"
        )


def _impossible(run: _Run, tried: Assignment, time_limit_s: float, as_json: bool) -> int:
    """Say why a budget has no network."""
    if tried.status != INFEASIBLE:
        raise UserError(
            f"no network was found in {time_limit_s:g} s per width and depth, and none is ruled "
            "out; give a longer --time-limit"
        )
    diagnosis = reasons(run.programmes, tried.limits, time_limit_s)
    if not as_json:
        raise UserError(diagnosis.message())
    print(json.dumps({"status": INFEASIBLE, **diagnosis.to_dict()}))
    print(f"nas: {diagnosis.message()}", file=sys.stderr)
    return EXIT_IMPOSSIBLE
