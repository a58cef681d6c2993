"""The config: files, overrides, and what is said of mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest

from nas.config import ExperimentConfig, default_workloads, load_config, parse_duration
from searchspace.errors import UserError


def test_file_overrides_and_arguments_are_merged_in_this_order(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(
        'seed = 3\n[train]\nmatrix_lr = 1e-3\nbatch_size = 4\n[search]\nsampler = "random"\n'
    )
    config = load_config(
        str(path),
        ["train.batch_size=16", "search.sampler=nsga2", "search.constraints=latency_ms<=2"],
        budget="90s",
        task__name=None,
    )
    assert config.seed == 3
    assert config.train.matrix_lr == 1e-3
    assert config.train.batch_size == 16
    assert config.search.sampler == "nsga2"
    assert config.search.constraints == ("latency_ms<=2",)
    assert config.budget == "90s"


def test_resolved_config_reproduces_itself(tmp_path: Path) -> None:
    import json

    config = load_config(None, ["search.num_evaluations=7", 'search.objectives=["loss", "params"]'])
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config.to_dict()))
    assert load_config(str(path)) == config


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("10m", 600), ("1h30m", 5400), ("45", 45), ("2h", 7200)]
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


def test_stage_budgets_are_shares_of_the_whole_unless_given() -> None:
    config = load_config(None, ["train.budget_s=7", "budget=100s"])
    assert config.stage_seconds("train") == 7
    assert 0 < config.stage_seconds("search") < 100
    stages = ("profile", "train", "search", "export")
    assert sum(ExperimentConfig().stage_seconds(stage) for stage in stages) < 600


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["serch.population=3"], "did you mean 'search'"),
        (["search.populaton=3"], "did you mean 'search.population'"),
        (["search.population=big"], "search.population='big' has the wrong type; it takes int"),
        (["search=3"], "search is a section"),
        (["search.population"], "has no '='"),
        (["budget=soon"], "is not a duration"),
        (["budget=0s"], "is not a duration"),
        (["task.tokenizer=words"], "unknown tokenizer 'words'"),
        (["train.precision=fp16"], "unknown train.precision 'fp16'"),
        (
            ["profile.workloads=prefill_b1_t64", "search.workload=prefill_b1_t999"],
            "search.workload='prefill_b1_t999' is not profiled; choose one of profile.workloads: "
            "prefill_b1_t64",
        ),
        (["task.name=stdlb"], "did you mean 'stdlib'"),
    ],
)
def test_mistakes_are_one_clear_sentence(overrides: list[str], sentence: str) -> None:
    with pytest.raises(UserError) as error:
        load_config(None, overrides)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_workloads_follow_from_family_and_task_where_none_are_given() -> None:
    assert ExperimentConfig().profile.workloads == ()
    assert default_workloads("decoder", 100, 0) == ("prefill_b1_t100", "decode_b1_t100")
    assert default_workloads("decoder", 2048, 0) == ("prefill_b1_t256", "decode_b1_t256")
    assert default_workloads("encoder", 500, 0) == ("prefill_b1_t500",)
    assert default_workloads("vit", 1, 16) == ("prefill_b1_t16",)


def test_a_workload_that_is_not_among_the_default_ones_is_refused_once_they_are_known(
    tmp_path: Path,
) -> None:
    from nas.pipeline import Pipeline
    from nas.progress import Reporter

    names = ["preset=vit-small", "task.name=digits", f"out={tmp_path / 'run'}"]
    config = load_config(None, [*names, "search.workload=prefill_b1_t256"])
    with pytest.raises(UserError, match=r"is not profiled; choose one of prefill_b1_t16"):
        Pipeline(config, Reporter(quiet=True)).profile()


def test_missing_and_invalid_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no config file"):
        load_config(str(tmp_path / "absent.toml"))
    (tmp_path / "bad.toml").write_text("a = = 1")
    with pytest.raises(UserError, match="not valid TOML"):
        load_config(str(tmp_path / "bad.toml"))
