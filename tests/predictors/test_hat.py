"""The reader of the HAT latency sets, on files made here and on the real ones if they are given."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from predictors.benchmarks.hat import FEATURES, MEASURED, read_hat_set, read_hat_sets
from searchspace.errors import UserError

HEADER = ",".join((*FEATURES, *MEASURED))


def _write(path: Path, rows: list[list[float]], header: str = HEADER) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n")
    return path


def _row(number: int) -> list[float]:
    return [*(100.0 * number + column for column in range(10)), 5.0, 70.0 + number, 0.1, 0.2]


def test_reads_columns_by_name_in_row_order(tmp_path: Path) -> None:
    header = ",".join((*MEASURED, "comment", *FEATURES))
    rows = [[*_row(i)[10:], 7.0, *_row(i)[:10]] for i in range(3)]
    found = read_hat_set(_write(tmp_path / "a_gpu_b_all.csv", rows, header))
    assert found.name == "a_gpu_b"
    np.testing.assert_array_equal(found.X, [_row(i)[:10] for i in range(3)])
    np.testing.assert_array_equal(found.latency_ms, [75.0, 76.0, 77.0])
    np.testing.assert_array_equal(found.encoder_std_ms, [0.1] * 3)
    np.testing.assert_array_equal(found.order, [0.0, 1.0, 2.0])


def test_finds_sets_in_the_folder_or_below(tmp_path: Path) -> None:
    for name in ("b_all.csv", "a_all.csv"):
        _write(tmp_path / "hat_latency" / name, [_row(1)])
    for folder in (tmp_path, tmp_path / "hat_latency"):
        assert [entry.name for entry in read_hat_sets(folder)] == ["a", "b"]
    with pytest.raises(UserError, match="holds no HAT latency sets"):
        read_hat_sets(tmp_path / "elsewhere")


def test_wrong_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x_all.csv"
    with pytest.raises(UserError, match="there is no HAT latency set"):
        read_hat_set(path)
    with pytest.raises(UserError, match="no column 'encoder_embed_dim'"):
        read_hat_set(_write(path, [[1.0]], "a"))
    with pytest.raises(UserError, match="line 3: expected 14 finite numbers"):
        read_hat_set(_write(path, [_row(1), _row(2)[:5]]))
    with pytest.raises(UserError, match="line 2: expected 14 finite numbers"):
        read_hat_set(_write(path, [[*_row(1)[:13], float("nan")]]))
    with pytest.raises(UserError, match="not positive"):
        read_hat_set(_write(path, [[*_row(1)[:10], 0.0, 1.0, 0.1, 0.1]]))
    with pytest.raises(UserError, match="holds no rows"):
        read_hat_set(_write(path, []))
    path.write_text("")
    with pytest.raises(UserError, match="no column"):
        read_hat_set(path)


def test_real_sets() -> None:
    folder = os.environ.get("HWNAS_DATA")
    if not folder:
        pytest.skip("HWNAS_DATA names no folder with public benchmarks")
    for hat in read_hat_sets(folder):
        assert hat.X.shape == (2000, 10)
        assert (hat.latency_ms > hat.decoder_ms).all()
