"""Finding, listing, describing, comparing, shipping and adopting tables."""

from __future__ import annotations

import json
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from hw_profiles import library
from hw_profiles.latency_table import Entry, LatencyTable
from hw_profiles.latency_table.correction import Correction
from hw_profiles.library import TABLES, adopt, find, list_tables, ship, shipped_tables
from hw_profiles.library.comparison import Ratios, compare
from hw_profiles.library.description import describe
from hw_profiles.workload import decode, prefill
from searchspace.errors import UserError
from searchspace.space import SearchSpace
from tests.hw_profiles.test_device import DEVICE

WORKLOADS = (prefill(1, 16), decode(1, 16))
OTHER = replace(DEVICE, cpu="Another processor", num_threads=4)


def entry(latency_us: float, **changes: object) -> Entry:
    plain = Entry(latency_us / 1000, latency_us, 0.01, 12, 0.9, True, "X", "2026-01-02T03:04:05")
    return replace(plain, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def space() -> SearchSpace:
    return SearchSpace.load("decoder-tiny", 64)


@pytest.fixture
def table(space: SearchSpace) -> LatencyTable:
    entries = {
        (workload.name, spec.key): entry(100.0 + index)
        for workload in WORKLOADS
        for index, spec in enumerate(space.sub_blocks())
    }
    fits = {item.name: Correction(1.1, mape=2.0, num_networks=24) for item in WORKLOADS}
    return LatencyTable(DEVICE, WORKLOADS, 1000.0, entries, fits, (space,))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ship into, and run in, folders of the test."""
    (tmp_path / "shipped").mkdir()
    monkeypatch.setattr(library, "TABLES", tmp_path / "shipped")
    monkeypatch.chdir(tmp_path)


def test_what_is_shipped_can_be_used() -> None:
    assert (TABLES / "README.md").is_file()
    for name, path in shipped_tables(TABLES).items():
        assert library.NAME.fullmatch(name)
        found = LatencyTable.load(path)
        assert found.spaces and found.entries
        assert not list(library._faults(found))
        assert socket.gethostname() not in json.dumps(found.to_dict())


def test_tables_are_found_by_name_device_run_and_path(table: LatencyTable, tmp_path: Path) -> None:
    shipped = ship(save(table, tmp_path / "t.json"), "some-xeon-2t")
    assert shipped.name == "some-xeon-2t.json.gz"
    run = save(table, tmp_path / "runs" / "mine" / "latency_table.json")
    assert find("some-xeon-2t") == shipped
    assert find(DEVICE.id) == shipped
    for name in ("mine", "runs/mine", run, str(run)):
        assert find(name).resolve() == run
    with pytest.raises(UserError, match="did you mean 'some-xeon-2t'"):
        find("some-xeon-4t")
    with pytest.raises(UserError, match="no latency table at runs/absent"):
        find("runs/absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty holds no latency table; run `nas profile`"):
        find("empty")
    ship("mine", "the-same-again")
    with pytest.raises(UserError, match="choose some-xeon-2t or the-same-again"):
        find(DEVICE.id)


def test_without_shipped_tables_a_name_says_so() -> None:
    with pytest.raises(UserError, match="none is shipped"):
        find("some-xeon")


def test_the_list_has_shipped_tables_runs_and_what_is_unusable(
    table: LatencyTable, tmp_path: Path
) -> None:
    assert list_tables() == []
    ship(save(table, tmp_path / "t.json"), "xeon")
    save(table, tmp_path / "runs" / "mine" / "latency_table.json")
    damaged = tmp_path / "runs" / "old" / "latency_table.json"
    damaged.parent.mkdir()
    damaged.write_text('{"format": "hwnas-latency-table", "version": 1}')
    first, second, third = (listed.summary() for listed in list_tables())
    expected = {
        "device": "Some Xeon", "backend": "eager", "num_threads": 2, "spaces": ["decoder-tiny"],
        "num_entries": len(table.entries), "measured_at": "2026-01-02T03:04:05", "problem": "",
    }  # fmt: skip
    assert (first["name"], first["shipped"]) == ("xeon", True)
    assert (second["name"], second["shipped"]) == ("runs/mine", False)
    for summary in (first, second):
        assert expected.items() <= summary.items()
    assert "version 1" in third["problem"]
    json.dumps([first, second, third], allow_nan=False)


def save(table: LatencyTable, path: Path) -> Path:
    table.save(path)
    return path


def test_a_shipped_table_is_the_same_table(table: LatencyTable, tmp_path: Path) -> None:
    found = LatencyTable.load(ship(save(table, tmp_path / "t.json"), "xeon"))
    assert found.entries == table.entries
    assert found.corrections.keys() == table.corrections.keys()
    assert found.spaces == table.spaces


def test_only_good_tables_are_shipped(table: LatencyTable, tmp_path: Path) -> None:
    path, key = save(table, tmp_path / "good.json"), next(iter(table.entries))
    for name in ("", "Xeon", "a_b", "-a", "../a"):
        with pytest.raises(UserError, match="table name"):
            ship(path, name)
    faulty = {
        "search space": {"spaces": ()},
        "1 entries were not measured": {
            "entries": {**table.entries, key: entry(1.0, source="transferred")}
        },
        "entries were disturbed": {
            "entries": {name: entry(1.0, reliable=False) for name in table.entries}
        },
        "error of nan": {"corrections": {}},
        "error of 30.0 %": {
            "corrections": {**table.corrections, WORKLOADS[1].name: Correction(mape=30.0)}
        },
    }
    for index, (message, changes) in enumerate(faulty.items()):
        bad = save(replace(table, **changes), tmp_path / f"{index}.json")  # type: ignore[arg-type]
        with pytest.raises(UserError, match=message):
            ship(bad, "xeon")
    assert not list((tmp_path / "shipped").iterdir())


def test_a_description_counts_and_names(table: LatencyTable) -> None:
    name = WORKLOADS[0].name
    keys = [key for workload, key in table.entries if workload == name]
    table.entries[name, keys[0]] = entry(5.0, source="prior", measured_at="2025-12-31T00:00:00")
    table.entries[name, keys[1]] = entry(900.0, reliable=False, kept_fraction=0.2)
    del table.corrections[WORKLOADS[1].name]
    facts = describe(table)
    json.dumps(facts, allow_nan=False)
    first, second = (facts["workloads"][item.name] for item in WORKLOADS)
    assert first["sources"] == {"prior": 1, "measured": len(keys) - 1}
    assert first["largest"][0] == {"key": keys[1], "latency_us": 900.0}
    latencies = [item["latency_us"] for item in first["largest"]]
    assert latencies == sorted(latencies, reverse=True) and len(latencies) == 5
    assert [item["key"] for item in first["unreliable"]] == [keys[1]]
    assert first["correction"]["mape"] == 2.0
    assert second["correction"] is None
    assert facts["first_measured_at"] == "2025-12-31T00:00:00"
    assert facts["spaces"] == [{"name": "decoder-tiny", "vocab_size": 64}]
    assert facts["device_id"] == DEVICE.id


def test_ratios_of_a_few_values() -> None:
    found = Ratios.of([1.0, 1.2, 0.95, 1.05, 0.8])
    assert (found.num, found.median) == (5, 1.0)
    assert found.spread == pytest.approx(0.05)
    assert found.near_pct == pytest.approx(60.0)
    assert found.is_near
    # Twice as long is as far off as half as long.
    assert Ratios.of([1 / 1.2, 1.2], 20.1).near_pct == 100.0
    assert Ratios.of([1 / 1.2, 1.2], 19.9).near_pct == 0.0
    assert not Ratios.of([1.2]).is_near


def test_a_comparison_finds_what_differs(table: LatencyTable) -> None:
    odd = list(table.entries)[7]
    slower = {
        key: replace(e, latency_us=e.latency_us * (9.0 if key == odd else 1.5))
        for key, e in list(table.entries.items())[3:]
    }
    second = replace(table, device=OTHER, entries={**slower, ("prefill_b1_t99", "x"): entry(1.0)})
    found = compare(table, second)
    assert found.ratios[odd[0]].median == pytest.approx(1.5)
    assert found.ratios[odd[0]].spread == pytest.approx(0.0, abs=1e-9)
    expected = (*odd, table.entries[odd].latency_us, slower[odd].latency_us)
    assert found.furthest[0] == expected
    assert len(found.furthest) == 10
    assert (found.only_first, found.only_second) == (3, 1)
    assert "num threads is 4 instead of 2" in found.differences
    assert any("Another processor" in sentence for sentence in found.differences)
    back = compare(second, table)
    assert back.ratios[odd[0]].median == pytest.approx(1 / 1.5)
    same = compare(table, table)
    assert same.differences == () and same.ratios[odd[0]].near_pct == 100.0


def test_tables_without_a_common_entry_are_not_compared(table: LatencyTable) -> None:
    with pytest.raises(UserError, match="no entry in common"):
        compare(table, replace(table, entries={("prefill_b1_t99", "x"): entry(1.0)}))


def test_a_table_of_this_device_is_adopted_once(table: LatencyTable, tmp_path: Path) -> None:
    source, path = save(table, tmp_path / "t.json"), tmp_path / "run" / "latency_table.json"
    for _ in range(2):
        taken = adopt(source, path, replace(DEVICE, memory_gib=1.0))
        assert taken.entries == table.entries
    with pytest.raises(UserError, match="already there and of device"):
        adopt(save(replace(table, device=OTHER), tmp_path / "o.json"), path, OTHER)


def test_a_table_of_another_device_is_refused(table: LatencyTable, tmp_path: Path) -> None:
    source, path = save(table, tmp_path / "t.json"), tmp_path / "run" / "latency_table.json"
    with pytest.raises(UserError, match=r"num threads is 4 instead of 2.*--from"):
        adopt(source, path, OTHER)
    assert not path.exists()
