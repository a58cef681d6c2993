"""Forward and backward passes of a step: what they give, and the plain way to run them.

Nothing here makes the host wait for a GPU: losses stay there until a step's are read at once.

Shapes: N scored positions, V vocabulary or classes.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from nas.arch_sampling import LARGEST, StepArch
from nas.config import TrainConfig
from nas.training.batch import Batch
from nas.training.losses import (
    Prediction,
    SoftTargets,
    hard_loss,
    loss_in_chunks,
    predict,
    soft_targets,
    training_loss,
)
from nas.training.teacher import Teacher
from searchspace.arch import Arch
from searchspace.norms import NORMS, PRepBN
from searchspace.specs import ABSENT
from searchspace.subnet import Subnet
from searchspace.supernet import Supernet

Network = Callable[[Arch], Subnet]
"""Gives the network of an arch, on the supernet's weights and adding to its gradients."""
Autocast = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True)
class Outcome:
    """What one arch's passes give.

    Args:
        hard: its loss on the data, a scalar where the training runs.
        word: what it teaches the others of its step; None unless it does.
    """

    hard: Tensor
    word: SoftTargets | None = None


class Passes(Protocol):
    """How the networks of a step are run."""

    static: bool
    """Whether batches keep all positions, so that shapes repeat; see `Batch.on`."""

    def backward(self, item: StepArch, batch: Batch, teacher: SoftTargets | None) -> Outcome:
        """Add an arch's gradient to the supernet's."""
        ...

    def teach(self, teacher: Teacher, batch: Batch) -> SoftTargets:
        """Return what a frozen teacher says of a batch."""
        ...

    def forget(self) -> None:
        """Drop what was kept for archs that recur: another stage begins."""
        ...


class PlainPasses:
    """Operator by operator, each network made anew.

    Args:
        supernet: whose gradients are added to.
        config: the recipe.
        autocast: gives the context of forward passes.
        network: makes networks; views of the supernet where it is None.
    """

    static = False

    def __init__(
        self,
        supernet: Supernet,
        config: TrainConfig,
        autocast: Autocast,
        network: Network | None = None,
    ) -> None:
        self._config, self._autocast = config, autocast
        self._network = network or (lambda arch: supernet.view(arch, train=True))

    def backward(self, item: StepArch, batch: Batch, teacher: SoftTargets | None) -> Outcome:
        """Add an arch's gradient to the supernet's."""
        model = self._network(item.arch)
        loss, prediction = self._losses_without_teacher(model, batch, teacher)
        hard = loss
        if prediction is not None:
            hard = hard_loss(prediction, batch.targets, batch.scored)
            weights = self._config.distillation, self._config.hidden_distillation
            loss = training_loss(hard, prediction, teacher, *weights)
        assert hard is not None and loss is not None
        with warnings.catch_warnings():
            # The gradient slices are strided on purpose (see Supernet).
            warnings.filterwarnings("ignore", message="grad and param do not obey")
            (item.weight * loss).backward()
        teaches = item.role == LARGEST and teacher is None and prediction is not None
        word = soft_targets(prediction) if teaches and prediction is not None else None
        return Outcome(hard.detach(), word)

    def _losses_without_teacher(
        self, model: Subnet, batch: Batch, teacher: SoftTargets | None
    ) -> tuple[Tensor | None, Prediction | None]:
        """Return the loss where nothing else is needed, or the prediction."""
        given = model, batch.inputs, batch.targets
        with self._autocast():
            if teacher is None and not self._config.distillation:
                loss = loss_in_chunks(*given, batch.scored)
                if loss is not None:
                    return loss, None
            match_hidden = teacher is not None and teacher.hidden_ND is not None
            return None, predict(*given, match_hidden, batch.scored)

    def teach(self, teacher: Teacher, batch: Batch) -> SoftTargets:
        """Return what a frozen teacher says of a batch."""
        with self._autocast():
            return teacher(batch)

    def forget(self) -> None:
        """Nothing is kept."""


@contextmanager
def unchanged(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Put the values of tensors back behind the block, for passes that are only tried."""
    before = [tensor.clone() for tensor in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)


def annealed_blend(supernet: Supernet, arch: Arch) -> float:
    """Return what changes from step to step in an arch's networks; 0 without annealed norms."""
    return supernet.norm_blend if _has_annealed_norms(arch) else 0.0


@functools.lru_cache(maxsize=64)
def _has_annealed_norms(arch: Arch) -> bool:
    names = {spec.norm for _, spec in arch.named_sub_blocks()}
    names |= {arch.family.final_norm, arch.family.embedding_norm}
    return any(issubclass(NORMS[name], PRepBN) for name in names - {ABSENT})
