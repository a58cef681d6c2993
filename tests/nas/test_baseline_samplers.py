"""The contract that every sampler beside ours keeps, and what is special to each."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.testing.pytest_samplers import (
    BasicSamplerTestCase,
    MultiObjectiveSamplerTestCase,
    RelativeSamplerTestCase,
)
from optuna.trial import TrialState

from nas.pareto import hypervolume
from nas.samplers import SAMPLERS, make_sampler
from nas.samplers._age_survival import corner_rows, curvature, survival_scores
from nas.samplers._conditions import condition_rules
from nas.samplers._linas_predictor import LinasPredictor, one_hot
from nas.samplers._ranking import best_rows, crowding, front_ranks
from predictors.encodings import Gene
from searchspace.errors import UserError

optuna.logging.set_verbosity(optuna.logging.ERROR)

TWO = ["minimize", "minimize"]
BASELINES = [name for name in SAMPLERS if name != "predictor"]
CHEAP = [name for name in BASELINES if name not in ("gp", "tpe", "random")]


@pytest.fixture(autouse=True)
def fewer_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nas.samplers._linas_predictor._COSTS", np.array([1.0, 10.0, 100.0]))


def mixed(trial: optuna.Trial) -> tuple[float, float]:
    """Int, float, categorical and conditional parameters; a trade-off along `width`."""
    width = trial.suggest_int("width", 1, 16)
    dropout = trial.suggest_float("dropout", 0.0, 0.5)
    kind = trial.suggest_categorical("kind", ("softmax", "linear"))
    extra = trial.suggest_int("window", 1, 4) if kind == "softmax" else 0
    quality = math.log2(width) + (0.5 + 0.1 * extra if kind == "softmax" else 0.0)
    return 6.0 - quality + 4 * (dropout - 0.1) ** 2, width * (1.0 + 0.2 * extra)


def score(params: Sequence[dict[str, Any]]) -> list[float]:
    return [float(p.get("width", 1)) - p.get("dropout", 0.0) for p in params]


def sampler(name: str, seed: int, **options: Any) -> BaseSampler:
    small: dict[str, dict[str, Any]] = {
        "gp": {"n_startup_trials": 4},
        "nsga2": {"population_size": 10},
        "nsga3": {"population_size": 10},
        "moead": {"population_size": 10, "num_neighbors": 4},
        "age_moea": {"population_size": 10},
        "linas": {"population_size": 10, "num_predicted": 100},
        "regularized_evolution": {"population_size": 10, "sample_size": 4},
        "promotion": {"score": score, "num_scored": 128, "num_promoted": 32, "batch_size": 4},
    }
    return make_sampler(name, seed, **{**small.get(name, {}), **options})


def run(name: str, seed: int, trials: int, study: optuna.Study | None = None) -> optuna.Study:
    study = study or optuna.create_study(directions=TWO)
    study.sampler = sampler(name, seed)
    study.optimize(mixed, n_trials=trials)
    return study


def params_of(study: optuna.Study) -> list[tuple[Any, ...]]:
    return [tuple(sorted(trial.params.items())) for trial in study.trials]


@pytest.mark.parametrize("name", BASELINES)
def test_thirty_trials_of_a_mixed_space_repeat_with_the_seed(name: str) -> None:
    num = 6 if name == "gp" else 30
    study = run(name, 3, num)
    assert len(study.trials) == num
    assert all(trial.state == TrialState.COMPLETE for trial in study.trials)
    assert params_of(study) == params_of(run(name, 3, num))
    assert params_of(study)[:5] != params_of(run(name, 4, 5))


@pytest.mark.parametrize("name", BASELINES)
def test_a_resumed_study_goes_on_without_repeating(name: str) -> None:
    half = 4 if name == "gp" else 12
    study = run(name, 0, half)
    run(name, 0, half, study)
    params = params_of(study)
    assert len(params) == 2 * half
    if name in ("nsga2", "nsga3"):  # Optuna's own breed a parent again now and then
        assert len(set(params[12:])) > 6 and params[12:18] != params[:6]
    else:
        assert len(set(params)) == 2 * half


DEPTH = 10
LAYERS = {
    **{f"layers.{i}.mixer": CategoricalDistribution(("a", "b", "none")) for i in range(DEPTH)},
    **{f"layers.{i}.ffn": IntDistribution(0, 3) for i in range(DEPTH)},
}


def layered(params: dict[str, Any]) -> list[float]:
    worth, price = {"a": 1.0, "b": 0.7, "none": 0.0}, {"a": 2.0, "b": 1.0, "none": 0.0}
    layers = [(params[f"layers.{i}.mixer"], params[f"layers.{i}.ffn"]) for i in range(DEPTH)]
    gain = sum(worth[m] + 0.5 * math.log1p(f) for m, f in layers)
    return [3 * math.exp(-1.5 * gain / DEPTH), sum(price[m] + f for m, f in layers)]


GRID = {f"layers.{i}.size": IntDistribution(0, 15) for i in range(10)}


def two_spheres(params: dict[str, Any]) -> list[float]:
    sizes = np.array(list(params.values()))
    return [float(((sizes - centre) ** 2).mean()) for centre in (4, 11)]


def volume(name: str, seed: int, trials: int, **options: Any) -> float:
    made = sampler(name, seed, **options)
    study = optuna.create_study(directions=TWO, sampler=made)
    for _ in range(trials):
        trial = study.ask(GRID)
        study.tell(trial, two_spheres(trial.params))
    return hypervolume([trial.values for trial in study.trials], [60.0, 60.0]) / 3600.0


def test_each_beats_random_on_an_easy_problem() -> None:
    def median(name: str, **options: Any) -> float:
        return float(np.median([volume(name, seed, 100, **options) for seed in range(3)]))

    near: dict[str, Any] = {
        "score": lambda params: [-two_spheres(p)[0] for p in params],
        "batch_size": 16,
    }
    options = {"promotion": near, "linas": {"population_size": 25, "num_predicted": 250}}
    floor = median("random")
    for name in CHEAP:
        assert median(name, **options.get(name, {})) > floor + 0.01, name


@pytest.mark.parametrize("name", ["moead", "age_moea", "linas", "regularized_evolution"])
def test_three_objectives_and_maximising(name: str) -> None:
    def drive(signs: Sequence[int]) -> list[tuple[Any, ...]]:
        directions = ["minimize" if s > 0 else "maximize" for s in signs]
        study = optuna.create_study(directions=directions, sampler=sampler(name, 0))
        for _ in range(24):
            trial = study.ask(LAYERS)
            values = [*layered(trial.params), trial.params["layers.0.ffn"]]
            study.tell(trial, [s * v for s, v in zip(signs, values, strict=True)])
        return params_of(study)

    plain = drive([1, 1, 1])
    assert len(set(plain)) == 24
    assert plain == drive([1, -1, 1])


@pytest.mark.parametrize("name", ["moead", "age_moea", "linas", "regularized_evolution"])
def test_two_workers_share_one_study(name: str) -> None:
    study = optuna.create_study(directions=TWO, sampler=sampler(name, 0))
    other = optuna.load_study(
        study_name=study.study_name, storage=study._storage, sampler=sampler(name, 0)
    )
    waiting = []
    for number in range(40):
        waiting.append((study, other)[number % 2].ask(LAYERS))
        if number % 4 == 3:
            finished = waiting.pop(0)
            study.tell(finished, state=TrialState.FAIL)
        if len(waiting) > 3:
            finished = waiting.pop(1)
            study.tell(finished, layered(finished.params))
    forms = [tuple(sorted(trial.params.items())) for trial in study.trials]
    assert len(set(forms)) == 40


def test_measured_limits_put_a_candidate_behind_all_others() -> None:
    study = optuna.create_study(
        directions=TWO, sampler=sampler("regularized_evolution", 0, sample_size=8)
    )
    for _ in range(60):
        trial = study.ask(LAYERS)
        values = layered(trial.params)
        trial.set_constraint("cost", values[1] - 20.0)
        study.tell(trial, values)
    kept = [trial.values[1] <= 20.0 for trial in study.trials]
    assert sum(kept[30:]) > 2 * max(1, sum(kept[:10]))


def test_ranks_and_crowding_are_those_of_the_slow_definition() -> None:
    values = np.random.default_rng(0).integers(0, 12, (60, 3)).astype(float)
    left, expected, rank = set(range(60)), np.zeros(60, dtype=int), 0
    while left:
        front = {
            i for i in left
            if not any((values[j] <= values[i]).all() and (values[j] < values[i]).any()
                       for j in left)
        }  # fmt: skip
        for i in front:
            expected[i] = rank
        left, rank = left - front, rank + 1
    assert front_ranks(values).tolist() == expected.tolist()
    line = np.array([[0.0, 10.0], [1.0, 6.0], [5.0, 4.0], [10.0, 0.0]])
    room = crowding(line, np.zeros(4, dtype=np.int64))
    assert room.tolist() == pytest.approx([np.inf, 0.5 + 0.6, 0.9 + 0.6, np.inf])
    assert best_rows(np.vstack([line + 1, line]), 5)[:4].tolist() == [4, 7, 6, 5]


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
def test_age_survival_finds_the_shape_of_the_front(p: float) -> None:
    t = np.linspace(0.0, 1.0, 41)
    sphere = np.stack([t, (1 - t**p) ** (1 / p)], axis=1)
    corners = corner_rows(sphere)
    assert sorted(corners.tolist()) == [0, 40]
    assert curvature(sphere, corners) == pytest.approx(p, rel=0.1)
    ranks, scores = survival_scores(np.vstack([sphere, 1.5 * sphere + 0.1]))
    assert (ranks[:41] == 0).all() and (ranks[41:] > 0).all()
    kept = np.argsort(-scores[:41])[:9]
    steps = np.diff(np.sort(kept))
    assert {0, 40} <= set(kept.tolist()) and steps.max() <= 12


def test_linas_predictor_chooses_as_a_grid_search_does() -> None:
    from sklearn.linear_model import Ridge
    from sklearn.model_selection import GridSearchCV
    from sklearn.svm import SVR

    from nas.samplers._linas_predictor import _ALPHAS, _COSTS, cross_validate

    rng = np.random.default_rng(0)
    levels = rng.integers(0, 3, (23, 6))
    X = one_hot([Gene(f"g{i}", "int", low=0, high=2) for i in range(6)], levels)
    y = 20 + levels @ rng.normal(size=6) + 0.3 * levels[:, 0] * levels[:, 1]
    found = cross_validate(X, y)
    machine = SVR(kernel="rbf", gamma="auto", epsilon=0.0)
    for model, grid, errors in (
        (Ridge(), {"alpha": _ALPHAS}, found[0]),
        (machine, {"C": _COSTS}, found[1]),
    ):
        search = GridSearchCV(model, grid, cv=5, scoring="neg_mean_absolute_percentage_error")
        expected = -search.fit(X, y).cv_results_["mean_test_score"]
        assert errors == pytest.approx(expected, rel=1e-6)
    fitted = LinasPredictor().fit(X, y).predict(X)
    assert np.abs(fitted - y).mean() < 0.4 * np.abs(y - y.mean()).mean()


def test_conditions_are_learned_from_trials() -> None:
    genes = [Gene("kind", "categorical", ("x", "y", "z")), Gene("a", "int", low=0, high=9)]
    levels = np.array([[0, 3], [1, 0], [2, 5], [1, 0]])
    present = np.array([[True, True], [True, False], [True, True], [True, False]])
    ((gene, cause, absent),) = condition_rules(genes, levels, present)
    assert (gene, cause, absent.tolist()) == (1, 0, [False, True, False])
    present[3, 1] = True  # now `kind` explains nothing
    assert condition_rules(genes, levels, present) == []


def test_promotion_needs_a_score_and_follows_a_good_one() -> None:
    with pytest.raises(UserError, match="'promotion' got no score; give score=FUNCTION"):
        make_sampler("promotion", 0)
    best = volume("promotion", 0, 8, score=lambda ps: [-two_spheres(p)[0] for p in ps])
    wrong = volume("promotion", 0, 8, score=lambda ps: [two_spheres(p)[0] for p in ps])
    assert best > wrong
    with pytest.raises(UserError, match="return one number per candidate"):
        volume("promotion", 0, 3, score=lambda ps: 1.0)


def test_wrong_options_get_one_sentence() -> None:
    for name, options, sentence in (
        ("age_moea", {"population_size": 2}, "choose at least 4"),
        ("linas", {"population_size": 50, "num_predicted": 10}, "at least one population"),
        ("regularized_evolution", {"sample_size": 99}, "choose 1 to population_size"),
        ("promotion", {"num_promoted": 9999, "score": score}, "keep at least 1"),
        ("moead", {"codec": object(), "exact_objectives": {}}, "give one or the other"),
    ):
        with pytest.raises(UserError, match=sentence):
            sampler(name, 0, **options)


def test_moead_refuses_one_objective() -> None:
    study = optuna.create_study(sampler=sampler("moead", 0, search_space=LAYERS))
    with pytest.raises(UserError, match="splits several objectives"):
        study.ask(LAYERS)


class TestOptunaSuite(BasicSamplerTestCase, RelativeSamplerTestCase, MultiObjectiveSamplerTestCase):
    """Optuna's own tests, on a sampler that adds little to the shared base."""

    @pytest.fixture
    def sampler(self) -> Callable[[], BaseSampler]:
        options = {"population_size": 4, "sample_size": 2}
        return lambda: make_sampler("regularized_evolution", 0, **options)


def test_gp_says_which_package_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nas.samplers.optuna_samplers.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install torch scipy"):
        make_sampler("gp", 0)
