"""`nas score`: what ranks, what is kept, what is refused."""

from __future__ import annotations

import csv
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

from hw_profiles.latency_table import LatencyTable
from nas._score_archs import described, drawn_archs, read_archs
from nas._score_cache import ScoreCache
from nas._score_columns import ENCODING
from nas._score_figure import draw_importance
from nas._score_quality import fitted_on_run
from nas.candidates import Objectives, Prices
from nas.cli import main
from nas.config import load_config
from nas.pipeline import Pipeline
from nas.progress import Reporter
from nas.study import SearchProblem, SearchRun, sqlite_url
from nas.tasks.language_model import LanguageModelTask
from predictors.rank_aggregation import COMBINED, rank_aggregate
from predictors.saved import ArchPredictor
from predictors.zero_cost import METRICS, score_archs
from searchspace.arch import Arch, LayerArch
from searchspace.cost import arch_cost, num_params, weight_bytes
from searchspace.errors import UserError
from searchspace.space import SearchSpace

CONFIG = """
preset = "decoder-tiny"
out = {out!r}
[task]
name = "text"
data = {data!r}
vocab_size = 384
seq_len = 64
[profile]
workloads = ["prefill_b1_t64", "decode_b1_t64"]
num_threads = 1
[search]
objectives = ["loss", "latency_ms", "weight_bytes"]
"""
NUM_EVALUATED = 20


def loss_of(arch: Arch) -> float:
    return 5.0 - 0.2 * float(np.log(arch_cost(arch, num_params)))


@pytest.fixture(scope="module")
def searched(
    tmp_path_factory: pytest.TempPathFactory, text_file: Path, table: LatencyTable
) -> Path:
    """A run folder with a task, a latency table and a search, whose loss falls with size."""
    folder = tmp_path_factory.mktemp("runs") / "searched"
    config = folder.parent / "config.toml"
    config.write_text(CONFIG.format(out=str(folder), data=str(text_file)))
    pipeline = Pipeline(load_config(str(config)), Reporter(quiet=True))
    table.save(folder / "latency_table.json", keep_others=False)
    names = ("loss", "latency_ms", "weight_bytes")
    prices = Prices(pipeline.space, table, "prefill_b1_t64")
    problem = SearchProblem(
        pipeline.space, prices, Objectives.parse(names, (), prices.metrics), loss_of,
        seeds=(pipeline.space.smallest(),),
    )  # fmt: skip
    search = SearchRun(problem, sqlite_url(folder), "random", seed=0)
    search.run(NUM_EVALUATED, 1e9, Reporter(quiet=True))
    return folder


@pytest.fixture(scope="module")
def predictor_file(searched: Path) -> Path:
    """A predictor fitted on what that search has evaluated."""
    pipeline = Pipeline(load_config(str(searched / "config.json"), out=str(searched)))
    path = searched.parent / "quality.safetensors"
    fitted_on_run(searched, pipeline, ENCODING)[0].save(path)
    return path


@pytest.fixture
def run_folder(searched: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(searched, tmp_path / "run"))


