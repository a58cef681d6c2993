"""The report: what is on the page, that it loads nothing, and that it survives missing parts."""

from __future__ import annotations

import hashlib
import html.parser
import io
import json
import math
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from nas.report import front_table, write_report
from nas.report.labels import place_labels
from nas.report.markup import fixed, number, tag
from nas.report.run_data import load_run
from nas.report.statistics import comparisons, latency_error
from nas.report.summary import workload_words
from searchspace.errors import UserError

WORKLOADS = ("prefill_b1_t256", "decode_b1_t256")
SECTION_IDS = (
    *("front", "hypervolume", "predictions", "layers"),
    *("training", "members", "metrics", "facts"),
)
NASTY = "<script>alert('x')</script> & \"q\" $\\frac{1$ \ud800 [red]"


def random_arch(rng: np.random.Generator, num_layers: int = 6) -> dict[str, Any]:
    layers: list[dict[str, Any]] = []
    for slot in range(num_layers):
        if slot and rng.random() < 0.25:
            layers.append({"skip": True})
            continue
        mixer = str(rng.choice(["softmax", "sliding_window", "linear_elu", "gla", "none"]))
        heads, kv_heads = [(6, 6), (6, 2), (6, 1), (3, 1)][int(rng.integers(4))]
        width = int(rng.choice([0, 96, 192, 384, 768])) if mixer != "none" else 384
        layers.append(
            {
                "mixer": mixer,
                "num_heads": heads if mixer != "none" else 0,
                "num_kv_heads": kv_heads if mixer != "none" else 0,
                "position": str(rng.choice(["rope", "nope"])),
                "mixer_precision": str(rng.choice(["fp32", "int8"])),
                "ffn": str(rng.choice(["relu2", "gelu", "swiglu"])) if width else "none",
                "intermediate_size": width,
                "ffn_precision": str(rng.choice(["fp32", "int8"])),
                "norm": str(rng.choice(["rmsnorm", "layernorm"])),
                "mixer_options": {"window": 64} if mixer == "sliding_window" else {},
            }
        )
    width = int(rng.choice([64, 128, 192]))
    return {"d_model": width, "head_dim": 32, "vocab_size": 1024, "layers": layers}


def record(
    rng: np.random.Generator, size: float, penalty: float, name: str | None = None
) -> dict[str, Any]:
    """A network of relative size 0..1 whose loss is `penalty` above the best of its size."""
    latency_ms = 0.9 + 8.0 * size * float(rng.uniform(0.9, 1.1))
    measured = {WORKLOADS[0]: latency_ms, WORKLOADS[1]: 0.3 + 0.2 * latency_ms}
    loss = 1.31 + 0.55 * (1 - size) ** 2 + penalty
    arch = random_arch(rng)
    digest = hashlib.sha256(repr((arch, size, penalty)).encode()).hexdigest()[:10]
    return {
        "arch_id": digest,
        "arch": arch,
        "name": name,
        "params": int(1.9e6 * (0.12 + size)),
        "weight_bytes": int(5.2e6 * (0.12 + size) * float(rng.uniform(0.6, 1.0))),
        "measured": {"loss": loss, "latency_ms": measured, "peak_mib": 12.0 + 40 * size},
        "predicted": {
            "latency_ms": {k: v * float(rng.normal(1, 0.03)) for k, v in measured.items()}
        },
        "search_loss": loss * float(rng.normal(1.0, 0.01)) if name is None else None,
    }


