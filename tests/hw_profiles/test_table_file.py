"""What happens to a table's file on its way does not go unnoticed."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hw_profiles.latency_table import Correction, Entry, LatencyTable
from hw_profiles.latency_table.file import CHECKSUM, VERSION, checksum
from hw_profiles.workload import decode, prefill
from searchspace.errors import UserError
from searchspace.space import SearchSpace
from tests.hw_profiles.test_device import DEVICE

WORKLOADS = (prefill(1, 16), decode(1, 16))


def small_table() -> LatencyTable:
    entries = {
        (workload.name, key): Entry(0.1 + index, 100.0 + index, 0.01, 12, 0.9, True, "X", time)
        for workload in WORKLOADS
        for index, (key, time) in enumerate([("a", "2026-01-01T00:00:00"), ("b/c", "2026-02-03")])
    }
    corrections = {WORKLOADS[0].name: Correction(1.1, mape=2.0, error_90=0.04, num_networks=12)}
    spaces = (SearchSpace.load("decoder-tiny", 64),)
    return LatencyTable(DEVICE, WORKLOADS, 1000.0, entries, corrections, spaces)


TABLE = small_table()


@pytest.fixture(scope="module", params=["t.json", "t.json.gz"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tables") / str(request.param)
    TABLE.save(path, keep_others=False)
    return path


def is_equal_or_refused(path: Path) -> None:
    try:
        found = LatencyTable.load(path)
    except UserError as error:
        assert path.name in str(error)
        assert "nas profile" in str(error)
        assert "\n" not in str(error)
        return
    assert found == TABLE


SETTINGS = settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@SETTINGS
@given(share=st.floats(0, 1, exclude_max=True))
def test_truncated_files_are_refused(share: float, saved: Path, tmp_path: Path) -> None:
    content = saved.read_bytes()
    path = tmp_path / saved.name
    path.write_bytes(content[: int(share * len(content))])
    is_equal_or_refused(path)


@SETTINGS
@given(seed=st.integers(0, 2**32), num=st.integers(1, 4), bits=st.integers(1, 255))
def test_flipped_bytes_are_noticed(
    seed: int, num: int, bits: int, saved: Path, tmp_path: Path
) -> None:
    rng, content = random.Random(seed), bytearray(saved.read_bytes())
    for _ in range(num):
        content[rng.randrange(len(content))] ^= bits
    path = tmp_path / saved.name
    path.write_bytes(content)
    is_equal_or_refused(path)


@SETTINGS
@given(seed=st.integers(0, 2**32), num=st.integers(1, 400))
def test_lost_and_doubled_parts_are_noticed(
    seed: int, num: int, saved: Path, tmp_path: Path
) -> None:
    rng, content = random.Random(seed), saved.read_bytes()
    at, to = rng.randrange(len(content)), rng.randrange(len(content))
    path = tmp_path / saved.name
    path.write_bytes(content[:at] + content[to : to + num] + content[at + num :])
    is_equal_or_refused(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)
PARTS = sorted({**TABLE.to_dict(), "format": "", "version": 0})


@SETTINGS
@given(name=st.sampled_from(PARTS), inside=st.booleans(), value=JSON)
def test_a_wrong_part_with_the_right_checksum_is_refused(
    name: str, inside: bool, value: object, tmp_path: Path
) -> None:
    TABLE.save(tmp_path / "t.json", keep_others=False)
    values = json.loads((tmp_path / "t.json").read_text())
    part = values[name]
    if inside and isinstance(part, dict) and part:
        part[sorted(part)[0]] = value
    else:
        values[name] = value
    values[CHECKSUM] = checksum(values)
    (tmp_path / "t.json").write_text(json.dumps(values))
    try:
        LatencyTable.load(tmp_path / "t.json")
    except UserError as error:
        assert "t.json" in str(error)
        assert "nas profile" in str(error)


def test_a_file_says_what_it_is_without_a_reader(saved: Path) -> None:
    content = saved.read_bytes()
    text = gzip.decompress(content) if saved.suffix == ".gz" else content
    values = json.loads(text)
    assert values["version"] == VERSION
    assert values["measured_on"] == "Some Xeon, 2 threads, eager, torch 2.13.0+cpu"
    assert values["measured_at"] == "2026-02-03"
    assert values["spaces"][0]["name"] == "decoder-tiny"
    assert LatencyTable.load(saved) == TABLE
    assert LatencyTable.load(saved).spaces == TABLE.spaces


def test_the_same_table_is_the_same_file(saved: Path, tmp_path: Path) -> None:
    again = tmp_path / saved.name
    LatencyTable.load(saved).save(again)
    assert again.read_bytes() == saved.read_bytes()


def test_one_changed_digit_is_a_damaged_table(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    TABLE.save(path, keep_others=False)
    text = path.read_text()
    path.write_text(text.replace('"latency_us": 101.0', '"latency_us": 107.0'))
    with pytest.raises(UserError, match=r"damaged.*checksum differs.*delete it"):
        LatencyTable.load(path)
    path.write_text(json.dumps(json.loads(text)))
    assert LatencyTable.load(path) == TABLE, "the layout of the file does not count"


@pytest.mark.parametrize("version", [1, 2, VERSION + 1, None, "3"])
def test_other_versions_are_refused_with_what_to_do(version: object, tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    TABLE.save(path, keep_others=False)
    values = {**json.loads(path.read_text()), "version": version}
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match=rf"of version {version}.*reads version {VERSION}; delete"):
        LatencyTable.load(path)


def test_folders_and_unreadable_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(UserError, match="directory"):
        LatencyTable.load(tmp_path / "folder.json")
    with pytest.raises(UserError, match=r"no latency table at .*absent"):
        LatencyTable.load(tmp_path / "absent.json")
