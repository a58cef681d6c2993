"""The folder itself: `config.json` and `model.safetensors`, and the tokenizer of a text task."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nas.export.base import Handover, Session
from nas.tasks.tokenizers import TOKENIZER_FILE
from searchspace.subnet import Subnet


class HuggingFaceExporter:
    """The subnetwork's own checkpoint."""

    name = "hf"
    summary = "config.json and model.safetensors"
    folder = ""
    max_difference = 1e-5

    def missing(self) -> str:
        """Return an empty text: nothing else is needed."""
        return ""

    def refusal(self, handover: Handover) -> str:
        """Return an empty text: every network has this form."""
        return ""

    def write(self, handover: Handover, folder: Path) -> Mapping[str, Any]:
        """Write the checkpoint; see `Exporter.write`."""
        facts = {
            "task": dict(handover.task),
            "architectures": ["searchspace.subnet.Subnet"],
            "torch_version": torch.__version__,
        }
        handover.subnet.save(folder, facts)
        if handover.tokenizer is not None:
            handover.tokenizer.save(folder / TOKENIZER_FILE)
        return {}

    def load(self, folder: Path) -> LoadedSubnet:
        """Return the network; see `Exporter.load`."""
        return LoadedSubnet(Subnet.load(folder))


class LoadedSubnet:
    """A subnetwork in PyTorch."""

    def __init__(self, subnet: Subnet) -> None:
        self.subnet = subnet

    def logits(self, inputs: Tensor) -> Tensor:
        """Return the logits; see `Loaded.logits`."""
        out: Tensor = self.subnet(inputs)
        return out

    def session(self, batch: int, max_tokens: int) -> Session:
        """Return what continues sequences; see `Loaded.session`."""
        state = self.subnet.init_state(batch, max_tokens)
        return lambda tokens_BT: self.subnet(tokens_BT, state)