def score(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    assert main(["score", *map(str, arguments), "--json", "--quiet"]) == 0
    return dict(json.loads(capsys.readouterr().out))


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert main(["score", *map(str, arguments), "--quiet"]) == 2
    out, error = capsys.readouterr()
    assert out == "" and len(error.strip().splitlines()) == 1
    return error


def archs_of(result: dict[str, Any]) -> list[Arch]:
    return [Arch.from_dict(record["arch"]) for record in result["archs"]]


def column(result: dict[str, Any], name: str) -> list[float]:
    return [record["scores"][name] for record in result["archs"]]


def test_metrics_are_those_of_the_registry_and_the_best_comes_first(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("grad_norm", "synflow", "params")
    by = [word for name in names for word in ("--by", name)]
    result = score(capsys, run_folder, *by, "--num", "5", "--seed", "3", "--sort", "synflow")
    assert result["sort"] == "synflow" and len(result["archs"]) == 5
    assert [record["rank"] for record in result["archs"]] == [1, 2, 3, 4, 5]
    assert column(result, "synflow") == sorted(column(result, "synflow"), reverse=True)
    archs = archs_of(result)
    pipeline = Pipeline(load_config(str(run_folder / "config.json"), out=str(run_folder)))
    expected = score_archs(names, archs, pipeline.metric_batch(), 3)
    for name in names:
        assert column(result, name) == pytest.approx(expected[name].tolist(), rel=1e-6)
    assert [record["params"] for record in result["archs"]] == column(result, "params")


def test_combined_is_the_rank_aggregate_of_a_few(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    by = [word for name in COMBINED for word in ("--by", name)]
    result = score(capsys, run_folder, "--by", "combined", *by, "--num", "6")
    expected = rank_aggregate({name: column(result, name) for name in COMBINED})
    assert column(result, "combined") == pytest.approx(expected.tolist())
    assert column(result, "combined") == sorted(column(result, "combined"), reverse=True)


def test_costs_are_exact_or_the_tables_and_the_lowest_come_first(
    run_folder: Path, table: LatencyTable, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("decode_ms", "latency_ms", "prefill_ms", "weight_bytes")
    by = [word for name in names for word in ("--by", name)]
    result = score(capsys, run_folder, *by, "--num", "8")
    prefill, decode = table.workloads
    for record, arch in zip(result["archs"], archs_of(result), strict=True):
        scores = record["scores"]
        assert scores["weight_bytes"] == arch_cost(arch, weight_bytes)
        assert scores["decode_ms"] == pytest.approx(table.latency_ms(arch, decode))
        assert scores["prefill_ms"] == pytest.approx(table.latency_ms(arch, prefill))
        assert scores["latency_ms"] == scores["prefill_ms"]
    assert column(result, "decode_ms") == sorted(column(result, "decode_ms"))


def test_scores_are_kept_and_an_interrupted_command_goes_on(
    run_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[tuple[str, ...], str]] = []

    def counted(names: Any, archs: Any, batch: Any, seed: int) -> Any:
        asked.append((tuple(names), archs[0].id))
        if len(asked) == 4:
            raise KeyboardInterrupt
        return score_archs(names, archs, batch, seed)

    monkeypatch.setattr("nas._score_columns.score_archs", counted)
    command = ["score", str(run_folder), "--by", "naswot", "--num", "6", "--json", "--quiet"]
    assert main(command) == 130
    assert "goes on from here" in capsys.readouterr().err
    assert main(command) == 0
    first = capsys.readouterr().out
    assert len(asked) == 4 + 3 and asked[3] == asked[4]
    assert main(command) == 0
    assert len(asked) == 7 and capsys.readouterr().out == first
    assert main([*command, "--by", "snip"]) == 0
    assert {names for names, _ in asked[7:]} == {("snip",)}
    assert main([*command, "--seed", "5"]) == 0
    assert len(asked) == 7 + 6 + 6


def test_the_loss_is_predicted_with_its_deviation_and_the_predictor_saved(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "quality.safetensors"
    result = score(capsys, run_folder, "--by", "loss", "--num", "30", "--save", file)
    archs = archs_of(result)
    assert spearmanr(column(result, "loss"), [loss_of(arch) for arch in archs]).statistic > 0.8
    assert all(record["std"]["loss"] > 0 for record in result["archs"])
    assert column(result, "loss") == sorted(column(result, "loss"))
    again = score(capsys, run_folder, "--by", file, "--num", "30")
    assert column(again, str(file)) == column(result, "loss")
    predictor = ArchPredictor.load(file)
    assert (predictor.kind, predictor.encoding) == ("quality", "aggregate+integer")
    assert "log params" in predictor.names and "layers.0.mixer" in predictor.names
    space = SearchSpace.load("decoder-tiny", archs[0].vocab_size)
    mean, std = predictor.predict(archs, space)
    assert mean == pytest.approx(column(result, "loss"))
    assert std is not None
    assert std == pytest.approx([record["std"]["loss"] for record in result["archs"]])
    other = SearchSpace.load("decoder-small", 384)
    with pytest.raises(UserError, match="encoding and the search space it was fitted with"):
        predictor.predict([other.smallest()], other)
    with pytest.raises(UserError, match="need the archs' space"):
        predictor.predict([other.smallest()])


def test_importance_is_drawn(
    run_folder: Path, predictor_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    png, svg = tmp_path / "importance.png", tmp_path / "importance.svg"
    score(capsys, run_folder, "--by", predictor_file, "--num", "12", "--importance", png)
    assert png.read_bytes().startswith(b"\x89PNG") and png.stat().st_size > 5000
    draw_importance(svg, {"log params": 2.0, "depth": 1.0, "d_model": 0.0}, "loss")
    text = svg.read_text()
    assert text.startswith("<?xml") and "<path" in text


def test_the_table_shows_the_best_and_the_csv_everything(
    run_folder: Path, predictor_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, by = tmp_path / "scores.csv", str(predictor_file)
    command = ["score", str(run_folder), "--by", "params", "--by", by, "--num", "7"]
    assert main([*command, "--top", "3", "--out", str(file)]) == 0
    out, error = capsys.readouterr()
    rows = list(csv.DictReader(file.open()))
    assert [row["rank"] for row in rows] == [str(i) for i in range(1, 8)]
    header = file.read_text().splitlines()[0].split(",")
    assert header == ["rank", "arch_id", "network", "depth", "params", by, f"{by} std"]
    assert [row["arch_id"] in out for row in rows] == [True] * 3 + [False] * 4
    assert "7 archs of space decoder-tiny, by params" in " ".join(out.split())
    assert "±" in out and "training-free metrics" in error


def test_without_a_run_folder_the_task_is_prepared_in_passing(
    text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.toml"
    config.write_text(CONFIG.format(out=str(tmp_path / "none"), data=str(text_file)))
    result = score(capsys, config, "--num", "4")
    assert len(set(column(result, "combined"))) > 1
    assert [path.name for path in tmp_path.iterdir()] == ["config.toml"]
    assert "needs the latency table" in refused(capsys, config, "--by", "latency_ms")
    assert "give its run folder" in refused(capsys, config, "--by", "loss")


def test_a_config_whose_run_is_there_uses_it(
    searched: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = score(capsys, searched.parent / "config.toml", "--by", "prefill_ms", "--num", "2")
    assert len(result["archs"]) == 2


def test_given_archs_are_scored_instead_of_drawn_ones(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], space: SearchSpace
) -> None:
    foreign = SearchSpace.load("decoder-small", space.vocab_size).smallest()
    archs = [space.smallest(), foreign, space.largest()]
    file = tmp_path / "archs.json"
    file.write_text(json.dumps([arch.to_dict() for arch in archs]))
    result = score(capsys, run_folder, "--by", "params", "--by", "prefill_ms", "--archs", file)
    expected = sorted(archs, key=lambda arch: -arch_cost(arch, num_params))
    assert [record["arch_id"] for record in result["archs"]] == [arch.id for arch in expected]
    unmeasured = [r["arch_id"] for r in result["archs"] if r["scores"]["prefill_ms"] is None]
    assert unmeasured == [foreign.id]
    assert f"arch {foreign.id}: " in refused(capsys, run_folder, "--by", "loss", "--archs", file)


def broken_metric(probe: Any) -> float:
    raise UserError("it has too few heads")


def test_missing_scores_are_never_silent(
    run_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def odd(probe: Any) -> float:
        if probe.arch.depth == 1:
            raise UserError("it has one layer")
        return float(probe.arch.depth)

    monkeypatch.setitem(METRICS, "odd", odd)
    monkeypatch.setitem(METRICS, "broken", broken_metric)
    result = score(capsys, run_folder, "--by", "odd", "--by", "params", "--num", "12")
    depths = [record["depth"] for record in result["archs"]]
    assert 1 in depths and depths == sorted(depths, reverse=True)
    values = column(result, "odd")
    assert [v is None for v in values] == [depth == 1 for depth in depths]
    assert None not in column(result, "params")
    (reasons,) = (c["reasons"] for c in result["columns"] if c["name"] == "odd")
    assert all("it has one layer" in reason for reason in reasons.values())
    assert len(reasons) == depths.count(1)
    assert main(["score", str(run_folder), "--by", "odd", "--num", "12", "--quiet"]) == 0
    assert "odd is missing for" in " ".join(capsys.readouterr().out.split())
    assert "too few heads" in refused(capsys, run_folder, "--by", "broken", "--num", "2")


def test_archs_come_from_lists_fronts_and_folders(space: SearchSpace, tmp_path: Path) -> None:
    archs = [space.largest(), space.smallest()]
    records = [{"arch_id": arch.id, "arch": arch.to_dict()} for arch in archs]
    forms = {
        "list.json": [arch.to_dict() for arch in archs] * 2,
        "records.json": records,
        "front.json": {"groups": {"front": records[:1], "random": records[1:]}},
    }
    for name, content in forms.items():
        (tmp_path / name).write_text(json.dumps(content))
        assert read_archs(tmp_path / name) == archs, name
    for record in records:
        folder = tmp_path / "run" / "subnets" / str(record["arch_id"])
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(record))
    expected = sorted(archs, key=lambda arch: arch.id)
    assert read_archs(tmp_path / "run") == read_archs(tmp_path / "run" / "subnets") == expected


def test_drawn_archs_differ_and_a_small_space_gives_all_it_has(space: SearchSpace) -> None:
    archs = drawn_archs(space, 40, 0)
    assert len({arch.id for arch in archs}) == 40
    assert drawn_archs(space, 40, 0) == archs != drawn_archs(space, 40, 1)
    one = SearchSpace("one", 9, (16,), 8, 1, {"softmax": {}}, ((2, 2), (1, 1)), (16,))
    assert len(drawn_archs(one, 10, 0)) == one.size() == 2


def test_networks_are_described_in_a_few_words(space: SearchSpace) -> None:
    wide = LayerArch("softmax", 4, 4, "rope", ffn="gelu", intermediate_size=128)
    narrow = LayerArch("gla", 4, 4, ffn="gelu", intermediate_size=64)
    assert described(space.arch(64, (wide, wide, narrow))) == "d64 2xsoftmax gla ffn 64-128"
    assert described(space.arch(32, (LayerArch(),) * 3)) == "d32"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--by", "synflw"], "did you mean 'synflow'"),
        (["--by", "params", "--sort", "parms"], "did you mean 'params'"),
        (["--by", "params", "--num", "0"], "asks for no archs"),
        (["--by", "params", "--seed", "-1"], "--seed -1 is negative"),
        (["--by", "params", "--save", "x.safetensors"], "add --by loss"),
        (["--by", "params", "--importance", "x.png"], "--importance draws a predictor"),
        (["--by", "loss", "--importance", "x.gif"], "must end in .png or .svg"),
        (["--by", "absent.safetensors"], "there is no predictor absent.safetensors"),
        (["--archs", "absent.json"], "there is no file of archs at absent.json"),
        (["--preset", "decoder-small"], "holds a run with preset='decoder-tiny'"),
    ],
)
def test_mistakes_are_one_sentence(
    run_folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    assert sentence in refused(capsys, run_folder, *arguments)


def test_wrong_files_are_refused(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.numpy import save_file

    empty, foreign = tmp_path / "empty.json", tmp_path / "foreign.safetensors"
    empty.write_text("[]")
    assert "holds no archs" in refused(capsys, run_folder, "--archs", empty)
    empty.write_text('[{"d_model": 3}]')
    assert "'head_dim' is missing" in refused(capsys, run_folder, "--archs", empty)
    save_file({"x": np.zeros(2)}, foreign)
    assert "does not say what its features are" in refused(capsys, run_folder, "--by", foreign)
    foreign.write_bytes(b"short")
    assert "not a whole safetensors file" in refused(capsys, run_folder, "--by", foreign)
    (run_folder / "study.db").unlink()
    assert "holds 0 evaluated archs" in refused(capsys, run_folder, "--by", "loss")
    (run_folder / "scores.json").write_text("[]")
    assert "is not a file of scores" in refused(capsys, run_folder, "--by", "params")


def test_list_names_every_metric_with_its_source(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score", "--list", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert list(rows)[: len(METRICS)] == list(METRICS)
    assert "Tanaka et al. 2020" in rows["synflow"]["source"]
    assert all(row["what"] for row in rows.values())
    assert {"combined", "loss", "latency_ms"} <= set(rows)
    assert main(["score", "--list"]) == 0
    assert "    Source: Lee et al. 2019" in capsys.readouterr().out


def test_two_processes_keep_each_others_scores(tmp_path: Path, task: LanguageModelTask) -> None:
    batch, path = task.train_batch(0, 2, 0), tmp_path / "scores.json"
    first, second = ScoreCache(path, batch, 0), ScoreCache(path, batch, 0)
    first.put("a", {"params": 1.0, "snip": float("nan")})
    second.put("b", {"params": 2.0})
    first.write()
    second.write()
    both = ScoreCache(path, batch, 0)
    assert (both.get("params", "a"), both.get("params", "b")) == (1.0, 2.0)
    assert both.get("snip", "a") is None
    assert ScoreCache(path, batch, 1).get("params", "a") is None
    other = task.train_batch(1, 2, 0)
    assert ScoreCache(path, other, 0).get("params", "a") is None
    assert os.listdir(tmp_path) == ["scores.json"]
