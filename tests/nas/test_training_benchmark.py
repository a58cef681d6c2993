"""The benchmark of training runs, with every way of training that this machine can have."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.benchmarks import _training_sides, training_throughput
from tests.nas.fake_graphs import FakeGraphs, fake  # noqa: F401

SMALL = ["--device", "cpu", "--preset", "decoder-tiny", "--batch-size", "2", "--tokens", "8",
         "--vocab", "32", "--precisions", "fp32", "--steps", "1", "--budget-s", "60"]  # fmt: skip


@pytest.fixture(autouse=True)
def few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_throughput, "MOST_SAMPLES", 3)


def test_rows_are_compared_with_the_plain_network(capsys: pytest.CaptureFixture[str]) -> None:
    assert training_throughput.main([*SMALL, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows: list[dict[str, Any]] = found["rows"]
    assert [row["what"] for row in rows] == ["plain", "supernet, largest", "supernet, sandwich"]
    assert [row["archs"] for row in rows] == [1, 1, 3]
    assert rows[0]["work"] == rows[1]["work"] == 1.0 and 0 < rows[2]["work"] < 1
    for row in rows:
        assert row["samples"] == 3 and row["mode"] == "off"
        assert row["tokens_s"] == pytest.approx(16 * row["archs"] / row["step_ms"] * 1e3)
        assert row["to_plain"] == row["to_plain_off"] == row["tokens_s"] / rows[0]["tokens_s"]
    assert found["torch"] and found["date"]


def test_graphs_are_replayed_on_both_sides(
    fake: FakeGraphs,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_training_sides, "compile_mode", lambda config, device: config.compile)
    assert training_throughput.main([*SMALL, "--modes", "graphs"]) == 0
    assert fake.captured == 4  # the plain network, the largest alone, the largest and the smallest
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 1 + 3 and all(" graphs " in line for line in lines[3:])
    assert all(line.split()[-2] == "-" for line in lines[3:])
    assert training_throughput.main([*SMALL, "--modes", "off", "graphs", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    for off, graphs in zip(rows[:3], rows[3:], strict=True):
        assert off["losses"] == graphs["losses"] and len(off["losses"]) == 4


def test_a_device_that_is_not_there_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert training_throughput.main([*SMALL, "--device", "cuda"]) == 2
    assert "train.device='cuda' needs an NVIDIA GPU" in capsys.readouterr().err
