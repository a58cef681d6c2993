"""What artefacts are compared with: the supernet's logits at several shapes, and held-out data.

Shapes: B batch, T tokens, V vocabulary or classes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from nas.tasks.base import Task
from searchspace.subnet import Subnet

SHAPES = ((1, 1), (2, 64), (3, 23))
"""Sequences and tokens of a decoder's inputs; of the others, only the first number counts."""


@dataclass(frozen=True)
class Reference:
    """Figures to be met.

    Args:
        causal: whether the network is a decoder.
        logits: inputs and the supernet's logits of them, fp32.
        batches: held-out inputs and targets.
        units: what the targets of all batches stand for: bytes, tokens or examples.
    """

    causal: bool
    logits: list[tuple[Tensor, Tensor]]
    batches: list[tuple[Tensor, Tensor]]
    units: int

    @staticmethod
    def of(network: Subnet, task: Task, amount: int) -> Reference:
        """Return the figures of a network of the supernet.

        Args:
            network: a view, ready to be judged.
            task: gives the data.
            amount: of the test split; see `Task`.
        """
        causal = network.arch.family.causal
        wanted = task.seq_len * max(batch for batch, _ in SHAPES) if causal else 3
        pairs = task.evaluation_batches("validation", wanted, max(b for b, _ in SHAPES))
        inputs, _ = pairs[0]
        logits = []
        with torch.inference_mode():
            for batch, tokens in SHAPES:
                part = (inputs[:batch, :tokens] if causal else inputs[:batch]).contiguous()
                logits.append((part, network(part).float()))
        batches = task.evaluation_batches("test", amount, 8)
        return Reference(causal, logits, batches, sum(task.units_of(t) for _, t in batches))

    def write(self, path: Path) -> None:
        """Write a safetensors file."""
        tensors: dict[str, Tensor] = {}
        for name, pairs in (("logits", self.logits), ("batches", self.batches)):
            for index, (inputs, outputs) in enumerate(pairs):
                tensors[f"{name}.{index}.inputs"] = inputs.clone().contiguous()
                tensors[f"{name}.{index}.outputs"] = outputs.clone().contiguous()
        facts = {"causal": self.causal, "units": self.units}
        save_file(tensors, path, {"facts": json.dumps(facts)})

    @staticmethod
    def read(path: Path) -> Reference:
        """Read what `write` wrote."""
        with safe_open(path, framework="pt") as file:
            facts = json.loads(file.metadata()["facts"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        pairs: dict[str, list[tuple[Tensor, Tensor]]] = {"logits": [], "batches": []}
        for name, found in pairs.items():
            while f"{name}.{len(found)}.inputs" in tensors:
                place = f"{name}.{len(found)}"
                found.append((tensors[f"{place}.inputs"], tensors[f"{place}.outputs"]))
        return Reference(facts["causal"], pairs["logits"], pairs["batches"], facts["units"])
