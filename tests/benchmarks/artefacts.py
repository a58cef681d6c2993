"""Random networks of every preset in every format, verified as `nas export` does.

    python -m tests.benchmarks.artefacts --archs 20 [--presets decoder-tiny ...] [--formats hf ...]
        [--fp32]

Draws networks with random weights, writes each format that is not refused, and has it loaded and
run by a fresh process. Printed are, by preset and format: how many were written and verified,
refused or failed, with the reasons; the worst difference of logits from the supernet's, for
networks whose weights are stored as they are and for those with rounded ones; and by how much the
loss differs at most. Every result is added to ``--into`` at once, and what stands there already is
not done again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hw_profiles.process import prepare_process
from nas.calibration import calibrated_view
from nas.evaluation import held_out_loss
from nas.export import EXPORTERS, Exporter, Handover
from nas.export.checker import Checker
from nas.export.delivery import ExportSource, check_extraction, handover_of
from nas.export.reference import Reference
from nas.export.verified import REFERENCE_FILE, Expected, is_fp32, write_verified
from nas.progress import Progress, Reporter
from nas.tasks import TaskConfig, prepare_task
from nas.tasks.base import Task
from searchspace.arch import Arch
from searchspace.errors import unknown
from searchspace.space import SearchSpace
from searchspace.space.files import PRESETS, read_space
from searchspace.supernet import Supernet
from tests.benchmarks._artefact_records import (
    FAILED,
    REFUSED,
    WRITTEN,
    Record,
    Writer,
    read_records,
    summary,
    table_text,
)

Place = tuple[str, str, int, int]
"""Preset, variant, seed and index of a network."""
SUPERNET, DRAWN, FP32 = "supernet", "as drawn", "fp32"
NAMES = sorted(path.stem for path in PRESETS.glob("*.toml"))
TASKS = {
    "decoder": TaskConfig("stdlib", tokenizer="bytes", seq_len=64, max_train_bytes=100_000),
    "encoder": TaskConfig("listops", num_examples=64, min_length=8, max_length=64),
    "vit": TaskConfig("digits"),
}
AMOUNT = {"decoder": 1024, "encoder": 32, "vit": 32}
"""Of the test split, for the loss: tokens or examples."""


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--archs", type=int, default=20, help="of every preset")
    parser.add_argument("--presets", nargs="+", default=NAMES)
    parser.add_argument("--formats", nargs="+", default=list(EXPORTERS))
    parser.add_argument("--fp32", action="store_true", help="no weight is rounded")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--into", type=Path, default=Path("runs/artefacts.jsonl"))
    parser.add_argument("--threads", type=int, help="default: every processor")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    arguments = parser.parse_args()
    for what, given, known in (
        ("format", arguments.formats, EXPORTERS),
        ("preset", arguments.presets, NAMES),
    ):
        for name in given:
            if name not in known:
                raise unknown(what, name, known)
    prepare_process(arguments.threads)
    records = Sweep(arguments).run(Reporter(arguments.quiet))
    rows = summary(records)
    print(json.dumps(rows, indent=1) if arguments.json else table_text(rows))


@dataclass(frozen=True)
class Drawn:
    """One network, ready to be handed over."""

    arch: Arch
    handover: Handover
    expected: Expected


class Sweep:
    """All artefacts that the arguments ask for."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.variant = FP32 if arguments.fp32 else DRAWN
        self.formats: list[str] = arguments.formats
        self.writer = Writer(arguments.into)
        self.records = {record.key: record for record in read_records(arguments.into)}

    def run(self, reporter: Reporter) -> list[Record]:
        """Write and verify what is not done yet; returns the records that were asked for."""
        presets = self.arguments.presets
        with reporter.bar("artefacts") as bar:
            for number, preset in enumerate(presets):
                bar.update(number / len(presets), preset)
                if any(self.missing(preset, index) for index in range(self.arguments.archs)):
                    with reporter.bar(preset) as inner:
                        self.preset(preset, inner)
            bar.update(1.0, f"{len(presets)} presets")
        wanted = set(self.keys())
        return [record for key, record in self.records.items() if key in wanted]

    def keys(self) -> Iterator[tuple[Place, str]]:
        """Yield what identifies every record that is asked for."""
        for preset in self.arguments.presets:
            for name in (SUPERNET, *self.formats):
                for index in range(self.arguments.archs):
                    yield self.place(preset, index), name

    def place(self, preset: str, index: int) -> Place:
        """Return what identifies a network."""
        return preset, self.variant, self.arguments.seed, index

    def missing(self, preset: str, index: int) -> list[str]:
        """Return the formats of an arch that are not done."""
        place = self.place(preset, index)
        return [name for name in self.formats if (place, name) not in self.records]

    def preset(self, preset: str, bar: Progress) -> None:
        """Do the archs of one preset."""
        seed, archs = self.arguments.seed, self.arguments.archs
        with tempfile.TemporaryDirectory() as folder, Checker() as checker:
            source = source_of(preset, Path(folder), seed)
            for index in range(archs):
                names = self.missing(preset, index)
                if not names:
                    continue
                arch = source.supernet.space.sample(np.random.default_rng([seed, index]))
                if self.variant == FP32:
                    arch = unrounded(arch)
                place, files = self.place(preset, index), Path(folder) / str(index)
                files.mkdir()
                drawn = self.drawn(source, arch, files, place)
                for done, name in enumerate(names if drawn else ()):
                    bar.update((index + done / len(names)) / archs, f"{index} {arch.id} {name}")
                    assert drawn is not None
                    facts = artefact(EXPORTERS[name](), drawn, files, checker)
                    self.add(place, name, arch, facts)

    def drawn(self, source: ExportSource, arch: Arch, folder: Path, place: Place) -> Drawn | None:
        """Return a network, unless it differs when it is taken out of the supernet."""
        began = time.perf_counter()
        try:
            found, facts = draw(source, arch, folder), {"status": WRITTEN}
        except Exception as error:  # whatever goes wrong is a result
            found, facts = None, failure(error)
        if (place, SUPERNET) not in self.records:
            self.add(place, SUPERNET, arch, {**facts, "seconds": time.perf_counter() - began})
        return found

    def add(self, place: Place, name: str, arch: Arch, facts: dict[str, Any]) -> None:
        """Keep a result."""
        record = Record(*place, name, arch.id, **facts)
        self.writer.add(record)
        self.records[record.key] = record


