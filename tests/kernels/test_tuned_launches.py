"""Every launcher asks what to run with, and whatever the answer, its results are right."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nas_kernels import tuning
from nas_kernels.dispatch import triton_available
from tests.kernels.comparison import DEVICE, compare_with_float64
from tests.kernels.tuned_cases import BF16, FP32, Case, cases

pytestmark = pytest.mark.skipif(not triton_available(), reason="triton is not installed")

BOUNDS = {FP32: 2e-3 if DEVICE.type == "cuda" else 1e-5, BF16: 2e-2}
FAST_CANDIDATES = 2
CASES = cases() if triton_available() else []


class Answers:
    """Stands for `tuning.choose`: answers with the candidates of one number, and keeps record."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.candidates: dict[str, int] = {}

    def __call__(
        self, operation: str, key: tuple[Any, ...], candidates: Any, run: Callable[[Any], Any]
    ) -> Any:
        distinct = list(dict.fromkeys(candidates))
        assert all(isinstance(part, int | str) for part in key)
        assert len(set(key)) > 1
        self.candidates.setdefault(operation, len(distinct))
        answer = distinct[self.number % len(distinct)]
        if self.number == 0:
            # What was measured may leave no trace.
            run(distinct[-1])
        return answer


def check(case: Case, number: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Run a case with one of the candidates; return how many there were."""
    answers = Answers(number)
    monkeypatch.setattr(tuning, "wanted", lambda: True)
    monkeypatch.setattr(tuning, "choose", answers)
    compare_with_float64(case.run, case.exact, case.inputs, BOUNDS[case.dtype])
    return answers.candidates


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_launchers_ask(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    found = check(case, 0, monkeypatch)
    assert tuple(found) == case.asked
    assert all(4 <= count <= 9 for count in found.values()), found
    for number in range(1, FAST_CANDIDATES):
        check(case, number, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_candidate_is_right(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    most = max(check(case, 1, monkeypatch).values())
    for number in range(2, most):
        check(case, number, monkeypatch)


def one_of_each() -> list[Case]:
    """Return one case of every operation."""
    return list({case.asked: case for case in CASES}.values())


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What is measured, on a device that is not there: the last candidate is always fastest."""
    operations = []

    def fastest(operation: str, name: str, candidates: Any, run: Callable[[Any], Any]) -> int:
        operations.append(operation)
        run(candidates[-1])
        return len(candidates) - 1

    monkeypatch.setenv(tuning.VARIABLE, str(tmp_path / "tuning.json"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(tuning, "interpreting", lambda: False)
    monkeypatch.setattr(tuning, "_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(tuning, "_fastest", fastest)
    tuning.forget()
    yield operations
    monkeypatch.undo()
    tuning.forget()


@pytest.mark.skipif(DEVICE.type == "cuda", reason="replaces the device")
def test_every_operation_is_measured_once_and_kept(measured: list[str], tmp_path: Path) -> None:
    for case in one_of_each():
        compare_with_float64(case.run, case.exact, case.inputs, BOUNDS[case.dtype])
    asked = {name for case in CASES for name in case.asked}
    assert set(measured) == asked
    (table,) = json.loads((tmp_path / "tuning.json").read_text()).values()
    assert set(table) == asked
    measured.clear()
    tuning.forget()  # as another process
    for case in one_of_each():
        compare_with_float64(case.run, case.exact, case.inputs, BOUNDS[case.dtype])
    assert measured == []


def test_nothing_is_asked_unless_a_file_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("asked")

    monkeypatch.setattr(tuning, "choose", refuse)
    monkeypatch.delenv(tuning.VARIABLE, raising=False)
    tuning.forget()
    for case in one_of_each():
        case.run(*case.inputs)
