"""Writing a subnetwork's folder: every format, verified in another process, or nothing at all."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nas.calibration import calibrated_extract, calibrated_view
from nas.evaluation import held_out_loss
from nas.export import EXPORTERS
from nas.export.base import Exporter, ExportFailed, Handover
from nas.export.card import write_card
from nas.export.checker import Checker
from nas.export.reference import Reference
from nas.export.verified import REFERENCE_FILE, Expected, write_verified
from nas.recovery import Recovery
from nas.tasks.base import Task
from nas.tasks.labelled import LabelledTask
from nas.tasks.language_model import LanguageModelTask
from searchspace.arch import Arch
from searchspace.errors import UserError, unknown
from searchspace.files import read_json, temporary_name, write_json
from searchspace.rewrites import rewrite
from searchspace.subnet import Subnet, state_bytes
from searchspace.supernet import Supernet

REPORT_FILE = "export.json"


@dataclass(frozen=True)
class ExportSource:
    """Where exported networks come from.

    Args:
        supernet: the trained weights.
        task: for tokenizer and held-out data.
        amount: how much of the test split the verified loss is of; see `Task`.
        rewrites: names in `searchspace.rewrites.REWRITES`, applied to networks that they fit.
        formats: names in `EXPORTERS`; ``hf`` is always written.
        weights: says which weights these are (`nas.study.weights_key`), so that what is verified
            already is not written again; empty to write in any case.
        recovery: how networks train on before they are written; None to write them as they are.
    """

    supernet: Supernet
    task: Task
    amount: int
    rewrites: tuple[str, ...] = ()
    formats: tuple[str, ...] = ("hf",)
    weights: str = ""
    recovery: Recovery | None = None

    def exporters(self) -> list[Exporter]:
        """Return the formats' exporters, ``hf`` first.

        Raises:
            UserError: for an unknown format.
        """
        for name in self.formats:
            if name not in EXPORTERS:
                raise unknown("export format", name, EXPORTERS)
        return [EXPORTERS[name]() for name in dict.fromkeys(("hf", *self.formats))]

    def facts(self) -> dict[str, Any]:
        """Return what the artefacts depend on, JSON-ready: equal facts, equal artefacts."""
        return {
            "weights": self.weights,
            "amount": self.amount,
            "rewrites": list(self.rewrites),
            "recovery": {} if self.recovery is None else self.recovery.identity(),
            "formats": {exporter.name: not exporter.missing() for exporter in self.exporters()},
            "torch_version": torch.__version__,
        }


def export_subnet(
    source: ExportSource, arch: Arch, folder: Path, record: Mapping[str, Any], checker: Checker
) -> dict[str, Any]:
    """Write a subnetwork's folder, verify every artefact, and only then put it in place.

    Args:
        source: trained weights and task.
        arch: what to export.
        folder: `subnets/<arch_id>`; replaced, unless it holds just this, verified.
        record: the measured figures of the final front, kept in `export.json`.
        checker: loads and runs the artefacts.

    Returns:
        The content of `export.json`.

    Raises:
        ExportFailed: when an artefact cannot be made or differs from the supernet.
        UserError: when the folder cannot be written to.
    """
    measured = {name: record.get(name, {}) for name in ("measured", "predicted")}
    if done := _verified(source, folder):
        content = {**done, **measured}
        write_json(folder / REPORT_FILE, content)
        write_card(folder, arch, content)
        return content
    temporary = temporary_name(folder)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        content = {**_write(source, arch, temporary, checker), **measured}
        write_json(temporary / REPORT_FILE, content)
        write_card(temporary, arch, content)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    except OSError as error:
        raise UserError(
            f"cannot write {folder}: {error.strerror or error}; choose another folder or make room"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return content


def _verified(source: ExportSource, folder: Path) -> dict[str, Any]:
    """Return the content of `export.json` where it stands for what would be written again."""
    path = folder / REPORT_FILE
    if not source.weights or not path.is_file():
        return {}
    content = read_json(path, "export report")
    same = isinstance(content, dict) and content.get("source") == source.facts()
    return content if same else {}


def _write(source: ExportSource, arch: Arch, folder: Path, checker: Checker) -> dict[str, Any]:
    """Write and verify all formats; returns what `export.json` says of them."""
    shared = calibrated_view(source.supernet, arch, source.task).eval()
    reference = Reference.of(shared, source.task, source.amount)
    check_extraction(source, arch, reference)
    simulated = held_out_loss(shared, reference.batches, source.task)
    about: dict[str, Any] = {"supernet_loss": simulated}
    recovered = None
    if source.recovery is not None:
        recovered, gained = source.recovery(source.supernet, arch, source.task)
        reference = Reference.of(recovered, source.task, source.amount)
        simulated = held_out_loss(recovered, reference.batches, source.task)
        about["recovered"] = {**gained.to_dict(), "test_loss": simulated}
    handover, refused = handover_of(source, arch, recovered)
    reference.write(folder / REFERENCE_FILE)
    expected = Expected(reference, source.task, simulated, folder / REFERENCE_FILE)
    formats = {
        exporter.name: write_verified(exporter, handover, expected, folder, checker)
        for exporter in source.exporters()
    }
    (folder / REFERENCE_FILE).unlink()
    about["weight_bytes"] = handover.subnet.weight_bytes()
    if arch.family.causal:
        state = handover.subnet.init_state(1, source.task.seq_len)
        about["state_bytes_per_sequence"] = state_bytes(state)
    return {
        "arch_id": arch.id,
        "unit": source.task.unit,
        "rewrites": list(handover.rewrites),
        "rewrites_refused": refused,
        **about,
        "source": source.facts(),
        "formats": formats,
    }


def handover_of(
    source: ExportSource, arch: Arch, recovered: Subnet | None = None
) -> tuple[Handover, dict[str, str]]:
    """Return what exporters are given, and the rewrites that do not fit with their reasons.

    Args:
        source: trained weights and task.
        arch: which network.
        recovered: the network with weights of its own, which is not changed; None for the
            supernet's.
    """
    task = source.task
    about: dict[str, Any] = {
        "unit": task.unit,
        "vocab_size": task.vocab_size,
        "seq_len": task.seq_len,
    }
    input_form = None
    if isinstance(task, LabelledTask):
        about["classes"] = list(task.labels)
        input_form = task.input_form
    tokenizer = task.tokenizer if isinstance(task, LanguageModelTask) else None
    if recovered is None:
        subnet = calibrated_extract(source.supernet, arch, task)
    else:
        subnet = copy.deepcopy(recovered)
    refused: dict[str, str] = {}
    for name in source.rewrites:
        try:
            rewrite(subnet, name)
        except UserError as error:
            refused[name] = str(error)
    applied = tuple(name for name in source.rewrites if name not in refused)
    packed = subnet.pack().eval().requires_grad_(False)
    return Handover(packed, about, tokenizer, applied, input_form), refused


def check_extraction(source: ExportSource, arch: Arch, reference: Reference) -> None:
    """Refuse a network that, taken out, does not compute what it does in the supernet.

    Args:
        source: trained weights.
        arch: which network.
        reference: its logits in the supernet.

    Raises:
        ExportFailed: with the difference.
    """
    own = calibrated_extract(source.supernet, arch, source.task).eval()
    with torch.inference_mode():
        worst = max(float((own(x) - expected).abs().max()) for x, expected in reference.logits)
    if worst != 0.0:
        raise ExportFailed(f"{arch.id}, taken out of the supernet, differs from it by {worst:.2g}")
