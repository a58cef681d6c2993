"""The cases of the kernels' benchmark, one file for each family of operations."""

from __future__ import annotations

import importlib
from collections.abc import Collection

from tests.benchmarks._kernel_cases.case import Case, Setting

SECONDS = {
    "norms": 50, "elastic_linear": 60, "int4_linear": 40, "int8_linear": 25, "ternary_linear": 12,
    "int8_weight_linear": 12, "decode_attention": 50, "block_attention": 40,
    "linear_attention": 70, "causal_conv": 12, "selective_scan": 12, "linear_scan": 10,
    "single_step": 20, "cross_entropy": 30,
}  # fmt: skip
"""Time budget of every family; once it is spent its other cases come last."""
FILES = (
    "elastic", "low_bit", "decode", "linear_attention", "norms", "block", "cross_entropy",
    "scans", "steps",
)  # fmt: skip


def all_cases(setting: Setting, families: Collection[str] | None = None) -> list[Case]:
    """Return the cases of some families, all by default, those that decide targets first."""
    found: list[Case] = []
    for name in FILES:
        module = importlib.import_module(f"tests.benchmarks._kernel_cases.{name}")
        found += module.cases(setting)
    chosen = [case for case in found if not families or case.family in families]
    return sorted(chosen, key=lambda case: case.priority)
