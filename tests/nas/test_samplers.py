from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.testing.pytest_samplers import (
    BasicSamplerTestCase,
    MultiObjectiveSamplerTestCase,
    RelativeSamplerTestCase,
)
from optuna.trial import TrialState

from nas.pareto import hypervolume
from nas.samplers import (
    SAMPLERS,
    CallableCodec,
    GeneCodec,
    PredictorGuidedSampler,
    make_sampler,
)
from nas.samplers._codec import gene_of
from nas.samplers._design import corner_levels, feasible_pool, initial_design, tilted_levels
from predictors.encodings import Gene, GeneEncoding
from searchspace.errors import UserError

optuna.logging.set_verbosity(optuna.logging.ERROR)

NUM_LAYERS = 6


class TestOptunaSuite(BasicSamplerTestCase, RelativeSamplerTestCase, MultiObjectiveSamplerTestCase):
    @pytest.fixture
    def sampler(self) -> Callable[[], BaseSampler]:
        return lambda: PredictorGuidedSampler(
            seed=0, num_initial=4, batch_size=4, num_candidates=300
        )


SPACE: dict[str, optuna.distributions.BaseDistribution] = {
    "width": CategoricalDistribution((64, 128, 256)),
    **{f"layers.{i}.mixer": CategoricalDistribution(("a", "b", "none")) for i in range(NUM_LAYERS)},
    **{f"layers.{i}.ffn": IntDistribution(0, 3) for i in range(NUM_LAYERS)},
}


def cost(params: Sequence[dict[str, Any]]) -> np.ndarray:
    price = {"a": 2.0, "b": 1.0, "none": 0.0}
    return np.array(
        [
            p["width"]
            / 64
            * sum(1 + price[p[f"layers.{i}.mixer"]] + p[f"layers.{i}.ffn"] for i in range(6))
            for p in params
        ]
    )


def loss(p: dict[str, Any]) -> float:
    worth = {"a": 1.0, "b": 0.7, "none": 0.0}
    gain = sum(
        (1.2 - 0.1 * i) * (worth[p[f"layers.{i}.mixer"]] + 0.5 * np.log1p(p[f"layers.{i}.ffn"]))
        for i in range(NUM_LAYERS)
    )
    return float(1 + 3 * np.exp(-0.3 * np.log2(p["width"] / 32) * gain / 4))


def small(**options: Any) -> PredictorGuidedSampler:
    defaults = {"seed": 0, "search_space": SPACE, "num_candidates": 1200, "vectorized": True}
    return PredictorGuidedSampler(**{**defaults, **options})


def drive(
    sampler: BaseSampler,
    evals: int,
    values: Callable[[dict[str, Any]], Any],
    directions: Sequence[str] = ("minimize", "minimize"),
) -> optuna.Study:
    study = optuna.create_study(directions=list(directions), sampler=sampler)
    for _ in range(evals):
        trial = study.ask(SPACE)
        study.tell(trial, values(trial.params))
    return study


def both(params: dict[str, Any]) -> list[float]:
    return [loss(params), float(cost([params])[0])]


def volume(study: optuna.Study) -> float:
    values = np.array([t.values for t in study.trials if t.values is not None])
    return hypervolume(values * [1, 1 / 100], [4.0, 1.5])


def all_params(study: optuna.Study) -> list[tuple[Any, ...]]:
    return [tuple(t.params[name] for name in SPACE) for t in study.trials]


def test_front_is_far_ahead_of_random_and_nsga2() -> None:
    guided = volume(drive(small(exact_objectives={1: cost}), 40, both))
    for name in ("random", "nsga2"):
        assert guided > volume(drive(make_sampler(name, 0), 120, both))


def test_same_seed_and_history_give_the_same_proposals_and_another_seed_others() -> None:
    runs = [all_params(drive(small(seed=s), 24, both)) for s in (3, 3, 4)]
    assert runs[0] == runs[1] != runs[2]


def test_maximising_the_negative_proposes_the_same() -> None:
    plain = drive(small(), 24, both)
    flipped = drive(
        small(), 24, lambda p: [-v for v in both(p)], directions=("maximize", "maximize")
    )
    assert all_params(plain) == all_params(flipped)


@pytest.mark.parametrize("num_objectives", [1, 3, 4])
def test_other_numbers_of_objectives(num_objectives: int) -> None:
    def values(p: dict[str, Any]) -> list[float]:
        return [*both(p), float(p["width"]), float(p["layers.0.ffn"])][:num_objectives]

    study = drive(small(num_candidates=800), 26, values, ["minimize"] * num_objectives)
    assert len(set(all_params(study))) == 26
    if num_objectives == 1:
        best = loss(
            {
                **{n: "a" for n in SPACE if "mixer" in n},
                **{n: 3 for n in SPACE if "ffn" in n},
                "width": 256,
            }
        )
        assert study.best_value == pytest.approx(best)


