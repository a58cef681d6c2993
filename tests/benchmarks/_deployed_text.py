"""What `tests.benchmarks.deploy` says of its result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tests.benchmarks._sub_blocks import aligned

SMALLER = 3.0
"""What an int8 network must be, at least, against the largest uniform one in fp32."""


def best_against(base: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the fastest network with the baseline's loss at most and a third of its bytes."""
    good = [row for row in rows if row["loss"] <= base["loss"] and row["smaller"] >= SMALLER]
    best = max(good, key=lambda row: row["prefill_faster"], default=None)
    return None if best is None else str(best["network"])


def table_text(result: Mapping[str, Any]) -> str:
    """Return the two tables."""
    head = ["network", "runtime", f"nats/{result['unit']}", "MB", "prefill ms", "decode ms"]
    lines = [head]
    for row in result["rows"]:
        lines.append(
            [row["network"], row["runtime"], f"{row['loss']:.4f}", f"{row['bytes'] / 1e6:.2f}",
             f"{row['prefill_ms']:.3f}", f"{row['decode_ms']:.3f}"]
        )  # fmt: skip
    claim = result["claim"]
    lines_2 = [["int8 in ONNX Runtime", "nats", "MB", "smaller", "prefill", "decode"]]
    for row in claim["rows"]:
        lines_2.append(
            [row["network"], f"{row['loss']:.4f}", f"{row['bytes'] / 1e6:.2f}",
             f"{row['smaller']:.2f}x", f"{row['prefill_faster']:.2f}x",
             f"{row['decode_faster']:.2f}x"]
        )  # fmt: skip
    best = "; ".join(f"against {name}: {found}" for name, found in claim["best"].items())
    about = (
        f"{result['threads']} threads, {result['tokens']} tokens, recovery of "
        f"{result['recover_steps']} steps"
    )
    return f"{about}\n{aligned(lines)}\n\n{aligned(lines_2)}\nbest {best}"
