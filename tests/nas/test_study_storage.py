"""Where a study lives, and what other objectives, constraints and runs take over from it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import optuna
import pytest

from nas.candidates import Objectives, Prices
from nas.progress import Reporter
from nas.study import (
    SearchProblem,
    SearchRun,
    adopt,
    evaluated,
    nearest,
    nearest_sentence,
    open_storage,
    open_study,
    read_evaluated,
    shared_storage,
    sqlite_url,
    studies_at,
    weights_key,
)
from searchspace.arch import Arch
from searchspace.errors import UserError
from tests.nas.conftest import synthetic_table
from tests.nas.search_process import loss_of, problem

QUIET = Reporter(quiet=True)
NAMES = ("loss", "latency_ms", "weight_bytes")


@pytest.fixture(scope="module")
def base() -> SearchProblem:
    return problem()


def with_objectives(
    base: SearchProblem, names: tuple[str, ...], *constraints: str, evaluate: object = loss_of
) -> SearchProblem:
    objectives = Objectives.parse(names, constraints, base.prices.metrics)
    return SearchProblem(base.space, base.prices, objectives, evaluate)  # type: ignore[arg-type]


def refuse(arch: Arch) -> float:
    raise AssertionError(f"{arch.id} was evaluated again")


def search(what: SearchProblem, storage: str, num: int, sampler: str = "random") -> SearchRun:
    run = SearchRun(what, storage, sampler, seed=0)
    run.run(num, 1e9, QUIET)
    return run


def test_a_journal_file_holds_a_study_and_several_runs(base: SearchProblem, tmp_path: Path) -> None:
    url = f"journal:{tmp_path / 'deep' / 'study.log'}"
    first = set(search(base, f"{url}#first", 3).losses)
    search(base, f"{url}#second", 2)
    again = search(with_objectives(base, NAMES), f"{url}#first", 5)
    assert first < set(again.losses)
    assert [len(evaluated(study)) for study in studies_at(f"{url}#first")] == [5]
    assert len(read_evaluated(f"{url}#second", ["loss"])) == 2
    assert read_evaluated(f"{url}#third", ["loss"]) == []


def test_the_name_of_a_run_in_a_shared_storage_is_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "my run"
    assert shared_storage("journal:a.log", folder) == "journal:a.log#my run"
    assert shared_storage("journal:a.log#mine", folder) == "journal:a.log#mine"
    assert shared_storage("journal:a#b/c.log", folder) == "journal:a#b/c.log#my run"


def test_a_folder_with_odd_letters_holds_a_study(base: SearchProblem, tmp_path: Path) -> None:
    folder = tmp_path / "a#b {c}"
    folder.mkdir()
    search(base, sqlite_url(folder), 1)
    assert (folder / "study.db").is_file()


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("postgresql://me:secret@localhost:1/db", "psycopg|Connection refused"),
        ("study.db", "is no storage; give sqlite:///FILE"),
        ("journal:", "names no file"),
        ("oracel://host/db", "cannot open the study at oracel://host/db"),
        ("sqlite:////no/such/folder/x.db", "unable to open database file"),
    ],
)
def test_a_storage_that_cannot_be_opened_is_one_sentence(url: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        open_storage(url)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_study_is_refused(tmp_path: Path) -> None:
    (tmp_path / "study.db").write_text("not a database, " * 100)
    with pytest.raises(UserError, match="file is not a database"):
        open_storage(sqlite_url(tmp_path))


def test_archs_of_another_space_are_refused(base: SearchProblem, tmp_path: Path) -> None:
    objectives = base.objectives
    open_study(sqlite_url(tmp_path), objectives, space="a 1")
    with pytest.raises(UserError, match="holds archs of space 'a 1', and this run searches 'b 2'"):
        open_study(sqlite_url(tmp_path), objectives, space="b 2")


def test_a_study_of_another_space_is_refused_under_other_objectives_too(
    base: SearchProblem, tmp_path: Path
) -> None:
    url = sqlite_url(tmp_path)
    search(base, url, 1)
    other = with_objectives(base, ("loss", "params")).objectives
    with pytest.raises(UserError, match="and this run searches 'b 2'"):
        open_study(url, other, space="b 2")
    assert [study.study_name for study in studies_at(url)] == ["search"]


def test_losses_of_another_supernet_are_refused(base: SearchProblem, tmp_path: Path) -> None:
    """As where two run folders of the same name share a database."""
    (tmp_path / "model.safetensors").write_bytes(b"first")
    key = weights_key(tmp_path)
    url = f"journal:{tmp_path / 'study.log'}#run"
    search(replace(base, weights=key), url, 2)
    search(replace(base, weights=key), url, 3)
    (tmp_path / "model.safetensors").write_bytes(b"other")
    assert weights_key(tmp_path) != key and weights_key(tmp_path / "none") == ""
    with pytest.raises(UserError, match=r"losses of another supernet .* --storage URL#NAME"):
        search(replace(base, weights=weights_key(tmp_path)), url, 4)
    search(replace(base, weights=weights_key(tmp_path)), f"{url}2", 1)


def test_a_search_goes_on_with_a_refined_latency_table(base: SearchProblem, tmp_path: Path) -> None:
    url = sqlite_url(tmp_path)
    search(base, url, 2)
    table = synthetic_table(base.space)
    for key, entry in table.entries.items():
        table.entries[key] = replace(entry, latency_us=entry.latency_us * 2)
    slower = replace(base, prices=Prices(base.space, table, "prefill_b1_t64"))
    search(slower, url, 3)
    (study,) = studies_at(url)
    assert len({item.arch.id for item in evaluated(study)}) == 3


def test_a_study_that_was_made_by_a_killed_process_is_taken_over(
    base: SearchProblem, tmp_path: Path
) -> None:
    """It may have a number of objectives and nothing else."""
    url = sqlite_url(tmp_path)
    optuna.create_study(study_name="search", storage=open_storage(url), directions=["minimize"] * 2)
    search(base, url, 1)
    names = [study.study_name for study in studies_at(url)]
    assert names == ["search", "search: loss, latency_ms, weight_bytes"]
    search(with_objectives(base, ("loss", "params")), url, 2)
    assert [study.study_name for study in studies_at(url)] == names


def test_an_added_objective_is_computed_and_nothing_is_evaluated_again(
    base: SearchProblem, tmp_path: Path
) -> None:
    url = sqlite_url(tmp_path)
    first = search(with_objectives(base, ("loss", "latency_ms")), url, 6)
    wider = with_objectives(base, ("loss", "latency_ms", "params"), evaluate=refuse)
    second = SearchRun(wider, url, "predictor", seed=0)
    second.run(6, 1e9, QUIET)
    before = {item.arch.id: item.values for item in evaluated(first.study)}
    after = {item.arch.id: item for item in evaluated(second.study)}
    assert set(after) == set(before)
    for arch_id, item in after.items():
        params = base.prices.of("params", base.space.encode(item.arch)[None])[0]
        assert item.values == (*before[arch_id], params)
    names = [study.study_name for study in studies_at(url)]
    assert names == ["search", "search: loss, latency_ms, params"]
    assert second.study.metric_names == ["loss", "latency_ms", "params"]
    # And back: what the second study adds is there under the first objectives too.
    grown = search(with_objectives(base, ("loss", "latency_ms", "params")), url, 8)
    back = SearchRun(with_objectives(base, ("loss", "latency_ms")), url, "random", seed=0)
    assert set(back.losses) == set(grown.losses)
    assert back.study.study_name == "search"


def test_old_trials_teach_the_sampler_of_new_objectives(
    base: SearchProblem, tmp_path: Path
) -> None:
    url = sqlite_url(tmp_path)
    search(with_objectives(base, ("loss", "latency_ms")), url, 14)
    other = SearchRun(with_objectives(base, ("loss", "params")), url, "predictor", seed=0)
    # With 14 labels the structured design of 12 is over: the next is a prediction, and is new.
    assert other.step() == "complete"
    assert len(other.losses) == 15


def test_a_changed_constraint_is_judged_anew(base: SearchProblem, tmp_path: Path) -> None:
    url = sqlite_url(tmp_path)
    first = search(base, url, 8)
    limit = sorted(first.losses.values())[3]
    strict = SearchRun(with_objectives(base, NAMES, f"loss<={limit:.17g}"), url, "random", seed=0)
    feasible = {item.arch.id for item in evaluated(strict.study) if item.feasible}
    assert feasible == {arch_id for arch_id, loss in first.losses.items() if loss <= limit}
    assert nearest(strict.study, strict.problem.objectives) is None
    hopeless = SearchRun(with_objectives(base, NAMES, "loss<=0.5"), url, "random", seed=0)
    found = nearest(hopeless.study, hopeless.problem.objectives)
    assert found is not None
    best = min(first.losses, key=first.losses.__getitem__)
    assert found["arch_id"] == best and found["lowest"]["loss"] == first.losses[best]
    assert "which breaks loss<=0.5" in nearest_sentence(found, 8)


def test_two_studies_merge_and_each_arch_counts_once(base: SearchProblem, tmp_path: Path) -> None:
    urls = [sqlite_url(tmp_path / name) for name in ("a", "b", "c")]
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    a, b = search(base, urls[0], 5), SearchRun(base, urls[1], "random", seed=3)
    b.study.enqueue_trial(a.study.trials[2].params)
    b.run(4, 1e9, QUIET)
    both = set(a.losses) & set(b.losses)
    assert both
    target = open_study(urls[2], base.objectives)
    assert adopt(target, a.study, base.objectives) == (5, 0)
    assert adopt(target, b.study, base.objectives) == (4 - len(both), len(both))
    assert adopt(target, b.study, base.objectives) == (0, 4)
    items = {item.arch.id: item.values for item in evaluated(target)}
    assert {arch_id: values[0] for arch_id, values in items.items()} == {**a.losses, **b.losses}


def test_optuna_dashboard_finds_names_and_archs(base: SearchProblem, tmp_path: Path) -> None:
    url = sqlite_url(tmp_path)
    search(base, url, 2)
    study = optuna.load_study(study_name="search", storage=url)
    assert study.metric_names == list(NAMES)
    for trial in study.trials:
        assert Arch.from_dict(trial.user_attrs["arch"]).id == trial.user_attrs["arch_id"]
        assert trial.params.keys() == base.space.genes.keys()
