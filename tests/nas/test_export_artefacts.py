"""The sweep over presets and formats: what is recorded, and how it goes on."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest

from nas.export import EXPORTERS, ExportFailed
from nas.export.huggingface import HuggingFaceExporter
from nas.progress import Reporter
from searchspace.errors import UserError
from tests.benchmarks._artefact_records import Record, Writer, read_records, summary, table_text
from tests.benchmarks.artefacts import FP32, Sweep

PLACE = ("decoder-tiny", "fp32", 0)
FOUND = Record(*PLACE, 0, "onnx", "aa", "written", "", True, 1e-6, 1e-7, 2.0, 100)


def test_a_line_that_was_broken_off_is_written_again(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    Writer(path).add(FOUND)
    Writer(path).add(replace(FOUND, index=1))
    path.write_bytes(path.read_bytes()[:-5])
    assert read_records(path) == [FOUND]
    Writer(path).add(replace(FOUND, index=2))
    assert [record.index for record in read_records(path)] == [0, 2]
    path.write_text('{"loss": 1}\n')
    with pytest.raises(UserError, match="give another --into"):
        read_records(path)


def test_reasons_that_differ_in_numbers_are_counted_together() -> None:
    records = [
        Record(*PLACE, i, "onnx", arch, "failed", f"onnx of {arch} differs: logits differ by {by}")
        for i, (arch, by) in enumerate((("0a", 1.2e-05), ("0b", 0.3)))
    ]
    (row,) = summary([*records, FOUND])
    assert (row["written"], row["refused"], row["failed"]) == (1, 0, 2)
    assert row["reasons"] == {"failed: onnx of # differs: logits differ by #": 2}
    assert row["worst_difference"] == 1e-6 and row["worst_difference_rounded"] is None
    text = table_text([row])
    assert "1.0e-06" in text and "2 failed: onnx of #" in text


def test_what_stands_there_is_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = Namespace(
        archs=1, presets=["decoder-tiny"], formats=["hf", "padded"], seed=0, fp32=True,
        into=tmp_path / "records.jsonl",
    )  # fmt: skip

    def fails(*_: object) -> None:
        raise ExportFailed("disk full")

    monkeypatch.setattr(HuggingFaceExporter, "write", fails)
    first = Sweep(arguments).run(Reporter(quiet=True))
    found = {record.format: record for record in first}
    assert found["supernet"].status == "written" and found["supernet"].variant == FP32
    assert found["hf"].reason == "ExportFailed: disk full" and found["hf"].exact
    assert found["padded"].status == "refused" and found["padded"].reason
    monkeypatch.setattr(Sweep, "preset", fails)
    assert Sweep(arguments).run(Reporter(quiet=True)) == first
    lines = arguments.into.read_text().splitlines()
    assert [json.loads(line)["format"] for line in lines] == ["supernet", "hf", "padded"]
    assert set(found) - {"supernet"} <= set(EXPORTERS)
