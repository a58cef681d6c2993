"""Configurations that are measured once for each device; the device itself is replaced."""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from nas_kernels import tuning


class Tiles(NamedTuple):
    rows: int
    warps: int


CANDIDATES = [Tiles(16, 4), Tiles(32, 4), Tiles(64, 8)]
TIMES = {16: 3.0, 32: 1.0, 64: 2.0}


class FakeEvent:
    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = FakeEvent.now

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: FakeEvent) -> float:
        return other.at - self.at


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A device whose kernels take the times above."""
    properties = types.SimpleNamespace(name="Some GPU", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(tuning, "interpreting", lambda: False)
    real = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, device=None, **options: real(1, **options))
    monkeypatch.delenv(tuning.VARIABLE, raising=False)
    tuning.forget()
    yield properties
    tuning.forget()


class Kernel:
    """Counts launches."""

    def __init__(self, fails: tuple[int, ...] = (), error: type[Exception] = RuntimeError) -> None:
        self.launched: list[int] = []
        self.fails, self.error = fails, error

    def __call__(self, tiles: Tiles) -> None:
        if tiles.rows in self.fails:
            raise self.error("out of resource: shared memory")
        self.launched.append(tiles.rows)
        FakeEvent.now += TIMES[tiles.rows]


def test_without_a_file_it_is_the_default_and_nothing_runs(device: Any) -> None:
    kernel = Kernel()
    assert tuning.choose("op", (1, 2), CANDIDATES, kernel) is CANDIDATES[0]
    assert kernel.launched == []


def test_the_fastest_is_measured_once_and_kept(
    device: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, kernel = tmp_path / "folder" / "tuning.json", Kernel()
    monkeypatch.setenv(tuning.VARIABLE, str(path))
    assert tuning.choose("op", (1, 2), CANDIDATES, kernel) is CANDIDATES[1]
    count = len(kernel.launched)
    assert count == 3 * (2 + tuning.SAMPLES)
    assert tuning.choose("op", (1, 2), CANDIDATES, kernel) is CANDIDATES[1]
    tuning.forget()  # as another process
    assert tuning.choose("op", (1, 2), CANDIDATES, kernel) is CANDIDATES[1]
    assert len(kernel.launched) == count
    (table,) = json.loads(path.read_text()).values()
    assert table == {"op": {"1 2": {"rows": 32, "warps": 4}}}


def test_other_sizes_operations_and_devices_are_measured_apart(
    device: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, kernel = tmp_path / "tuning.json", Kernel()
    monkeypatch.setenv(tuning.VARIABLE, str(path))
    for operation, key in (("op", (1,)), ("op", (2,)), ("other", (1,))):
        tuning.choose(operation, key, CANDIDATES, kernel)
    device.name = "Another GPU"
    tuning.forget()
    tuning.choose("op", (1,), CANDIDATES, kernel)
    assert len(kernel.launched) == 4 * 3 * (2 + tuning.SAMPLES)
    found = json.loads(path.read_text())
    assert {name.split(",")[0] for name in found} == {"Some GPU", "Another GPU"}


def test_what_cannot_run_is_passed_over(
    device: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(tuning.VARIABLE, str(tmp_path / "tuning.json"))
    assert tuning.choose("op", (1,), CANDIDATES, Kernel(fails=(32,))) is CANDIDATES[2]
    assert tuning.choose("op", (2,), CANDIDATES, Kernel(fails=(16, 32, 64))) is CANDIDATES[0]
    out_of_resources = type("OutOfResources", (Exception,), {"__module__": "triton.runtime.errors"})
    kernel = Kernel(fails=(32,), error=out_of_resources)
    assert tuning.choose("op", (3,), CANDIDATES, kernel) is CANDIDATES[2]
    with pytest.raises(KeyError):
        tuning.choose("op", (4,), CANDIDATES, Kernel(fails=(16,), error=KeyError))


def test_a_stored_choice_that_is_no_candidate_any_more_is_measured_again(
    device: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(tuning.VARIABLE, str(tmp_path / "tuning.json"))
    tuning.choose("op", (1,), CANDIDATES, Kernel())
    tuning.forget()
    fewer = [CANDIDATES[0], CANDIDATES[2]]
    assert tuning.choose("op", (1,), fewer, Kernel()) is CANDIDATES[2]


def test_nothing_is_measured_while_a_graph_is_captured(
    device: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(tuning.VARIABLE, str(tmp_path / "tuning.json"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    kernel = Kernel()
    assert tuning.choose("op", (1,), CANDIDATES, kernel) is CANDIDATES[0]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert tuning.choose("op", (1,), CANDIDATES, kernel) is CANDIDATES[1]


def test_two_processes_keep_each_others_choices(
    device: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tuning.json"
    monkeypatch.setenv(tuning.VARIABLE, str(path))
    tuning.choose("op", (1,), CANDIDATES, Kernel())
    other = json.loads(path.read_text())
    (table,) = other.values()
    table["op"]["9"] = {"rows": 16, "warps": 4}
    path.write_text(json.dumps(other))
    tuning.choose("op", (2,), CANDIDATES, Kernel())
    (table,) = json.loads(path.read_text()).values()
    assert set(table["op"]) == {"1", "2", "9"}


@pytest.mark.parametrize("text", ["no json", "[1]", '{"device": 1}', '{"device": {"op": 3}}'])
def test_another_file_is_refused(
    device: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    path = tmp_path / "tuning.json"
    path.write_text(text)
    monkeypatch.setenv(tuning.VARIABLE, str(path))
    with pytest.raises(ValueError, match="is no tuning file"):
        tuning.choose("op", (1,), CANDIDATES, Kernel())
    assert path.read_text() == text


def test_whether_to_ask_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for named in (False, True):
        monkeypatch.delenv(tuning.VARIABLE, raising=False)
        if named:
            monkeypatch.setenv(tuning.VARIABLE, "tuning.json")
        tuning.forget()
        assert tuning.wanted() == named
        monkeypatch.setenv(tuning.VARIABLE, "" if named else "tuning.json")
        assert tuning.wanted() == named
    tuning.forget()


def test_nearby_sizes_share_a_key() -> None:
    key = tuning.rounded(33, 64, 0, True, "silu", torch.bfloat16)
    assert key == (64, 64, 1, True, "silu", "bfloat16")


def test_it_needs_a_candidate() -> None:
    with pytest.raises(ValueError, match="no configuration"):
        tuning.choose("op", (1,), [], lambda config: None)