def test_continuous_parameters_reach_the_minimum() -> None:
    study = optuna.create_study(sampler=PredictorGuidedSampler(seed=1, num_candidates=3000))
    study.optimize(
        lambda t: (
            (t.suggest_float("x", -5, 5) - 1.5) ** 2
            + (np.log10(t.suggest_float("y", 1e-5, 1, log=True)) + 3) ** 2
        ),
        n_trials=50,
    )
    assert study.best_value < 0.02


def test_no_evaluation_is_wasted_on_a_narrow_exact_constraint() -> None:
    def limit(params: Sequence[dict[str, Any]]) -> np.ndarray:
        return np.abs(cost(params) - 40.0)[:, None] - 2.0

    pool = tilted_levels([gene_of(n, d) for n, d in SPACE.items()], 2000, np.random.default_rng(0))
    codec = CallableCodec([gene_of(n, d) for n, d in SPACE.items()])
    assert (limit(codec.to_params(pool)) <= 0).mean() < 0.1
    study = drive(small(constraints=limit, exact_objectives={1: cost}), 30, both)
    assert all(abs(t.values[1] - 40.0) <= 2.0 for t in study.trials)


def test_measured_constraints_are_learned() -> None:
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=small())
    for _ in range(48):
        trial = study.ask(SPACE)
        trial.set_constraint("cost", cost([trial.params])[0] - 30.0)
        study.tell(trial, both(trial.params))
    feasible = [t.values[1] <= 30.0 for t in study.trials]
    assert sum(feasible[24:]) >= 16 > 2 * sum(feasible[:12])


def test_equal_canonical_forms_are_never_proposed_twice() -> None:
    def canonical(p: dict[str, Any]) -> dict[str, Any]:
        dead = {f"layers.{i}.ffn": 0 for i in range(6) if p[f"layers.{i}.mixer"] == "none"}
        return {**p, **dead}

    study = drive(small(canonicalize=canonical, num_candidates=800), 40, both)
    forms = [tuple(canonical(t.params).items()) for t in study.trials]
    assert len(set(forms)) == 40
    assert all(canonical(t.params) == t.params for t in study.trials)


def test_small_space_is_used_up_before_anything_repeats() -> None:
    study = optuna.create_study(sampler=PredictorGuidedSampler(seed=0, num_candidates=200))
    study.optimize(
        lambda t: t.suggest_int("x", 0, 3) + t.suggest_categorical("y", [0, 1, 2]), n_trials=16
    )
    assert len({(t.params["x"], t.params["y"]) for t in study.trials[1:13]}) >= 11


@pytest.mark.parametrize("space_known", [True, False])
def test_seed_params_come_first(space_known: bool) -> None:
    seeds = [
        {
            **{n: "b" for n in SPACE if "mixer" in n},
            **{n: k for n in SPACE if "ffn" in n},
            "width": 128,
        }
        for k in (1, 2)
    ]
    sampler = small(seed_params=seeds, search_space=SPACE if space_known else None)
    study = drive(sampler, 3, both)
    assert [t.params for t in study.trials[:2]] == seeds


def test_warm_start_goes_straight_to_the_predictors() -> None:
    source = drive(make_sampler("random", 5), 30, both)
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=small())
    study.add_trials(source.trials)
    for _ in range(12):
        trial = study.ask(SPACE)
        study.tell(trial, both(trial.params))
    better = drive(make_sampler("random", 6), 42, both)
    assert volume(study) > volume(source) and volume(study) > volume(better)
    assert len(set(all_params(study))) == 42


def test_failed_and_pruned_trials_are_not_proposed_again() -> None:
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=small())
    for number in range(40):
        trial = study.ask(SPACE)
        if number % 3 == 0:
            study.tell(trial, state=TrialState.FAIL)
        else:
            study.tell(trial, both(trial.params))
    assert len(set(all_params(study))) == 40


def test_candidates_under_way_are_distinct_across_two_samplers() -> None:
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=small())
    other = optuna.load_study(study_name=study.study_name, storage=study._storage, sampler=small())
    for _ in range(16):
        trial = study.ask(SPACE)
        study.tell(trial, both(trial.params))
    waiting = [(study, other)[i % 2].ask(SPACE) for i in range(12)]
    forms = {tuple(sorted(t.params.items())) for t in waiting}
    assert len(forms) == 12


def test_threads_share_one_sampler() -> None:
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=small())
    barrier = threading.Barrier(2, timeout=10)

    def objective(trial: optuna.Trial) -> list[float]:
        params = {name: trial._suggest(name, d) for name, d in SPACE.items()}
        if trial.number < 2:
            barrier.wait()
        return both(params)

    study.optimize(objective, n_trials=24, n_jobs=2)
    assert len(set(all_params(study))) == 24


