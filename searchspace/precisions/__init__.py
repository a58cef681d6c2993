"""Precisions by name. To add one: one file beside this one, one line here."""

from __future__ import annotations

from searchspace.precisions.base import Precision
from searchspace.precisions.bf16 import BF16
from searchspace.precisions.fp8 import Fp8
from searchspace.precisions.fp32 import FP32
from searchspace.precisions.int4 import Int4
from searchspace.precisions.int8 import Int8
from searchspace.precisions.int8_weight import Int8Weight
from searchspace.precisions.ternary import Ternary

PRECISIONS: dict[str, Precision] = {
    "fp32": FP32(),
    "bf16": BF16(),
    "fp8": Fp8(),
    "int8": Int8(),
    "int8_weight": Int8Weight(),
    "int4": Int4(),
    "ternary": Ternary(),
}

__all__ = ["PRECISIONS", "Precision"]
