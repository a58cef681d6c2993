"""`Peaks`: how fast a device is at best."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from searchspace.errors import UserError

TOLERATED_RATIO = 1.15
FP32 = "fp32"


@dataclass(frozen=True)
class Peaks:
    """Measured peak rates of one device with one number of threads.

    Args:
        gflops: billion operations a second of a matrix product, by precision; ``"fp32"`` is there.
        copy_gb_s: billion bytes a second that a copy reads and writes together, by their number in
            bytes (as text, for JSON).
        op_us: fixed time of an operator that computes something, as one of many in a module.
        view_us: time of an operator that only makes a view, in a module.
    """

    gflops: Mapping[str, float]
    copy_gb_s: Mapping[str, float]
    op_us: float
    view_us: float

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON-ready form."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Peaks:
        """Build from `to_dict`'s form.

        Raises:
            UserError: for a missing or unknown field, or a rate that is no number above 0.
        """
        if not isinstance(values, Mapping) or set(values) != {item.name for item in fields(cls)}:
            raise UserError(
                "the peak rates have missing or unknown fields; they were written by another "
                "version, so profile again"
            )
        gflops, copies = values["gflops"], values["copy_gb_s"]
        if not isinstance(gflops, Mapping) or not isinstance(copies, Mapping) or not copies:
            raise UserError("peak rates gflops and copy_gb_s must be mappings; profile again")
        if FP32 not in gflops or not all(str(size).isdigit() for size in copies):
            raise UserError(
                "peak rates need gflops of fp32 and copy_gb_s by number of bytes; profile again"
            )
        rates = {**gflops, **copies, "op_us": values["op_us"], "view_us": values["view_us"]}
        for name, rate in rates.items():
            if not isinstance(rate, int | float) or not 0 < rate < math.inf:
                raise UserError(
                    f"peak rate {name}={rate!r} must be a number above 0; profile again"
                )
        return cls(dict(gflops), dict(copies), values["op_us"], values["view_us"])

    def bytes_per_us(self, footprint_bytes: float) -> float:
        """Return the rate at which an operator moves its bytes when they are this many in all.

        Interpolated between the measured sizes on a logarithmic scale: caches overlap.
        """
        sizes = sorted(self.copy_gb_s, key=int)
        rate = np.interp(
            math.log(max(footprint_bytes, 1.0)),
            [math.log(int(size)) for size in sizes],
            [math.log(self.copy_gb_s[size]) for size in sizes],
        )
        return float(np.exp(rate)) * 1e3


def peaks_differ(here: Peaks, there: Peaks) -> list[str]:
    """Return a sentence for each rate that stands in another ratio to the others.

    A machine that does everything 20 % faster is the same for a search; one whose int8 products
    gained 20 % on its fp32 products is not, whatever its name says.

    Args:
        here: of this device.
        there: of the device to compare with, such as a table's.
    """
    mine, theirs = _rates(here), _rates(there)
    changes = {name: math.log(mine[name] / theirs[name]) for name in mine if name in theirs}
    common = float(np.median(list(changes.values())))
    return [
        f"{name}: {math.exp(change - common):.2f} times as fast here as there, beside what all "
        "rates have in common"
        for name, change in changes.items()
        if abs(change - common) > math.log(TOLERATED_RATIO)
    ]


def _rates(peaks: Peaks) -> dict[str, float]:
    products = {f"{name} products": rate for name, rate in peaks.gflops.items()}
    copies = {f"copies of {int(n) >> 10} KiB": rate for n, rate in peaks.copy_gb_s.items()}
    return {**products, **copies, "small operators": 1.0 / peaks.op_us}
