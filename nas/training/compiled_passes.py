"""Passes of archs that recur by `torch.compile`.

Only a few networks are compiled, those that come first for a second time: in a sandwich step the
largest and the smallest. Compiling takes tens of seconds, random archs come once.
"""

from __future__ import annotations

import logging
from collections import Counter

import torch

from hw_profiles.backends.cuda.graph_call import first_line
from nas.arch_sampling import StepArch
from nas.config import TrainConfig
from nas.training.batch import Batch
from nas.training.losses import SoftTargets
from nas.training.passes import Autocast, Outcome, PlainPasses, annealed_blend, unchanged
from nas.training.teacher import Teacher
from searchspace.arch import Arch
from searchspace.subnet import Subnet
from searchspace.supernet import Supernet

MAX_NETWORKS = 3
RECOMPILE_LIMIT = 64
"""PyTorch's own limit of 8 is one for all networks; beyond it they are silently not compiled."""

log = logging.getLogger(__name__)


class CompiledPasses:
    """Passes with the layers of recurring networks compiled; ends and losses are not.

    A compiled network is one view of the supernet that is kept: its parameters and gradients are
    slices of tensors that stay where they are.

    Args:
        supernet: whose gradients are added to.
        config: the recipe.
        autocast: gives the context of forward passes.
    """

    static = True

    def __init__(self, supernet: Supernet, config: TrainConfig, autocast: Autocast) -> None:
        self._supernet = supernet
        self._plain = PlainPasses(supernet, config, autocast, self._network)
        self._compiled: dict[Arch, tuple[Subnet, tuple[str, ...]]] = {}
        self._seen: Counter[Arch] = Counter()
        self._num_tried = 0

    def backward(self, item: StepArch, batch: Batch, teacher: SoftTargets | None) -> Outcome:
        """Add an arch's gradient to the supernet's."""
        if self._is_due(item.arch):
            self._compile(item, batch, teacher)
        return self._plain.backward(item, batch, teacher)

    def teach(self, teacher: Teacher, batch: Batch) -> SoftTargets:
        """Return what a frozen teacher says of a batch."""
        return self._plain.teach(teacher, batch)

    def forget(self) -> None:
        """Nothing is dropped: compiled networks do not depend on the teacher."""

    def _is_due(self, arch: Arch) -> bool:
        """Whether this is the second time of an arch, and there is room for it."""
        if self._num_tried >= MAX_NETWORKS or annealed_blend(self._supernet, arch):
            return False
        self._seen[arch] += 1
        return self._seen[arch] == 2

    def _network(self, arch: Arch) -> Subnet:
        if arch not in self._compiled:
            return self._supernet.view(arch, train=True)
        network, names = self._compiled[arch]
        self._supernet.mark_used(names)
        return network

    def _compile(self, item: StepArch, batch: Batch, teacher: SoftTargets | None) -> None:
        """Compile an arch's layers by a trial of both passes, which leaves no trace."""
        from torch._dynamo import config
        from torch._dynamo.utils import counters

        self._num_tried += 1
        network = self._supernet.view(item.arch, train=True)
        names = tuple(name for name, _ in network.named_parameters())
        network.features = torch.compile(network.features, dynamic=False)  # type: ignore[method-assign]
        self._compiled[item.arch] = network, names
        limits = {"recompile_limit": RECOMPILE_LIMIT, "fail_on_recompile_limit_hit": True}
        try:
            with unchanged(self._supernet.trained_in_place()), config.patch(limits):
                self._plain.backward(item, batch, teacher)
        # Tracing and generating code run through all of PyTorch; there is no common exception.
        except Exception as error:
            self._give_up(item, f"{type(error).__name__}: {first_line(error)}")
        else:
            # Not one graph more: networks of one structure share theirs.
            if not counters["stats"]["unique_graphs"]:
                self._give_up(item, "torch.compile left it as it is")

    def _give_up(self, item: StepArch, reason: str) -> None:
        del self._compiled[item.arch]
        log.warning("the %s network is not compiled: %s", item.role, reason)
