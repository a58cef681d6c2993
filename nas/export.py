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

from nas.evaluation import held_out_loss
from nas.tasks.language_model import LanguageModelTask
from searchspace.arch import Arch
from searchspace.errors import UserError
from searchspace.files import temporary_name, write_json
from searchspace.subnet import Subnet, state_bytes
from searchspace.supernet import Supernet

MAX_LOGIT_DIFFERENCE = 1e-5
MAX_INT8_LOSS_DIFFERENCE = 0.01
CHECK_TOKENS = 64


class ExportFailed(RuntimeError):
    """An exported folder did not compute what the supernet computes."""


@dataclass(frozen=True)
class ExportSource:
    """Where exported networks come from.

    Args:
        supernet: the trained weights.
        task: for tokenizer and held-out data.
        split_tokens: held-out tokens of the test files for the verified loss.
    """

    supernet: Supernet
    task: LanguageModelTask
    split_tokens: int


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
        _write(source, arch, temporary)
        content = {
            "arch_id": arch.id,
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


def _write(source: ExportSource, arch: Arch, folder: Path) -> None:
    task = source.task
    facts = {
        "task": {"unit": task.unit, "vocab_size": task.vocab_size, "seq_len": task.seq_len},
        "architectures": ["searchspace.subnet.Subnet"],
        "torch_version": torch.__version__,
    }
    source.supernet.extract(arch).pack().save(folder, facts)
    if task.tokenizer is not None:
        task.tokenizer.save(folder / "tokenizer.json")


def verify(source: ExportSource, arch: Arch, folder: Path) -> dict[str, Any]:
    """Load an exported folder and compare it with the supernet.

    Three things are checked: the extracted network is the supernet's own, bit for bit or within
    `MAX_LOGIT_DIFFERENCE`; the reloaded one computes the same (exactly its numbers in fp32, the
    same loss within `MAX_INT8_LOSS_DIFFERENCE` where layers run in int8); and prefill followed by
    single steps gives the logits of the whole sequence.

    Raises:
        ExportFailed: naming what differs and by how much.
    """
    (inputs, _), *_ = source.task.evaluation_batches("validation", source.task.seq_len, 1)
    inputs = inputs[:, :CHECK_TOKENS]
    reloaded = Subnet.load(folder)
    shared = source.supernet.view(arch).eval()
    with torch.inference_mode():
        expected = shared(inputs)
        extracted = _max_difference(source.supernet.extract(arch)(inputs), expected)
        found = reloaded(inputs)
        steps = _max_difference(_step_by_step(reloaded, inputs), found)
    difference = _max_difference(found, expected)
    batches = source.task.evaluation_batches("test", source.split_tokens, 8)
    loss = held_out_loss(reloaded, batches, source.task)
    # int8 rounds where the supernet simulates rounding: a value on the edge may fall either way.
    is_fp32 = all(p == "fp32" for layer in arch.layers for p in
                  (layer.mixer_precision, layer.ffn_precision))  # fmt: skip
    result: dict[str, Any] = {
        "max_logit_difference": difference,
        "max_extracted_logit_difference": extracted,
        "max_step_logit_difference": steps,
        "loss": loss,
        "weight_bytes": reloaded.weight_bytes(),
        "file_bytes": (folder / "model.safetensors").stat().st_size,
        "state_bytes_per_sequence": state_bytes(reloaded.init_state(1, source.task.seq_len)),
    }
    checks = {
        "extracted network": extracted <= MAX_LOGIT_DIFFERENCE,
        "reloaded network": difference <= MAX_LOGIT_DIFFERENCE or not is_fp32,
        "step-by-step logits": steps <= MAX_LOGIT_DIFFERENCE * 10 or not is_fp32,
    }
    if not is_fp32:
        simulated = held_out_loss(shared, batches, source.task)
        result["simulated_int8_loss"] = simulated
        checks["int8 loss"] = abs(simulated - loss) <= MAX_INT8_LOSS_DIFFERENCE
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
