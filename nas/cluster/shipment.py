"""What an actor needs to evaluate archs, in a form that Ray shares among the actors of a node.

Ray reads arrays in place: actors of one node have one copy of the supernet's weights together.
Nothing has to be on the node, so the run folder need not be shared.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nas.calibration import (
    CALIBRATION_BATCH_SIZE,
    CALIBRATION_BATCHES,
    CALIBRATION_SEED,
    calibrated_view,
    needs_calibration,
)
from nas.cluster.actors import Evaluate
from nas.evaluation import held_out_loss
from nas.tasks.base import Task
from searchspace.arch import Arch
from searchspace.space import SearchSpace
from searchspace.supernet import Supernet


@dataclass(frozen=True)
class Array:
    """A tensor as bytes.

    Args:
        data: of any data type, flat.
        dtype: name of torch's.
        shape: of the tensor.
    """

    data: NDArray[np.uint8]
    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Array:
        """Take a tensor's content."""
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        return cls(flat.numpy(), str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))

    def tensor(self) -> Tensor:
        """Return the tensor on the same memory; it may not be written to."""
        dtype = getattr(torch, self.dtype)
        if not self.data.size:
            return torch.empty(self.shape, dtype=dtype)
        with warnings.catch_warnings():
            # What Ray shares among processes is not writable, and inference does not write.
            warnings.simplefilter("ignore", UserWarning)
            flat = torch.from_numpy(self.data)
        return flat.view(dtype).reshape(self.shape)


Batch = tuple[Array, Array]


@dataclass(frozen=True)
class Shipment:
    """A supernet and the data that its networks are judged by.

    Args:
        space: `SearchSpace.to_dict`.
        vocab_size: of the space.
        weights: the supernet's tensors by name.
        validation: inputs and targets.
        units: how many units the targets of each batch stand for.
        calibration: training batches for the statistics of norms that need them.
    """

    space: Mapping[str, Any]
    vocab_size: int
    weights: Mapping[str, Array]
    validation: tuple[Batch, ...]
    units: tuple[int, ...]
    calibration: tuple[Batch, ...]


def packed(supernet: Supernet, task: Task, validation: list[tuple[Tensor, Tensor]]) -> Shipment:
    """Pack what candidates are evaluated with.

    Args:
        supernet: the trained weights.
        task: says what the targets stand for, and gives the batches of calibration.
        validation: inputs and targets, as `Task.evaluation_batches` returns them.
    """
    space = supernet.space
    calibration = [
        task.train_batch(step, CALIBRATION_BATCH_SIZE, CALIBRATION_SEED)
        for step in range(CALIBRATION_BATCHES if _may_need_calibration(space) else 0)
    ]
    return Shipment(
        space.to_dict(),
        space.vocab_size,
        {name: Array.of(tensor) for name, tensor in supernet.state_dict().items()},
        tuple((Array.of(inputs), Array.of(targets)) for inputs, targets in validation),
        tuple(task.units_of(targets) for _, targets in validation),
        tuple((Array.of(inputs), Array.of(targets)) for inputs, targets in calibration),
    )


def unpacked(shipment: Shipment) -> Evaluate:
    """Return the function from an arch to its held-out loss."""
    space = SearchSpace.from_dict(shipment.space, shipment.vocab_size)
    supernet = Supernet(space, torch.Generator().manual_seed(0))
    for name, array in shipment.weights.items():
        if name in supernet.params:
            supernet.params[name] = nn.Parameter(array.tensor(), requires_grad=False)
        else:
            supernet.buffers[name] = array.tensor().clone()
    task = ShippedTask(shipment)
    whole = cast(Task, task)

    def evaluate(arch: Arch) -> float:
        return held_out_loss(calibrated_view(supernet, arch, whole), task.validation, task)

    return evaluate


class ShippedTask:
    """As much of a task as evaluation asks for.

    Args:
        shipment: has its batches.
    """

    def __init__(self, shipment: Shipment) -> None:
        self.validation = [(x.tensor(), y.tensor()) for x, y in shipment.validation]
        self._calibration = [(x.tensor(), y.tensor()) for x, y in shipment.calibration]
        targets = [y for _, y in self.validation]
        self._units = {id(y): n for y, n in zip(targets, shipment.units, strict=True)}

    def units_of(self, targets: Tensor) -> int:
        """Return how many units the targets of one of its batches stand for."""
        return self._units[id(targets)]

    def train_batch(self, step: int, batch_size: int, seed: int) -> tuple[Tensor, Tensor]:
        """Return a batch of calibration."""
        if (batch_size, seed) != (CALIBRATION_BATCH_SIZE, CALIBRATION_SEED):
            raise ValueError("only the batches of calibration are there")
        return self._calibration[step]


def _may_need_calibration(space: SearchSpace) -> bool:
    """Whether an arch of a space has norms with running statistics; each choice is looked at."""
    archs = [space.largest(), space.smallest(), *space.one_change_from_largest()]
    return any(needs_calibration(arch) for arch in archs)
