"""Handing a subnetwork over: a folder that loads on its own, and the proof that it is the same.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nas.calibration import calibrated_extract, calibrated_view, needs_calibration
from nas.evaluation import held_out_loss
from nas.tasks.base import Task
from nas.tasks.labelled import LabelledTask
from nas.tasks.language_model import LanguageModelTask
from searchspace.arch import Arch
from searchspace.errors import UserError
from searchspace.files import temporary_name, write_json
from searchspace.rewrites import rewrite
from searchspace.subnet import Subnet, state_bytes
from searchspace.supernet import Supernet

MAX_LOGIT_DIFFERENCE = 1e-5
"""Of fp32 logits, relative to the largest one where that is above 1."""
MAX_OTHER_ORDER_DIFFERENCE = 1e-4
"""The same where sums are taken in another order: step by step, folded norms, rewrites."""
MAX_ROUNDED_LOSS_DIFFERENCE = 0.01
"""In nats per unit, of low precisions; or as a share of the loss where that is more."""
CHECK_TOKENS = 64


class ExportFailed(RuntimeError):
    """An exported folder did not compute what the supernet computes."""


@dataclass(frozen=True)
class ExportSource:
    """Where exported networks come from.

    Args:
        supernet: the trained weights.
        task: for tokenizer and held-out data.
        amount: how much of the test split the verified loss is of; see `Task`.
        rewrites: names in `searchspace.rewrites.REWRITES`, applied to networks that they fit.
    """

    supernet: Supernet
    task: Task
    amount: int
    rewrites: tuple[str, ...] = ()


def export_subnet(
    source: ExportSource, arch: Arch, folder: Path, record: Mapping[str, Any]
) -> dict[str, Any]:
    """Write a subnetwork's folder, load it again, verify it, and only then put it in place.

    Args:
        source: trained weights and task.
        arch: what to export.
        folder: `subnets/<arch_id>`; replaced if it exists.
        record: the measured figures of the final front, kept in `export.json`.

    Returns:
        The content of `export.json`.

    Raises:
        ExportFailed: when the reloaded network differs from the supernet.
        UserError: when the folder cannot be written to.
    """
    temporary = temporary_name(folder)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        refused = _write(source, arch, temporary)
        content = {
            "arch_id": arch.id,
            "rewrites": [name for name in source.rewrites if name not in refused],
            "rewrites_refused": refused,
            "verified": verify(source, arch, temporary),
            "measured": record.get("measured", {}),
            "predicted": record.get("predicted", {}),
        }
        write_json(temporary / "export.json", content)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    except OSError as error:
        raise UserError(
            f"cannot write {folder}: {error.strerror or error}; choose another folder or make room"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return content


def _write(source: ExportSource, arch: Arch, folder: Path) -> dict[str, str]:
    """Write the checkpoint; return the rewrites that do not fit the network, and why."""
    task = source.task
    about: dict[str, Any] = {
        "unit": task.unit,
        "vocab_size": task.vocab_size,
        "seq_len": task.seq_len,
    }
    if isinstance(task, LabelledTask):
        about["classes"] = list(task.labels)
    facts = {
        "task": about,
        "architectures": ["searchspace.subnet.Subnet"],
        "torch_version": torch.__version__,
    }
    subnet = calibrated_extract(source.supernet, arch, task)
    refused: dict[str, str] = {}
    for name in source.rewrites:
        try:
            rewrite(subnet, name)
        except UserError as error:
            refused[name] = str(error)
    subnet.pack().save(folder, facts)
    if isinstance(task, LanguageModelTask) and task.tokenizer is not None:
        task.tokenizer.save(folder / "tokenizer.json")
    return refused


def verify(source: ExportSource, arch: Arch, folder: Path) -> dict[str, Any]:
    """Load an exported folder and compare it with the supernet.

    Three things are checked: the extracted network is the supernet's own within
    `MAX_LOGIT_DIFFERENCE`; the reloaded one computes the same (its numbers in fp32, the same loss
    within `MAX_ROUNDED_LOSS_DIFFERENCE` in low precision); and, of a decoder, prefill followed by
    single steps gives the logits of the whole sequence.

    Raises:
        ExportFailed: naming what differs and by how much.
    """
    (inputs, _), *_ = source.task.evaluation_batches("validation", source.task.seq_len, 1)
    if arch.family.kind != "vit":
        inputs = inputs[:, :CHECK_TOKENS]
    reloaded = Subnet.load(folder)
    shared = calibrated_view(source.supernet, arch, source.task).eval()
    own = calibrated_extract(source.supernet, arch, source.task).eval()
    with torch.inference_mode():
        expected = shared(inputs)
        extracted = _max_difference(own(inputs), expected)
        found = reloaded(inputs)
        steps = 0.0
        if arch.family.causal:
            steps = _max_difference(_step_by_step(reloaded, inputs), found)
    difference = _max_difference(found, expected)
    batches = source.task.evaluation_batches("test", source.amount, 8)
    loss = held_out_loss(reloaded, batches, source.task)
    # Low precisions round where the supernet simulates it: a value on the edge may fall either way.
    is_fp32 = all(p == "fp32" for layer in arch.layers for p in
                  (layer.mixer_precision, layer.ffn_precision))  # fmt: skip
    result: dict[str, Any] = {
        "max_logit_difference": difference,
        "max_extracted_logit_difference": extracted,
        "max_step_logit_difference": steps,
        "loss": loss,
        "weight_bytes": reloaded.weight_bytes(),
        "file_bytes": (folder / "model.safetensors").stat().st_size,
    }
    if arch.family.causal:
        state = reloaded.init_state(1, source.task.seq_len)
        result["state_bytes_per_sequence"] = state_bytes(state)
    scale = max(1.0, float(expected.abs().max()))
    other_order = needs_calibration(arch) or bool(reloaded.rewrites)
    allowed = MAX_OTHER_ORDER_DIFFERENCE if other_order else MAX_LOGIT_DIFFERENCE
    checks = {
        "extracted network": extracted <= MAX_LOGIT_DIFFERENCE * scale,
        "reloaded network": difference <= allowed * scale or not is_fp32,
        "step-by-step logits": steps <= MAX_OTHER_ORDER_DIFFERENCE * scale or not is_fp32,
    }
    if not is_fp32:
        simulated = held_out_loss(shared, batches, source.task)
        result["simulated_loss"] = simulated
        allowed = MAX_ROUNDED_LOSS_DIFFERENCE * max(1.0, simulated)
        checks["loss in low precision"] = abs(simulated - loss) <= allowed
    for what, passed in checks.items():
        if not passed:
            raise ExportFailed(f"{folder.name}: {what} differs from the supernet: {result}")
    return result


def _max_difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max())


def _step_by_step(subnet: Subnet, inputs_BT: Tensor) -> Tensor:
    half = inputs_BT.shape[1] // 2
    state = subnet.init_state(len(inputs_BT), inputs_BT.shape[1])
    parts = [subnet(inputs_BT[:, :half], state)]
    parts += [subnet(inputs_BT[:, t : t + 1], state) for t in range(half, inputs_BT.shape[1])]
    return torch.cat(parts, dim=1)
