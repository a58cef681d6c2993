"""Ranking the networks of NAS-Bench-BERT by their GLUE score: metrics, combination, predictors.

    python -m tests.benchmarks.nas_bench_bert --data DIR --json > nas_bench_bert.json

Printed is Kendall's tau with ties broken at random (tau-b flatters coarse scores), beside what was
published for the same metric. The published values were computed on networks that were not the
trained ones, with a gradient that is rounding noise; ours look at the networks as trained, and for
comparison at what their description says (``--readings nominal``).

- Metrics: the median over seeds of weights and batch. "Inside" is the mean tau inside the four
  groups of equal depth and width: what a metric knows beside those two.
- Combination: `rank_aggregate` of `COMBINED`, without any label, also with a metric of pure chance
  and one that says the contrary put in.
- Learned: `QualityRegressor` from a few labels; networks that are the same as trained are never
  split between training and test.

Retraining noise caps tau near 0.82. DIR holds ``BERT_benchmark.json``, or ``nas_bench_bert/``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hw_profiles.process import prepare_process
from predictors.benchmarks.nas_bench_bert import (
    FILE_NAME,
    GLUE,
    VOCAB_SIZE,
    BertEntry,
    arch_of,
    read_nas_bench_bert,
    replicate_groups,
)
from predictors.encodings import encode_archs
from predictors.rank_aggregation import COMBINED, rank_aggregate
from predictors.zero_cost import METRICS, Batch, score_archs
from tests.benchmarks._nas_bench_bert_learned import (
    learned_table,
    nominal_features,
    tie_broken_tau,
    trained_features,
)

FloatArray = NDArray[np.float64]

PUBLISHED = {
    "params": 0.454,
    "head_confidence": 0.478,
    "softmax_confidence": 0.216,
    "activation_distance": 0.222,
    "head_importance": 0.164,
    "synaptic_diversity": 0.156,
    "synaptic_saliency": 0.188,
    "jacob_cov": -0.042,
    "w_pca": 0.526,
}
"""Tau by the values published with the benchmark (Serianni and Kalita 2023), and W-PCA's own."""
RECORD = 0.53
"""The best published tau of a training-free metric: ZeroLM 2025."""
SEQUENCES, TOKENS = 8, 32


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--metrics", nargs="+", default=list(METRICS), choices=list(METRICS))
    parser.add_argument("--readings", nargs="+", default=["trained", "nominal"])
    parser.add_argument("--seeds", type=int, default=3, help="of the as-trained networks")
    parser.add_argument("--splits", type=int, default=20)
    parser.add_argument("--sizes", type=int, nargs="+", default=[20, 50, 100])
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    prepare_process(arguments.threads)
    result = run(arguments)
    print(json.dumps(result, indent=1) if arguments.json else table_text(result))


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Score all networks and learn from their labels; returns what is printed."""
    folder = arguments.data
    nested = folder / "nas_bench_bert"
    entries = read_nas_bench_bert(nested if (nested / FILE_NAME).exists() else folder)
    labels = np.array([entry.scores[GLUE] for entry in entries])
    names = tuple(dict.fromkeys((*arguments.metrics, *COMBINED)))
    scores = {
        reading: [
            scores_of(entries, names, reading, seed)
            for seed in range(arguments.seeds if reading == "trained" else 1)
        ]
        for reading in arguments.readings
    }
    return {
        "networks": len(entries),
        "groups": len(set(replicate_groups(entries))),
        "metrics": {name: metric_row(entries, labels, name, scores) for name in arguments.metrics},
        "combined": {
            reading: [combined_row(found, labels, seed) for seed, found in enumerate(by_seed)]
            for reading, by_seed in scores.items()
        },
        "learned": learned_table(
            entries,
            feature_sets(entries, scores),
            labels,
            replicate_groups(entries),
            sizes=arguments.sizes,
            num_splits=arguments.splits,
        ),
    }


def scores_of(
    entries: Sequence[BertEntry], names: Sequence[str], reading: str, seed: int
) -> dict[str, FloatArray]:
    """Return every metric's value of every network; equal networks are scored once."""
    archs = [arch_of(entry, reading) for entry in entries]
    different = list({arch.id: arch for arch in archs}.values())
    place = {arch.id: number for number, arch in enumerate(different)}

    def progress(done: int, num: int) -> None:
        print(f"\r{reading}, seed {seed}: {done} of {num}", end="", file=sys.stderr)

    found = score_archs(names, different, zipf_batch(seed), seed, progress)
    print(file=sys.stderr)
    rows = [place[arch.id] for arch in archs]
    return {name: values[rows] for name, values in found.items()}


