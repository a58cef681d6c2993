"""`nas profile`, its commands and its options."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hw_profiles import library, process
from hw_profiles.device import Device
from hw_profiles.latency_table import LatencyTable
from hw_profiles.latency_table.correction import Correction, Spill
from hw_profiles.latency_table.locking import one_profiler
from hw_profiles.library.check import TableCheck
from hw_profiles.library.comparison import Ratios
from hw_profiles.workload import Workload
from nas import profile_command
from nas._profile_options import join_command
from nas._profile_text import aligned
from nas.cli import main
from nas.config import ExperimentConfig
from nas.run_folder import RunFolder
from searchspace.space import SearchSpace
from tests.nas.conftest import WORKLOADS, synthetic_table

CONFIG = """
preset = "decoder-tiny"
[task]
name = "text"
data = {data!r}
vocab_size = 384
seq_len = 64
[profile]
workloads = ["prefill_b1_t64", "decode_b1_t64"]
"""


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Work in an empty folder with one thread, and leave the process as it was."""
    threads, applied = torch.get_num_threads(), process._applied
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shipped").mkdir()
    monkeypatch.setattr(library, "TABLES", tmp_path / "shipped")
    monkeypatch.setattr(profile_command, "busy_here", lambda backend: "")
    process.prepare_process(1)
    yield
    torch.set_num_threads(threads)
    process._applied = applied


@pytest.fixture(scope="module")
def space() -> SearchSpace:
    return SearchSpace.load("decoder-tiny", 384)


@pytest.fixture
def table(space: SearchSpace) -> LatencyTable:
    """A finished table of this device."""
    found = synthetic_table(space)
    found.spaces = (space,)
    fit = Correction(
        1.2, 3.0, -5.0, {"int8": 0.1}, {}, (Spill(2.0, 4.0, 80.0, 0.0),), 2.5, 0.06, 24
    )
    found.corrections = {item.name: fit for item in found.workloads}
    return found


class Recorder:
    """A pipeline that only notes what it was asked for."""

    made: list[ExperimentConfig]
    space: SearchSpace
    workloads = tuple(Workload.parse(name) for name in WORKLOADS)

    def __init__(self, config: ExperimentConfig, reporter: object) -> None:
        self.made.append(config)
        self.config, self.folder = config, RunFolder(Path(config.out))

    def profile(self) -> None:
        self.folder.table.with_name("measured").write_text("")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, space: SearchSpace) -> list[ExperimentConfig]:
    """Configs of pipelines that measure nothing."""
    monkeypatch.setattr(Recorder, "made", [], raising=False)
    monkeypatch.setattr(Recorder, "space", space, raising=False)
    monkeypatch.setattr(profile_command, "Pipeline", Recorder)
    return Recorder.made


@pytest.fixture
def config(tmp_path: Path, text_file: Path) -> str:
    path = tmp_path / "tiny.toml"
    path.write_text(CONFIG.format(data=str(text_file)))
    return str(path)


def save(table: LatencyTable, path: str) -> str:
    table.save(Path(path))
    return path


def run(*words: str) -> int:
    return main(["profile", *words])


def foreign(table: LatencyTable) -> LatencyTable:
    return replace(table, device=replace(table.device, cpu="Another processor"))


def test_only_the_second_word_is_a_command() -> None:
    assert join_command(["profile", "list", "--json"]) == ["profile list", "--json"]
    for words in (["profile"], ["profile", "list.toml"], ["profile", "--json"], ["run", "list"]):
        assert join_command(words) == words