def source_of(preset: str, folder: Path, seed: int) -> ExportSource:
    """Return a supernet with random weights, and a task that suits it."""
    kind = read_space(preset).get("family", {}).get("kind", "decoder")
    task: Task = prepare_task(TASKS[kind], folder / "task")
    space = SearchSpace.load(preset, task.vocab_size, task.family_facts)
    supernet = Supernet(space, torch.Generator().manual_seed(seed))
    return ExportSource(supernet, task, AMOUNT[kind])


def unrounded(arch: Arch) -> Arch:
    """Return an arch with its weights as they are."""
    layers = [replace(a, mixer_precision=FP32, ffn_precision=FP32) for a in arch.layers]
    return replace(arch, layers=tuple(layers))


def draw(source: ExportSource, arch: Arch, folder: Path) -> Drawn:
    """Return a network; its reference lies in the folder."""
    view = calibrated_view(source.supernet, arch, source.task).eval()
    reference = Reference.of(view, source.task, source.amount)
    check_extraction(source, arch, reference)
    loss = held_out_loss(view, reference.batches, source.task)
    reference.write(folder / REFERENCE_FILE)
    handover, _ = handover_of(source, arch)
    return Drawn(arch, handover, Expected(reference, source.task, loss, folder / REFERENCE_FILE))


def artefact(exporter: Exporter, drawn: Drawn, folder: Path, checker: Checker) -> dict[str, Any]:
    """Write one artefact and have it verified; returns what to record."""
    began = time.perf_counter()
    try:
        found = write_verified(exporter, drawn.handover, drawn.expected, folder, checker)
    except Exception as error:  # whatever goes wrong is a result
        facts = failure(error)
    else:
        facts = judged(found, drawn)
    return {**facts, "exact": is_fp32(drawn.arch), "seconds": time.perf_counter() - began}


def judged(found: dict[str, Any], drawn: Drawn) -> dict[str, Any]:
    """Return what to record of an artefact that did not fail."""
    if "refused" in found:
        return {"status": REFUSED, "reason": found["refused"]}
    verified = found["verified"]
    loss = verified.get("simulated_loss", drawn.expected.loss)
    return {
        "status": WRITTEN,
        "difference": max([*verified["differences"], verified.get("step_difference", 0.0)]),
        "loss_share": abs(verified["loss"] - loss) / abs(loss),
        "file_bytes": verified["file_bytes"],
    }


def failure(error: Exception) -> dict[str, Any]:
    """Return what to record of a failure."""
    return {"status": FAILED, "reason": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    main()