def zipf_batch(seed: int) -> Batch:
    """Return sequences of tokens as frequent as words are, and two classes in turn."""
    generator = torch.Generator().manual_seed(1000 + seed)
    frequencies = 1.0 / torch.arange(1, VOCAB_SIZE + 1)
    tokens = torch.multinomial(frequencies, SEQUENCES * TOKENS, True, generator=generator)
    return tokens.view(SEQUENCES, TOKENS), torch.arange(SEQUENCES) % 2


def metric_row(
    entries: Sequence[BertEntry],
    labels: FloatArray,
    name: str,
    scores: Mapping[str, Sequence[Mapping[str, FloatArray]]],
) -> dict[str, Any]:
    """Return tau of a metric by reading, over seeds, and inside groups of depth and width."""
    sizes = np.array([entry.hidden_size * 100 + len(entry.layers) for entry in entries])
    row: dict[str, Any] = {"published": PUBLISHED.get(name)}
    for reading, by_seed in scores.items():
        taus = [tie_broken_tau(found[name], labels) for found in by_seed]
        inside = [
            tie_broken_tau(found[name][sizes == size], labels[sizes == size])
            for found in by_seed
            for size in np.unique(sizes)
        ]
        row[reading] = {"taus": taus, "tau": float(np.median(taus)), "inside": np.mean(inside)}
    return row


def combined_row(scores: Mapping[str, FloatArray], labels: FloatArray, seed: int) -> dict[str, Any]:
    """Return tau of the label-free combination, alone and with nonsense put in."""
    few = {name: scores[name] for name in COMBINED}
    chance = np.random.default_rng(seed).normal(size=len(labels))
    return {
        "tau": tie_broken_tau(rank_aggregate(few), labels),
        "with_chance": tie_broken_tau(rank_aggregate({**few, "chance": chance}), labels),
        "with_contrary": tie_broken_tau(
            rank_aggregate({**few, "contrary": -few[COMBINED[0]]}), labels
        ),
    }


def feature_sets(
    entries: Sequence[BertEntry], scores: Mapping[str, Sequence[Mapping[str, FloatArray]]]
) -> dict[str, FloatArray]:
    """Return what predictors learn from, by name."""
    trained = trained_features(entries)
    sets = {"nominal genes and totals": nominal_features(entries), "sizes as trained": trained}
    archs = [arch_of(entry) for entry in entries]
    sets["aggregate encoding as trained"] = encode_archs(archs, kind="aggregate").values
    if "trained" in scores:
        found = scores["trained"][0]
        few = [found[name] for name in COMBINED]
        combined = rank_aggregate({name: found[name] for name in COMBINED})
        sets["sizes as trained + metrics"] = np.column_stack([trained, *few])
        sets["sizes as trained + combination"] = np.column_stack([trained, combined])
    return sets


def table_text(result: Mapping[str, Any]) -> str:
    """Return the tables."""
    lines = [
        f"{result['networks']} networks, {result['groups']} different as trained; tie-broken "
        f"Kendall tau with GLUE; published record {RECORD}",
        "",
        f"{'metric':22} {'published':>9} {'as trained':>10} {'range':>13} {'inside':>7} "
        f"{'nominal':>8}",
    ]
    for name, row in result["metrics"].items():
        published = "" if row["published"] is None else f"{row['published']:.3f}"
        text = f"{name:22} {published:>9}"
        if "trained" in row:
            found = row["trained"]
            spread = f"{min(found['taus']):.3f}..{max(found['taus']):.3f}"
            text += f" {found['tau']:10.3f} {spread:>13} {found['inside']:7.2f}"
        if "nominal" in row:
            text += f" {row['nominal']['tau']:8.3f}"
        lines.append(text)
    lines += [
        "",
        f"{'combination without labels':34} {'alone':>6} {'+ chance':>8} {'+ contrary':>10}",
    ]
    for reading, rows in result["combined"].items():
        values = [np.median([row[key] for row in rows]) for key in rows[0]]
        lines.append(f"{reading:34} {values[0]:6.3f} {values[1]:8.3f} {values[2]:10.3f}")
    sizes = [key for key in result["learned"][0] if key.startswith("tau_")]
    labels = [key.removeprefix("tau_") for key in sizes]
    lines += ["", f"{'learned from labels':34} " + " ".join(f"{label:>6}" for label in labels)]
    for row in result["learned"]:
        lines.append(f"{row['features']:34} " + " ".join(f"{row[key]:6.3f}" for key in sizes))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
