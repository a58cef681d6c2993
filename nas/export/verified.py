"""One artefact: written, loaded by another process, and judged by what it computes there."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nas.calibration import needs_calibration
from nas.evaluation import held_out_loss
from nas.export.base import Exporter, ExportFailed, Handover
from nas.export.checker import Checker
from nas.export.reference import Reference
from nas.tasks.base import Task
from searchspace.arch import Arch

MAX_OTHER_ORDER_DIFFERENCE = 1e-4
"""Allowed where sums are taken in another order: token by token, folded norms, rewrites."""
MAX_ROUNDED_LOSS_SHARE = 0.01
"""By which the loss may differ from the one that the supernet simulates, as a share of it."""
REFERENCE_FILE = ".reference.safetensors"


@dataclass(frozen=True)
class Expected:
    """What artefacts of a network must compute.

    Args:
        reference: logits and held-out data.
        task: that these are of.
        loss: of the network on them, in nats per unit.
        file: holds the reference, for the process that loads artefacts.
    """

    reference: Reference
    task: Task
    loss: float
    file: Path


def write_verified(
    exporter: Exporter, handover: Handover, expected: Expected, folder: Path, checker: Checker
) -> dict[str, Any]:
    """Write one artefact and have it verified.

    Args:
        exporter: of the format.
        handover: the network.
        expected: what it must compute.
        folder: of the subnetwork; the artefact lies in it where the format says.
        checker: loads and runs it.

    Returns:
        What `export.json` says of the format: facts and what was ``verified``, or why it is
        ``refused``.

    Raises:
        ExportFailed: when it cannot be made, or computes something else.
    """
    if reason := exporter.missing() or exporter.refusal(handover):
        return {"refused": reason}
    place = folder / exporter.folder
    before = _files(place)
    place.mkdir(exist_ok=True)
    facts = exporter.write(handover, place)
    found = checker.check(exporter, place, expected.file)
    found["file_bytes"] = sum(p.stat().st_size for p in _files(place) - before)
    network, loss = exporter.stands_for(handover), expected.loss
    if network is not handover.subnet:
        loss = held_out_loss(network, expected.reference.batches, expected.task)
        found["simulated_loss"] = loss
    _judge(exporter, handover, found, loss)
    return {**facts, "verified": found}


def is_fp32(arch: Arch) -> bool:
    """Whether all weights of an arch are stored as they are."""
    used = {p for layer in arch.layers for p in (layer.mixer_precision, layer.ffn_precision)}
    return used <= {"fp32"}


def _judge(exporter: Exporter, handover: Handover, found: Mapping[str, Any], loss: float) -> None:
    """Raise `ExportFailed` unless an artefact computes what the supernet does."""
    arch, problems = handover.arch, []
    if is_fp32(arch) and math.isfinite(exporter.max_difference):
        other_order = needs_calibration(arch) or bool(handover.rewrites)
        allowed = max(exporter.max_difference, MAX_OTHER_ORDER_DIFFERENCE * other_order)
        worst = max(found["differences"])
        if not worst <= allowed:
            problems.append(f"logits differ by {worst:.2g} of the largest, allowed is {allowed}")
        step = found.get("step_difference", 0.0)
        if not step <= max(exporter.max_difference, MAX_OTHER_ORDER_DIFFERENCE):
            problems.append(f"token by token the logits differ by {step:.2g}")
    if not abs(found["loss"] - loss) <= MAX_ROUNDED_LOSS_SHARE * abs(loss):
        problems.append(f"the loss is {found['loss']:.4f}, in PyTorch {loss:.4f}")
    if problems:
        raise ExportFailed(f"{exporter.name} of {arch.id} differs: {'; '.join(problems)}")


def _files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}
