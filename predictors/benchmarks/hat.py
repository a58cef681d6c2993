"""HAT latency sets: encoder-decoder transformers measured on real devices, in order.

Source: Wang et al. 2020, "HAT: Hardware-Aware Transformers for Efficient Natural Language
Processing", section 3.2 (latency predictor and its data set). Letters: N networks, P features.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from searchspace.errors import UserError

FloatArray = NDArray[np.float64]

FOLDER = "hat_latency"
SUFFIX = "_all.csv"
FEATURES = (
    "encoder_embed_dim",
    "encoder_layer_num",
    "encoder_ffn_embed_dim_avg",
    "encoder_self_attention_heads_avg",
    "decoder_embed_dim",
    "decoder_layer_num",
    "decoder_ffn_embed_dim_avg",
    "decoder_self_attention_heads_avg",
    "decoder_ende_attention_heads_avg",
    "decoder_arbitrary_ende_attn_avg",
)
"""Columns that describe a network; averages are over its layers."""
MEASURED = (
    "latency_mean_encoder",
    "latency_mean_decoder",
    "latency_std_encoder",
    "latency_std_decoder",
)
"""Columns of what was measured, in milliseconds."""


@dataclass(frozen=True)
class HatSet:
    """Networks measured on one device for one task, row by row in the order of measurement.

    Attributes:
        name: task, kind of device and device, such as ``"wmt14ende_gpu_titanxp"``.
        X: the columns `FEATURES`, shape (N, P).
        encoder_ms, decoder_ms: mean latency of the two parts, shape (N,).
        encoder_std_ms, decoder_std_ms: its deviation over repetitions, shape (N,).
    """

    name: str
    X: FloatArray
    encoder_ms: FloatArray
    decoder_ms: FloatArray
    encoder_std_ms: FloatArray
    decoder_std_ms: FloatArray

    @property
    def latency_ms(self) -> FloatArray:
        """Latency of the whole network: encoder and decoder means added, shape (N,)."""
        return np.asarray(self.encoder_ms + self.decoder_ms)

    @property
    def order(self) -> FloatArray:
        """Position of each row in the order of measurement, shape (N,)."""
        return np.arange(len(self.X), dtype=np.float64)


def read_hat_set(path: Path | str) -> HatSet:
    """Read one set.

    Raises:
        UserError: when the file is absent, lacks a column, or holds a value that cannot be.
    """
    file = Path(path)
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise UserError(f"there is no HAT latency set {file}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {file} as a HAT latency set: {error}") from None
    names = [name.strip() for name in lines[0].split(",")] if lines else []
    missing = [name for name in (*FEATURES, *MEASURED) if name not in names]
    if missing:
        raise UserError(f"{file} is no HAT latency set: it has no column {missing[0]!r}")
    values = _numbers(file, lines[1:], len(names))
    columns = dict(zip(names, values.T, strict=True))
    if (columns[MEASURED[0]] <= 0).any() or (columns[MEASURED[1]] <= 0).any():
        raise UserError(f"{file} holds a latency that is not positive; download it again")
    X = np.stack([columns[name] for name in FEATURES], axis=1)
    return HatSet(file.name.removesuffix(SUFFIX), X, *(columns[name] for name in MEASURED))


def read_hat_sets(folder: Path | str) -> list[HatSet]:
    """Read all sets in a folder, or in its sub-folder `hat_latency`, sorted by name.

    Raises:
        UserError: when there is none, or a file cannot be read.
    """
    given = Path(folder)
    for place in (given, given / FOLDER):
        files = sorted(place.glob(f"*{SUFFIX}"))
        if files:
            return [read_hat_set(file) for file in files]
    raise UserError(
        f"{given} holds no HAT latency sets; give the folder of the *{SUFFIX} files or its parent"
    )


def _numbers(file: Path, lines: list[str], num_columns: int) -> FloatArray:
    """Return the finite numbers of non-empty lines, shape (rows, num_columns)."""
    rows = []
    for number, line in enumerate(lines, start=2):
        if not line.strip():
            continue
        try:
            row = [float(entry) for entry in line.split(",")]
        except ValueError:
            row = []
        if len(row) != num_columns or not np.isfinite(row).all():
            raise UserError(
                f"{file}, line {number}: expected {num_columns} finite numbers; download it again"
            )
        rows.append(row)
    if not rows:
        raise UserError(f"{file} holds no rows; download it again")
    return np.array(rows, dtype=np.float64)