def front_content(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    sizes = np.linspace(0.02, 1.0, 14)
    front = [record(rng, float(size), 0.0) for size in sizes]
    uniform = [
        record(rng, size, 0.09, f"softmax d{width} L{depth}")
        for size, width, depth in [
            (1.0, 192, 6),
            (0.7, 192, 3),
            (0.5, 128, 6),
            (0.35, 128, 3),
            (0.2, 64, 6),
            (0.1, 64, 3),
        ]
    ]
    spread = [(float(rng.uniform(0.05, 1)), float(rng.uniform(0.1, 0.6))) for _ in front]
    return {
        "task": "stdlib",
        "unit": "byte",
        "space": "decoder-small",
        "space_size": "3" + "0" * 22,
        "objectives": ["loss", "latency_ms", "weight_bytes"],
        "workload": WORKLOADS[0],
        "workloads": list(WORKLOADS),
        "baselines": {"unigram": 3.31, "bigram": 2.52, "trigram": 1.95},
        "groups": {
            "front": front,
            "random": [record(rng, size, penalty) for size, penalty in spread],
            "uniform": uniform,
        },
        "hypervolume": {
            "front": 0.871,
            "random": 0.702,
            "uniform": 0.655,
            "reference": [1.1] * 3,
            "ideal": [1.3, 1, 1e6],
            "nadir": [2, 9, 5e6],
        },
        "chosen": {
            "best": front[-1]["arch_id"],
            "fastest": front[0]["arch_id"],
            "smallest": front[0]["arch_id"],
            "knee": front[5]["arch_id"],
        },
        "latency_error": {
            name: {"mape_percent": 2.31 + i, "kendall_tau": 0.97, "num_networks": 34}
            for i, name in enumerate(WORKLOADS)
        },
        "device": {
            "cpu": "Example CPU @ 2 GHz",
            "num_threads": 2,
            "isa": ["avx2", "avx512f"],
            "memory_gib": 15.6,
            "allocator_tuned": True,
        },
        "versions": {"python": "3.11.9", "torch": "2.13.0+cpu"},
    }


def write_run(folder: Path, front: dict[str, Any] | None = None) -> Path:
    """Write a run folder with everything in it, one network exported."""
    front = front or front_content()
    rng = np.random.default_rng(1)
    front_ids = [r["arch_id"] for r in front["groups"]["front"]]
    trials = [
        {
            "number": i,
            "arch_id": f"{i:010x}",
            "state": "failed" if i % 40 == 39 else "complete",
            "values": {},
            "reason": "the loss is nan" if i % 40 == 39 else None,
            "seconds": 0.7,
        }
        for i in range(120)
    ]
    search = {
        "sampler": "predictor",
        "objectives": front["objectives"],
        "trials": trials,
        "hypervolume": np.maximum.accumulate(0.9 - 0.6 / np.sqrt(np.arange(1, 118))).tolist(),
        "metrics": {
            "synflow": {"kendall_tau": 0.613, "num_archs": 117},
            "grad_norm": {"kendall_tau": 0.482, "num_archs": 117},
            "naswot": {"kendall_tau": -0.121, "num_archs": 117},
        },
    }
    steps = np.arange(1, 1500)
    log = [
        {
            "step": int(s),
            "elapsed_s": 0.18 * int(s),
            "largest": top + noise,
            "smallest": top + 0.8 + noise,
            "random": top + 0.35 + noise,
        }
        for s, top, noise in zip(
            steps, 3 + 4 * np.exp(-steps / 200), rng.normal(0, 0.08, len(steps)), strict=True
        )
    ]
    config = {
        "preset": "decoder-small",
        "budget": "10m",
        "out": str(folder),
        "seed": 7,
        "search": {"sampler": "predictor", "constraints": [], "budget_s": None},
    }
    export = {
        "arch_id": front_ids[0],
        "verified": {
            "max_logit_difference": 2.4e-07,
            "loss": 1.8321,
            "latency_ms": {WORKLOADS[0]: 1.02},
            "weight_bytes": 412345,
        },
    }
    files = {
        "front.json": front,
        "search.json": search,
        "config.json": config,
        f"subnets/{front_ids[0]}/export.json": export,
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    (folder / "supernet").mkdir(exist_ok=True)
    lines = "\n".join(json.dumps(entry) for entry in log)
    (folder / "supernet" / "log.jsonl").write_text(lines + '\n{"step": 15')
    return folder


class Page(html.parser.HTMLParser):
    """What a browser would see: ids, tags, attributes and text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.texts: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def values(self, name: str) -> list[str]:
        return [value for key, value in self.attributes if key == name]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, Page]:
    folder = write_run(tmp_path_factory.mktemp("runs") / "quick start")
    source = write_report(folder).read_text(encoding="utf-8")
    return folder, source, Page(source)
