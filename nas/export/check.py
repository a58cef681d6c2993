"""The process that verifies artefacts: it has only what was written, and the figures to be met.

    python -m nas.export.check NUM_THREADS

reads requests `{"folder": ..., "format": ..., "reference": ...}` from stdin, one JSON text a line,
and answers each with a line on stdout: `{"found": {...}}` or `{"error": "..."}`.

Shapes: B batch, T tokens, V vocabulary or classes.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hw_profiles.process import prepare_process
from nas.export import EXPORTERS
from nas.export.base import Loaded
from nas.export.reference import Reference
from nas.tasks.base import IGNORED

TIMED_CALLS, TIMED_S = 15, 1.0
"""How often a call is timed at most, and for how long."""


def check(loaded: Loaded, reference: Reference) -> dict[str, Any]:
    """Return what an artefact computes, against a reference, and how fast.

    Returns:
        `differences` of the logits, and `step_difference` of those computed in a session with a
        prompt and then token by token, each relative to the largest logit where that is above 1;
        `loss` in nats per unit; `prefill_ms` of one input of `tokens` tokens; of a decoder
        `decode_ms`, of a token after that prompt.
    """
    with torch.inference_mode():
        found: dict[str, Any] = {
            "differences": [
                _difference(loaded.logits(inputs), expected)
                for inputs, expected in reference.logits
            ],
            "loss": _loss(loaded, reference),
        }
        (prompt, _), *_ = reference.batches
        prompt = prompt[:1]
        found["prefill_ms"] = _median_ms(lambda: loaded.logits(prompt))
        if reference.causal:
            found["tokens"] = prompt.shape[1]
            found["step_difference"] = max(
                _difference(_step_by_step(loaded, inputs), expected)
                for inputs, expected in reference.logits
            )
            session = loaded.session(1, prompt.shape[1] + TIMED_CALLS + 1)
            session(prompt)
            found["decode_ms"] = _median_ms(lambda: session(prompt[:, :1]), TIMED_CALLS)
    return found


def _difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference, relative to the largest logit where that is above 1."""
    if found.shape != expected.shape:
        raise ValueError(f"logits of shape {tuple(found.shape)}, not {tuple(expected.shape)}")
    difference = (found.float() - expected).abs().max() / expected.abs().max().clamp_min(1.0)
    return float(difference)


def _loss(loaded: Loaded, reference: Reference) -> float:
    total = 0.0
    for inputs, targets in reference.batches:
        logits = loaded.logits(inputs).float().flatten(0, -2)
        total += F.cross_entropy(
            logits, targets.flatten(), reduction="sum", ignore_index=IGNORED
        ).item()
    return total / reference.units


def _step_by_step(loaded: Loaded, inputs_BT: Tensor) -> Tensor:
    """Return the logits (B, T, V) of the first half in one call and then of single tokens."""
    batch, tokens = inputs_BT.shape
    half = max(1, tokens // 2)
    session = loaded.session(batch, tokens)
    parts = [session(inputs_BT[:, :half])]
    parts += [session(inputs_BT[:, t : t + 1]) for t in range(half, tokens)]
    return torch.cat(parts, dim=1)


def _median_ms(call: Callable[[], object], most: int = TIMED_CALLS) -> float:
    """Return the median time of a call, the first one left out."""
    times: list[float] = []
    end_s = time.perf_counter() + TIMED_S
    while len(times) < most and (len(times) < 3 or time.perf_counter() < end_s):
        began = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times[1:])


def _answer(request: dict[str, str]) -> dict[str, Any]:
    exporter = EXPORTERS[request["format"]]()
    try:
        loaded = exporter.load(Path(request["folder"]))
        return {"found": check(loaded, Reference.read(Path(request["reference"])))}
    except Exception as error:  # whatever a foreign library raises is the answer
        return {"error": f"{type(error).__name__}: {error}"}


def main(arguments: Sequence[str]) -> None:
    """Answer requests until stdin ends."""
    # Libraries may print; answers have a stream of their own.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    prepare_process(int(arguments[0]))
    for line in sys.stdin:
        print(json.dumps(_answer(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
