"""Small files in the form of the public benchmarks, with made-up numbers, for their readers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from predictors.benchmarks.hat import FEATURES, MEASURED
from predictors.benchmarks.nas_bench_bert import FILE_NAME, MIXERS

NUM_BERT, NUM_HAT = 20, 160


def write_public_data(folder: Path) -> Path:
    """Write all sets in the folders that they are published in; returns the folder."""
    rng = np.random.default_rng(0)
    _write_bert(folder / "nas_bench_bert", rng)
    _write_hat(folder / "hat_latency", rng)
    _write_hwgpt(folder / "hwgpt", rng)
    return folder


def _write_bert(folder: Path, rng: np.random.Generator) -> None:
    networks = []
    for number in range(NUM_BERT):
        hidden, depth = int(rng.choice([128, 256])), int(rng.choice([2, 4]))
        layers = [_bert_layer(rng) for _ in range(depth)]
        overrides = {"hidden_size": hidden, "nas_config": {"encoder_layers": layers}}
        scores = {"glue": 60.0 + depth + hidden / 128 + 0.1 * rng.normal()}
        hparams = {"model_hparam_overrides": overrides}
        networks.append({"id": number, "scores": scores, "hparams": hparams})
    folder.mkdir(parents=True)
    (folder / FILE_NAME).write_text(json.dumps(networks))


def _bert_layer(rng: np.random.Generator) -> dict[str, Any]:
    kind, parameter = list(MIXERS)[rng.integers(len(MIXERS))]
    return {
        "operation_type": kind,
        "operation_parameter": parameter,
        "num_operation_heads": int(rng.choice([2, 4])),
        "feed_forward_dimension": int(rng.choice([512, 1024])),
        "num_feed_forward": int(rng.choice([1, 3])),
    }


def _write_hat(folder: Path, rng: np.random.Generator) -> None:
    folder.mkdir(parents=True)
    for name in ("a_gpu_x_all.csv", "b_cpu_y_all.csv"):
        X = rng.integers(1, 7, (NUM_HAT, len(FEATURES))).astype(float)
        times = (5 + X[:, :4].prod(axis=1) / 50, 50 + X[:, 4:7].prod(axis=1))
        measured = np.column_stack([*times, np.full((NUM_HAT, len(MEASURED) - 2), 0.1)])
        rows = np.hstack([X, measured * rng.normal(1, 0.01, (NUM_HAT, 1))])
        lines = [",".join(map(repr, row)) for row in rows.tolist()]
        (folder / name).write_text("\n".join([",".join((*FEATURES, *MEASURED)), *lines]) + "\n")


def _write_hwgpt(folder: Path, rng: np.random.Generator) -> None:
    folder.mkdir(parents=True)
    for space, depth in (("s", 12), ("m", 24)):
        arrays = {}
        inputs = {"perplexity": 3 + 3 + 6 * depth + 2, "bf16_memory": 2 + 2 * depth + 1}
        for net, width in inputs.items():
            widths = [width, 7, 7, 7, 7, 1]
            for k in range(1, 6):
                shape = (widths[k], widths[k - 1])
                arrays[f"{net}/fc{k}.weight"] = rng.normal(size=shape) / np.sqrt(shape[1])
                arrays[f"{net}/fc{k}.bias"] = 0.1 + 0.1 * rng.normal(size=widths[k])
        np.savez(folder / f"hwgpt_{space}.npz", **arrays)
        for pair in ("pp", "pm"):
            cost = np.linspace(0.0, 1.0, 9)
            front = np.column_stack([1.0 - np.sqrt(cost), 20 + 100 * cost])
            np.savez(folder / f"front_{space}_{pair}.npz", F=front)
