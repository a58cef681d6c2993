"""The search loop: asks a sampler, claims, evaluates, tells.

Kill the process at any point and run the same command again: finished evaluations are read back,
the one that was interrupted is queued again. Several processes can run the loop on one study.
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import Trial, TrialState

from nas.candidates import SpaceCodec, metrics_of
from nas.evaluation import EvaluationFailed
from nas.feasibility import feasible_start
from nas.progress import Reporter
from nas.search_view import search_view
from nas.study._time_spent import seconds_at_work
from nas.study.archive import snapshot
from nas.study.claims import ARCH_ID, QUEUED, Claims, Outcome
from nas.study.generations import open_study
from nas.study.own_trials import together
from nas.study.owners import OWNER, OwningSampler, at_work, heartbeats
from nas.study.problem import SearchProblem, distributions, space_key
from nas.study.problem_sampler import sampler_of
from nas.study.storage import loss_said
from searchspace.arch import Arch
from searchspace.errors import UserError

MAX_FRUITLESS = 2000
MAX_FAILED = 25
"""So many failed evaluations and no success mean that none will follow."""
WAIT_S = 0.2
Result = TypeVar("Result")


@dataclass(frozen=True)
class Candidate:
    """What one process has claimed, and nobody else evaluates.

    Args:
        trial: that says so.
        arch: to evaluate.
        metrics: its exact costs.
    """

    trial: Trial
    arch: Arch
    metrics: Mapping[str, float]


class SearchRun:
    """One process's part in a search.

    Args:
        problem: what is searched.
        storage: an Optuna storage URL.
        sampler: a name in `nas.samplers.SAMPLERS`.
        seed: of the sampler.
        population: for evolutionary samplers.

    Raises:
        UserError: when no arch keeps the constraints, or the study is another one.
    """

    def __init__(
        self,
        problem: SearchProblem,
        storage: str,
        sampler: str,
        seed: int,
        population: int = 32,
    ) -> None:
        self.problem, self._storage = problem, storage
        self.space = problem.space
        codec = SpaceCodec(self.space, problem.prices, problem.objectives, problem.scores)
        self.seeds = self._feasible_seeds(codec)
        self._sampler = OwningSampler(
            sampler_of(problem, sampler, seed, codec, self.seeds, population)
        )
        self.study = open_study(
            storage,
            problem.objectives,
            self._sampler,
            space=space_key(self.space),
            weights=problem.weights,
            price=problem.exact_metrics,
        )
        self.claims = Claims(self.study)
        if not self.study.trials and sampler != "predictor":
            for arch in self.seeds:
                self.study.enqueue_trial(self.params_of(arch), {QUEUED: arch.id})

    def _feasible_seeds(self, codec: SpaceCodec) -> list[Arch]:
        start = feasible_start(self.space, self.problem.prices, self.problem.objectives)
        seeds = [
            arch
            for arch in self.problem.seeds
            if (codec.constraints(self.space.encode(arch)[None]) <= 0).all()
        ]
        return seeds or [self.space.decode(start[0])]

    def params_of(self, arch: Arch) -> dict[str, Any]:
        """Return an arch as the parameters of a trial."""
        return self.space.to_params(self.space.encode(arch)[None])[0]

    @property
    def losses(self) -> dict[str, float]:
        """The evaluated losses by arch id, of all processes."""
        done, _ = self.claims.look()
        return {
            arch_id: float(trial.user_attrs["loss"])
            for arch_id, trial in done.items()
            if trial.state == TrialState.COMPLETE
        }

    @property
    def num_evaluations(self) -> int:
        """Evaluations done, failed ones included, repeated archs not."""
        return len(self.claims.look()[0])

    @property
    def seconds(self) -> float:
        """Seconds in which at least one process was at work on a trial."""
        return seconds_at_work(self.study.get_trials(deepcopy=False))

    def run(
        self,
        num_evaluations: int | None,
        budget_s: float,
        reporter: Reporter,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """Evaluate until there are `num_evaluations`, or until `budget_s` seconds are spent.

        Args:
            num_evaluations: in all, those of earlier commands and of other processes included.
            budget_s: counts only without `num_evaluations`.
            reporter: shows front and hypervolume.
            should_stop: asked between evaluations.

        Raises:
            UserError: when the sampler finds no candidate that keeps the exact constraints, or
                every evaluation fails, or when the storage no longer answers.
        """
        spent = self.seconds
        start = time.perf_counter()
        objectives = self.problem.objectives
        fruitless = 0
        with loss_said(self._storage), search_view(reporter.quiet) as view:
            while not should_stop():
                elapsed = spent + time.perf_counter() - start
                done = self.num_evaluations
                share = elapsed / budget_s if num_evaluations is None else done / num_evaluations
                view.update(share, functools.partial(snapshot, self.study, objectives))
                if share >= 1.0:
                    break
                if not self.claims.has_place(num_evaluations):
                    time.sleep(WAIT_S)
                    continue
                result = self.step(num_evaluations)
                fruitless = 0 if result in ("complete", "failed") else fruitless + 1
                if result == "failed":
                    self.check_not_all_failed()
                if fruitless > MAX_FRUITLESS:
                    self.give_up(result, reporter)
                    break

    def check_not_all_failed(self) -> None:
        """Stop early where no arch can be evaluated at all.

        Raises:
            UserError: with the last reason.
        """
        trials = list(self.claims.look()[0].values())
        if len(trials) < MAX_FAILED or any(t.state == TrialState.COMPLETE for t in trials):
            return
        last = max(trials, key=lambda trial: trial.number)
        raise UserError(
            f"each of the {len(trials)} archs evaluated so far failed, the last with: "
            f"{last.user_attrs['reason']}; train the supernet again, longer or at a lower learning "
            "rate, or use a machine with more memory"
        )

    def give_up(self, result: str, reporter: Reporter) -> None:
        """Say that the sampler proposes nothing new.

        Args:
            result: of its last proposals, as `step` says it.
            reporter: tells the user.

        Raises:
            UserError: when they break exact constraints.
        """
        if result == "rejected":
            raise UserError(
                f"{MAX_FRUITLESS} candidates in a row broke a constraint; use "
                "search.sampler='predictor', which never proposes such, or loosen it"
            )
        reporter.say(
            f"search: {MAX_FRUITLESS} candidates in a row were nothing new, so the search ends; "
            "every arch within reach of the sampler is evaluated"
        )

    def step(self, limit: int | None = None) -> str:
        """Work on one candidate.

        Args:
            limit: evaluations that are wanted in all; None for any number.

        Returns:
            ``"complete"``, ``"failed"``, ``"rejected"`` by an exact constraint, ``"duplicate"`` of
            an evaluated one, or ``"withdrawn"`` because another process was first.
        """
        with at_work(self._sampler.owner):
            candidate = self.propose(limit)
            if isinstance(candidate, str):
                return candidate
            evaluate = functools.partial(self._evaluate, candidate)
            return self._not_lost(candidate.trial, evaluate)

    @contextlib.contextmanager
    def at_work_on(self, trial_ids: Callable[[], Iterable[int]]) -> Iterator[None]:
        """Show to other processes that this one lives and works on trials, while the block runs."""
        with at_work(self._sampler.owner), heartbeats(self.study, trial_ids):
            yield

    def propose(self, limit: int | None = None) -> Candidate | str:
        """Ask for a candidate and claim it; `finish` or `give_back` must follow.

        Args:
            limit: evaluations that are wanted in all; None for any number.

        Returns:
            The candidate, or why there is none, as `step` says it.
        """
        try:
            trial = self.study.ask(distributions(self.space))
        except UpdateFinishedTrialError:
            # It took so long that another machine took this process for dead.
            return "withdrawn"
        return self._not_lost(trial, functools.partial(self._claimed, trial, limit))

    def finish(
        self, candidate: Candidate, outcome: float | EvaluationFailed, seconds: float
    ) -> str:
        """Write down what came of a candidate; returns what `step` does.

        Args:
            candidate: of `propose`.
            outcome: its loss, or why there is none.
            seconds: that its evaluation took.
        """
        write = functools.partial(self._written, candidate, outcome, seconds)
        return self._not_lost(candidate.trial, write)

    def give_back(self, candidate: Candidate, reason: str) -> None:
        """Queue a candidate again that is not evaluated after all."""
        self.claims.requeue(self.study._storage.get_trial(candidate.trial._trial_id), reason)

    def _not_lost(self, trial: Trial, work: Callable[[], Result]) -> Result | str:
        """Do work on a trial that is queued again if the work is cut off."""
        try:
            return work()
        except UpdateFinishedTrialError:
            # Another process took this one for dead; what it queued again is not lost.
            return "withdrawn"
        except BaseException:
            self.claims.requeue(self.study._storage.get_trial(trial._trial_id), "stopped")
            raise

    def _claimed(self, trial: Trial, limit: int | None) -> Candidate | str:
        genotype = self.space.canonical(self.space.to_genotypes([trial.params]))[0]
        arch = self.space.decode(genotype)
        metrics = dict(metrics_of(self.problem.prices, genotype))
        with together(self.study._storage, trial._trial_id):
            trial.set_user_attr("arch", arch.to_dict())
            trial.set_user_attr("metrics", metrics)
        broken = [
            c for c in self.problem.objectives.exact_constraints if metrics[c.metric] > c.limit
        ]
        if broken:
            trial.set_user_attr(ARCH_ID, arch.id)
            value = metrics[broken[0].metric]
            reason = f"{broken[0].metric}={value:.4g} breaks {broken[0]}"
            return self._fail(trial, reason, "rejected")
        outcome = self.claims.claim(trial.number, trial._trial_id, arch.id, limit)
        if outcome.result != "mine":
            return self._step_aside(trial, outcome, metrics)
        return Candidate(trial, arch, metrics)

    def _evaluate(self, candidate: Candidate) -> str:
        start = time.perf_counter()
        outcome: float | EvaluationFailed
        try:
            with heartbeats(self.study, lambda: [candidate.trial._trial_id]):
                outcome = self.problem.evaluate(candidate.arch)
        except EvaluationFailed as error:
            outcome = error
        except UserError:
            raise
        except Exception as error:
            # A fault of the program is shown, and the next command shall get past this arch.
            candidate.trial.set_user_attr("seconds", time.perf_counter() - start)
            self._fail(candidate.trial, f"{type(error).__name__}: {error}", "failed")
            raise
        return self._written(candidate, outcome, time.perf_counter() - start)

    def _written(
        self, candidate: Candidate, outcome: float | EvaluationFailed, seconds: float
    ) -> str:
        trial = candidate.trial
        with together(self.study._storage, trial._trial_id):
            trial.set_user_attr("seconds", seconds)
            if isinstance(outcome, EvaluationFailed):
                return self._fail(trial, str(outcome), "failed")
            return self._complete(trial, {**candidate.metrics, "loss": outcome}, "complete")

    def _step_aside(self, trial: Trial, outcome: Outcome, metrics: Mapping[str, float]) -> str:
        other = outcome.trial
        if other is None:
            frozen = self.study._storage.get_trial(trial._trial_id)
            self.claims.requeue(frozen, "as many as wanted are under way")
            return "withdrawn"
        owner = self._sampler.owner
        if other.user_attrs.get(OWNER, owner) != owner and QUEUED not in trial.user_attrs:
            # Two processes with the same seed that propose the same go apart.
            self._sampler.reseed_rng()
        if outcome.result == "taken":
            return self._fail(trial, f"trial {other.number} evaluates the same", "withdrawn")
        if other.state == TrialState.FAIL:
            reason = str(other.user_attrs.get("reason", "failed before"))
            return self._fail(trial, reason, "duplicate")
        return self._complete(trial, {**metrics, "loss": other.user_attrs["loss"]}, "duplicate")

    def _complete(self, trial: Trial, metrics: Mapping[str, float], result: str) -> str:
        for constraint in self.problem.objectives.constraints:
            trial.set_constraint(str(constraint), metrics[constraint.metric] - constraint.limit)
        trial.set_user_attr("loss", metrics["loss"])
        self.study.tell(trial, [metrics[name] for name in self.problem.objectives.names])
        return result

    def _fail(self, trial: Trial, reason: str, result: str) -> str:
        trial.set_user_attr("reason", reason)
        self.study.tell(trial, state=TrialState.FAIL)
        return result

    def best_loss(self) -> float:
        """Return the lowest loss so far; NaN before the first."""
        return min(self.losses.values(), default=math.nan)
