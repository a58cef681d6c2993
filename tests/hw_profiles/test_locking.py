"""Locks and merging between real processes."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from hw_profiles.latency_table import Correction, Entry, LatencyTable, locking
from hw_profiles.latency_table.locking import file_lock, one_profiler
from hw_profiles.workload import decode, prefill
from searchspace.errors import UserError
from tests.hw_profiles.test_device import DEVICE

CONTEXT = multiprocessing.get_context("fork")
WORKLOAD = prefill(1, 16)


def entry(latency_us: float, second: int = 0, source: str = "measured") -> Entry:
    time = f"2026-01-01T00:00:{second:02d}+00:00"
    return Entry(latency_us / 1000, latency_us, 0.01, 12, 0.9, True, "X", time, source)


def table(sentinel_us: float = 1000.0, **entries: Entry) -> LatencyTable:
    by_key = {(WORKLOAD.name, key): value for key, value in entries.items()}
    return LatencyTable(DEVICE, (WORKLOAD,), sentinel_us, by_key)


def keys(found: LatencyTable) -> set[str]:
    return {key for _, key in found.entries}


@pytest.fixture(params=["kernel", "second file"])
def kind_of_lock(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run with the kernel's locks, and as on a file system that has none."""
    if request.param == "second file":

        def cannot(*_: object) -> None:
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(fcntl, "flock", cannot)
    return str(request.param)


@pytest.fixture
def start() -> Iterator[Callable[..., multiprocessing.process.BaseProcess]]:
    started: list[multiprocessing.process.BaseProcess] = []

    def run(function: Callable[..., None], *arguments: object) -> object:
        process = CONTEXT.Process(target=function, args=arguments)
        process.start()
        started.append(process)
        return process

    yield run  # type: ignore[misc]
    for process in started:
        process.kill()
        process.join()


def hold(path: Path, lock: object, held: object, let_go: object) -> None:
    with lock(path):  # type: ignore[operator]
        held.set()  # type: ignore[attr-defined]
        let_go.wait(30)  # type: ignore[attr-defined]


@pytest.mark.usefixtures("kind_of_lock")
def test_a_second_profiler_is_refused_until_the_first_is_done(
    tmp_path: Path, start: object
) -> None:
    path, held, let_go = tmp_path / "run" / "table.json", CONTEXT.Event(), CONTEXT.Event()
    other = start(hold, path, one_profiler, held, let_go)  # type: ignore[operator]
    assert held.wait(30)
    with (
        pytest.raises(UserError, match=rf"another profiler \(pid {other.pid}\).*wait for it"),
        one_profiler(path),
    ):
        pytest.fail("two profilers at once")
    with one_profiler(tmp_path / "other.json"):
        pass
    let_go.set()
    other.join()
    with one_profiler(path):
        pass
    assert not list(path.parent.iterdir())


@pytest.mark.usefixtures("kind_of_lock")
def test_what_a_killed_process_held_is_free_again(tmp_path: Path, start: object) -> None:
    path, held, let_go = tmp_path / "table.json", CONTEXT.Event(), CONTEXT.Event()
    other = start(hold, path, one_profiler, held, let_go)  # type: ignore[operator]
    assert held.wait(30)
    other.kill()
    other.join()
    for _ in range(2):  # the first try may only find out that the owner is gone
        try:
            with one_profiler(path):
                break
        except UserError:
            continue
    else:
        pytest.fail("the lock of a killed process stays")
    assert not list(tmp_path.iterdir())


def test_one_process_may_nest_but_its_threads_may_not(tmp_path: Path) -> None:
    path, refused = tmp_path / "table.json", []

    def try_it() -> None:
        try:
            with one_profiler(path):
                pass
        except UserError as error:
            refused.append(str(error))

    with one_profiler(path), one_profiler(path):
        thread = threading.Thread(target=try_it)
        thread.start()
        thread.join()
    assert f"pid {os.getpid()}" in refused[0]
    assert not list(tmp_path.iterdir())


def test_a_writer_that_waits_too_long_says_for_whom(tmp_path: Path, start: object) -> None:
    path, held, let_go = tmp_path / "table.json", CONTEXT.Event(), CONTEXT.Event()
    other = start(hold, path, file_lock, held, let_go)  # type: ignore[operator]
    assert held.wait(30)
    with (
        pytest.raises(UserError, match=rf"pid {other.pid}.*has been writing.*0\.05 s"),
        file_lock(path, wait_s=0.05),
    ):
        pytest.fail("two writers at once")


def test_folders_that_cannot_be_written_to_are_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"), one_profiler(tmp_path / "file" / "t.json"):
        pytest.fail("locked without a file")


def count_up(path: Path, rounds: int, barrier: object) -> None:
    barrier.wait(30)  # type: ignore[attr-defined]
    for _ in range(rounds):
        with file_lock(path):
            value = int(path.read_text())
            path.write_text(str(value + 1))