def test_enqueued_trials_are_evaluated_as_given_and_taught() -> None:
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=small())
    wanted = {
        n: d.choices[0] if isinstance(d, CategoricalDistribution) else 1 for n, d in SPACE.items()
    }
    study.enqueue_trial(wanted)
    for _ in range(15):
        trial = study.ask(SPACE)
        study.tell(trial, both(trial.params))
    assert study.trials[0].params == wanted
    assert len(set(all_params(study))) == 15


def test_conditional_parameters_and_pickling() -> None:
    def objective(trial: optuna.Trial) -> float:
        if trial.suggest_categorical("kind", ["x", "y"]) == "x":
            return 1 + trial.suggest_float("a", 0, 1) ** 2
        return (trial.suggest_float("b", 0, 1) - 0.3) ** 2

    sampler = PredictorGuidedSampler(seed=0, num_candidates=1000)
    study = optuna.create_study(sampler=sampler)
    study.optimize(objective, n_trials=25)
    copy = pickle.loads(pickle.dumps(sampler))
    copy.reseed_rng()
    study.sampler = copy
    study.optimize(objective, n_trials=10)
    assert study.best_value < 1e-2


def test_absent_parameters_make_no_new_candidate() -> None:
    """Four networks with `kind` x, one with y: `a` counts only where it exists."""

    def objective(trial: optuna.Trial) -> float:
        if trial.suggest_categorical("kind", ["x", "y"]) == "x":
            return 1 + trial.suggest_int("a", 0, 3)
        return 0.5

    study = optuna.create_study(sampler=PredictorGuidedSampler(seed=0, num_candidates=300))
    study.enqueue_trial({"kind": "y"})
    study.enqueue_trial({"kind": "x", "a": 0})
    study.optimize(objective, n_trials=5)
    assert len({tuple(trial.params.items()) for trial in study.trials}) == 5


def test_functions_take_one_candidate_or_a_list_of_them() -> None:
    one = small(exact_objectives={1: lambda p: cost([p])[0]}, vectorized=False)
    several = small(exact_objectives={1: cost})
    assert all_params(drive(one, 16, both)) == all_params(drive(several, 16, both))


class SmallCodec(GeneCodec):
    exact_indices = (1,)

    def exact_objectives(self, matrix: np.ndarray) -> np.ndarray:
        return cost(self.to_params(matrix))[:, None]


def test_codec_and_callables_propose_the_same() -> None:
    codec = SmallCodec([gene_of(name, d) for name, d in SPACE.items()])
    by_codec = drive(small(codec=codec), 20, both)
    by_function = drive(small(exact_objectives={1: cost}), 20, both)
    assert all_params(by_codec) == all_params(by_function)
    with pytest.raises(UserError, match="give one or the other"):
        small(codec=codec, constraints=cost)


def test_design_spreads_layer_totals_that_uniform_draws_concentrate() -> None:
    genes = [Gene(f"layers.{i}.g", "int", low=0, high=3) for i in range(24)]
    rng = np.random.default_rng(0)
    tilted = tilted_levels(genes, 500, rng).mean(axis=1)
    uniform = rng.integers(0, 4, (500, 24)).mean(axis=1)
    assert tilted.std() > 2.5 * uniform.std()
    assert set(np.unique(corner_levels(genes, 200, rng).mean(axis=1))) == {0.0, 1.0, 3.0}
    codec = GeneCodec(genes)
    pool = feasible_pool(codec, 300, rng)
    known = np.empty((0, 24), dtype=np.int64)
    design = initial_design(codec, GeneEncoding(genes), known, 8, rng, pool)
    totals = design.mean(axis=1)
    assert totals.min() < 0.5 and totals.max() > 2.5
    assert totals.std() > 2.5 * uniform.std()


def test_unknown_names_and_bad_sizes_get_one_sentence() -> None:
    assert {"predictor", "nsga2", "random"} < set(SAMPLERS)
    with pytest.raises(UserError, match="did you mean 'nsga2'"):
        make_sampler("nsga-2")
    with pytest.raises(UserError, match="does not take these options"):
        make_sampler("random", 0, batch_size=3)
    with pytest.raises(UserError, match="batch_size=0 is too small"):
        make_sampler("predictor", 0, batch_size=0)
    with pytest.raises(UserError, match="return one value or row per candidate"):
        drive(small(exact_objectives={1: lambda params: 3.0}), 1, both)


def test_mixed_generic_space_without_layers() -> None:
    space = {
        "x": FloatDistribution(-1, 1),
        "n": IntDistribution(1, 10**9, log=True),
        "k": CategoricalDistribution((None, "a", 2, 0.5)),
        "one": CategoricalDistribution(("only",)),
    }
    sampler = PredictorGuidedSampler(seed=0, search_space=space, num_candidates=500)
    study = optuna.create_study(sampler=sampler)
    for _ in range(30):
        trial = study.ask(space)
        study.tell(trial, trial.params["x"] ** 2 + abs(np.log10(trial.params["n"]) - 4))
    assert study.best_value < 0.3