def test_list_shows_tables_or_says_there_are_none(
    table: LatencyTable, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("list") == 0
    assert "run `nas profile`" in capsys.readouterr().out
    save(table, "runs/mine/latency_table.json")
    library.ship("runs/mine", "xeon-1t")
    Path("runs/bad").mkdir()
    Path("runs/bad/latency_table.json").write_text("{")
    assert run("list") == 0
    header, shipped, mine, bad = capsys.readouterr().out.splitlines()
    assert header.split() == ["name", "device", "backend", "threads", "space", "entries",
                              "measured"]  # fmt: skip
    assert shipped.startswith("xeon-1t (shipped)") and mine.startswith("runs/mine ")
    for line in (shipped, mine):
        assert line.endswith(
            f"eager    1        decoder-tiny  {len(table.entries)}      2026-01-01"
        )
    assert bad.startswith("unusable: runs/bad") and "delete it" in bad
    assert run("list", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == ["xeon-1t", "runs/bad", "runs/mine"]


def test_show_says_what_matters(table: LatencyTable, capsys: pytest.CaptureFixture[str]) -> None:
    name = table.workloads[0].name
    keys = [key for workload, key in table.entries if workload == name]
    for key in keys[:12]:
        disturbed = replace(table.entries[name, key], reliable=False, kept_fraction=0.25)
        table.entries[name, key] = disturbed
    assert run("show", save(table, "t.json")) == 0
    text = capsys.readouterr().out
    for part in (
        table.device.id, "decoder-tiny (vocabulary", "denormals", "allocator",
        f"{name}: {len(keys)} entries ({len(keys)} measured)", "error of 2.5 % (24 networks",
        "entries x 1.200, int8 +0.100, +3.0 us for each sub-block, -5.0 us for each network",
        "+80.0 us/MiB of working sets beyond 2 MiB", "12 entries were disturbed",
        "25% of its samples", "and 2 more",
    ):  # fmt: skip
        assert part in text
    assert run("show", "t.json", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert len(facts["workloads"][name]["unreliable"]) == 12
    assert facts["path"] == "t.json"


def test_diff_names_facts_and_entries(
    table: LatencyTable, capsys: pytest.CaptureFixture[str]
) -> None:
    save(table, "a.json")
    odd = list(table.entries)[3]
    slower = {
        key: replace(e, latency_us=e.latency_us * (8.0 if key == odd else 2.0))
        for key, e in table.entries.items()
    }
    save(replace(foreign(table), entries=slower), "b.json")
    assert run("diff", "a.json", "b.json") == 0
    text = capsys.readouterr().out
    assert "cpu is Another processor instead of" in text
    assert f"{odd[0]}: second takes 2.000 times as long" in text
    assert next(line for line in text.splitlines() if odd[1] in line).lstrip().startswith("8.00x")
    assert run("diff", "a.json", "a.json", "--json") == 0
    assert json.loads(capsys.readouterr().out)["differences"] == []


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["show", "absent"], "none is shipped"),
        (["show", "runs/absent"], "no latency table at runs/absent"),
        (["check"], "runs/quickstart"),
        (["check", "other.json"], "instead of Another processor"),
        (["diff", "good.json", "half.json"], "half.json is not a latency table: it is truncated"),
        (["--measurements", "9"], "--measurements belongs to --from"),
        (["--device", "good.json", "--from", "other.json"], "give one of the two"),
        (["--from", "absent"], "none is shipped"),
        (["--device", "absent"], "none is shipped"),
        (["--device", "good.json", "--threads", "1"], "leave --backend and --threads off"),
        (["--backend", "eagr", "--out", "o"], "did you mean 'eager'"),
        (["--threads", "9999", "--out", "o"], "num_threads=9999"),
        (["lst"], "no config file 'lst'"),
    ],
)
def test_a_mistake_is_one_sentence(
    words: list[str], sentence: str, table: LatencyTable, capsys: pytest.CaptureFixture[str]
) -> None:
    save(foreign(table), "other.json")
    save(table, "good.json")
    Path("half.json").write_text(Path("good.json").read_text()[:500])
    assert run(*words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1 and sentence in captured.err


def found(ratio: float, reliable: bool = True) -> TableCheck:
    ratios = Ratios.of([ratio] * 5)
    return TableCheck(ratios, ratios, 1.25, (("prefill_b1_t64", "ffn/x", ratio),), reliable)


@pytest.mark.parametrize("words", [["check", "runs/mine"], ["runs/mine", "--check"]])
@pytest.mark.parametrize(
    ("result", "code", "verdict"),
    [
        (found(1.01), 0, "the table still holds: 100 % of 5 sub-blocks"),
        (found(1.4), 1, "the table no longer holds: sub-blocks take 1.40 times"),
        (found(1.0, reliable=False), 1, "it cannot be said"),
    ],
)
def test_check_prints_a_verdict_and_returns_it(
    words: list[str],
    result: TableCheck,
    code: int,
    verdict: str,
    table: LatencyTable,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save(table, "runs/mine/latency_table.json")
    monkeypatch.setattr(profile_command, "check_table", lambda table, **_: result)
    monkeypatch.setattr(profile_command, "busy_here", lambda backend: "it is busy here")
    assert run(*words) == code
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[-1].startswith(verdict)
    assert "clock now runs at 0.80 times" in captured.out and "ffn/x" in captured.out
    assert "warning: it is busy here" in captured.err
    assert run(*words, "--json", "--quiet") == code
    captured = capsys.readouterr()
    facts = json.loads(captured.out)
    assert facts["holds"] is (code == 0) and facts["busy"] == "it is busy here"
    assert captured.err == ""


@pytest.mark.usefixtures("made")
def test_a_second_profiler_of_the_folder_is_refused(
    config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    held, let_go = threading.Event(), threading.Event()

    def hold() -> None:
        with one_profiler(Path("out/latency_table.json")):
            held.set()
            let_go.wait(30)

    other = threading.Thread(target=hold)
    other.start()
    assert held.wait(30)
    try:
        assert run(config, "--out", "out", "--quiet") == 2
    finally:
        let_go.set()
        other.join()
    assert "another profiler (pid" in capsys.readouterr().err
    assert not Path("out/measured").exists()


def test_a_finished_table_of_this_device_is_used_instead_of_measuring(
    table: LatencyTable, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    library.ship(save(table, "t.json"), "here-1t")
    assert run(config, "--out", "out", "--device", "here-1t", "--json", "--quiet") == 0
    assert json.loads(capsys.readouterr().out) == {"stage": "profile", "folder": "out"}
    taken = LatencyTable.load(Path("out/latency_table.json"))
    assert taken.entries == table.entries


@pytest.mark.usefixtures("made")
def test_a_table_of_another_device_is_not_taken_as_it_is(
    table: LatencyTable, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save(foreign(table), "t.json")
    assert run(config, "--out", "out", "--device", "t.json", "--quiet") == 2
    assert "instead of Another processor" in capsys.readouterr().err
    assert not Path("out").exists(), "refused before anything is written"


@pytest.mark.usefixtures("made")
def test_a_table_of_another_device_is_transferred(
    table: LatencyTable,
    config: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: dict[str, Any] = {}

    def transfer(source: LatencyTable, space: Any, workloads: Any, path: Path, **more: Any) -> Any:
        seen.update(more, source=source.device.cpu, path=path, workloads=workloads)
        return table

    monkeypatch.setattr(profile_command, "transfer", transfer)
    monkeypatch.setattr(profile_command, "busy_here", lambda backend: "it is busy here")
    save(foreign(table), "t.json")
    options = ["--from", "t.json", "--measurements", "12", "--threads", "1"]
    assert run(config, "--out", "out", *options) == 0
    assert seen["source"] == "Another processor"
    assert seen["path"] == Path("out/latency_table.json")
    assert (seen["num_measurements"], seen["num_threads"], seen["backend"]) == (12, 1, "eager")
    said = " ".join(capsys.readouterr().err.split())
    assert "warning: it is busy here" in said and "`nas profile` measures the rest" in said
    assert not Path("out/measured").exists()


def test_options_reach_the_config(
    made: list[ExperimentConfig], config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--backend", "eager", "--threads", "3", "--realtime"]
    assert run(config, "--out", "out", *options) == 0
    profile = made[0].profile
    assert (profile.backend, profile.num_threads, profile.realtime) == ("eager", 3, True)
    assert capsys.readouterr().out == "profile done: out\n"
    assert Path("out/measured").exists()
    assert run(config, "--out", "plain") == 0
    profile = made[1].profile
    assert (profile.backend, profile.num_threads, profile.realtime) == ("eager", None, False)


def test_the_device_decides_threads_and_backend(
    made: list[ExperimentConfig],
    table: LatencyTable,
    config: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    library.ship(save(table, "t.json"), "here-1t")
    for usable, threads in ((4, 1), (1, None)):
        monkeypatch.setattr(profile_command, "usable_processors", lambda usable=usable: usable)
        assert run(config, "--out", "out", "--device", table.device.id, "--quiet") == 0
        assert (made[-1].profile.backend, made[-1].profile.num_threads) == ("eager", threads)
    assert LatencyTable.load(Path("out/latency_table.json")).device == Device.current()


def test_columns_are_aligned() -> None:
    assert aligned([("a", "bb", "c"), ("aaa", "b", "")]) == ["a    bb  c", "aaa  b"]