@pytest.mark.usefixtures("kind_of_lock")
def test_only_one_process_is_in_the_block(
    tmp_path: Path, start: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locking, "POLL_S", 0.0005)
    path, barrier = tmp_path / "count", CONTEXT.Barrier(3)
    path.write_text("0")
    processes = [start(count_up, path, 25, barrier) for _ in range(3)]  # type: ignore[operator]
    for process in processes:
        process.join()
    assert path.read_text() == "75"
    assert [item.name for item in tmp_path.iterdir()] == ["count"]


def fill(path: Path, name: str, num: int, barrier: object) -> None:
    mine = table(2000.0 if name == "b" else 1000.0)
    barrier.wait(30)  # type: ignore[attr-defined]
    for index in range(num):
        mine.entries[WORKLOAD.name, f"{name}{index}"] = entry(100.0 + index)
        mine.save(path)


def test_two_profilers_at_once_lose_nothing(tmp_path: Path, start: object) -> None:
    path, barrier = tmp_path / "table.json", CONTEXT.Barrier(2)
    processes = [start(fill, path, name, 12, barrier) for name in "ab"]  # type: ignore[operator]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    found = LatencyTable.load(path)
    assert keys(found) == {f"{name}{index}" for name in "ab" for index in range(12)}
    for (_, key), value in found.entries.items():
        # All are stated for the speed of the table that was written last.
        own = 2000.0 if key[0] == "b" else 1000.0
        expected = (100.0 + int(key[1:])) * found.sentinel_us / own
        assert value.latency_us == pytest.approx(expected)
    assert [item.name for item in tmp_path.iterdir()] == ["table.json"]


def test_merging_keeps_the_newer_and_the_measured(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    table(
        old=entry(1.0, 1), new=entry(2.0, 9), prior=entry(3.0, 9, "prior"), theirs=entry(4.0)
    ).save(path)
    mine = table(old=entry(10.0, 5), new=entry(20.0, 5), prior=entry(30.0, 5), mine=entry(40.0))
    mine.save(path)
    expected = {"old": 10.0, "new": 2.0, "prior": 30.0, "theirs": 4.0, "mine": 40.0}
    for found in (mine, LatencyTable.load(path)):
        assert {key: e.latency_us for (_, key), e in found.entries.items()} == expected


def test_merging_keeps_my_corrections_and_adds_workloads(tmp_path: Path) -> None:
    path, other = tmp_path / "table.json", decode(1, 16)
    theirs = table(a=entry(1.0))
    theirs.workloads = (other, WORKLOAD)
    theirs.corrections = {
        name: Correction(scale=3.0, mape=1.0) for name in (WORKLOAD.name, other.name)
    }
    theirs.save(path)
    mine = table(b=entry(1.0))
    mine.corrections = {WORKLOAD.name: Correction(scale=2.0, mape=1.0)}
    mine.save(path)
    found = LatencyTable.load(path)
    assert found.workloads == (WORKLOAD, other)
    assert found.corrections[WORKLOAD.name].scale == 2.0
    assert found.corrections[other.name].scale == 3.0
    faster = table(500.0, c=entry(1.0))
    faster.save(path)
    assert not faster.corrections, "fitted for latencies at another speed"


def test_another_device_and_a_damaged_file_are_replaced(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    other = table(theirs=entry(1.0))
    other.device = replace(DEVICE, cpu="Another")
    other.save(path)
    table(mine=entry(1.0)).save(path)
    assert keys(LatencyTable.load(path)) == {"mine"}
    path.write_text("half")
    table(mine=entry(1.0)).save(path)
    assert keys(LatencyTable.load(path)) == {"mine"}
    table(only=entry(1.0)).save(path, keep_others=False)
    assert keys(LatencyTable.load(path)) == {"only"}


def test_merged_entries_are_interpolated_anew(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    key = "ffn/gelu/d32/f{}/rmsnorm/fp32"
    mine = table(**{key.format(64): entry(100.0), key.format(128): entry(200.0)})
    assert mine.entry(WORKLOAD, key.format(96)).latency_us == pytest.approx(150.0)
    table(**{key.format(64): entry(300.0, 9)}).save(path)
    mine.save(path)
    assert mine.entry(WORKLOAD, key.format(96)).latency_us == pytest.approx(250.0)


def test_what_was_written_by_oneself_is_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, mine, reads = tmp_path / "table.json", table(a=entry(1.0)), []
    load = LatencyTable.load.__func__  # type: ignore[attr-defined]

    def counted(cls: type[LatencyTable], path: Path) -> LatencyTable:
        reads.append(path)
        return load(cls, path)  # type: ignore[no-any-return]

    monkeypatch.setattr(LatencyTable, "load", classmethod(counted))
    mine.save(path)
    mine.save(path)
    assert not reads
    table(b=entry(2.0)).save(path)
    assert len(reads) == 1
    mine.save(path)
    assert len(reads) == 2 and keys(mine) == {"a", "b"}
