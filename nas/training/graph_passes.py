"""Passes of archs that recur (the largest, the smallest, fixed lists) as CUDA graphs.

Forward and backward pass of an arch are one graph: parameters are views of the maximal tensors and
gradients are added to slices of the maximal gradients, both in the same memory in every step.
"""

from __future__ import annotations

from collections.abc import Hashable

from nas.arch_sampling import StepArch
from nas.training.batch import Batch
from nas.training.graphs import Graphs, Tensors
from nas.training.losses import Scored, SoftTargets
from nas.training.passes import Outcome, PlainPasses, annealed_blend
from nas.training.teacher import Teacher
from searchspace.arch import Arch
from searchspace.supernet import Supernet


class GraphPasses:
    """Passes that are replayed from the third step on in which they come.

    Args:
        plain: runs what is new, and what is captured.
        supernet: whose gradients are added to, on a CUDA device.
    """

    static = True

    def __init__(self, plain: PlainPasses, supernet: Supernet) -> None:
        self._plain, self._supernet = plain, supernet
        self._graphs = Graphs(supernet.device, supernet.trained_in_place)
        self._names: dict[Arch, tuple[str, ...]] = {}

    def backward(self, item: StepArch, batch: Batch, teacher: SoftTargets | None) -> Outcome:
        """Add an arch's gradient to the supernet's."""

        def run(tensors: Tensors) -> Tensors:
            outcome = self._plain.backward(item, _batch(tensors), _soft_targets(tensors))
            return outcome.hard, *_parts(outcome.word)

        key: Hashable = item.role, item.arch, item.weight, annealed_blend(self._supernet, item.arch)
        inputs = (*_tensors(batch), *_parts(teacher))
        replayed = self._graphs.has(key, inputs)
        hard, probs_NV, hidden_ND = self._graphs(f"the {item.role} network", key, run, inputs)
        if replayed:
            self._supernet.mark_used(self._names_of(item.arch))
        assert hard is not None
        word = None if probs_NV is None else SoftTargets(probs_NV, hidden_ND)
        # The graph's own is overwritten where the arch comes twice in a step.
        return Outcome(hard.clone(), word)

    def _names_of(self, arch: Arch) -> tuple[str, ...]:
        """Return the names of an arch's parameters."""
        if arch not in self._names:
            view = self._supernet.view(arch)
            self._names[arch] = tuple(name for name, _ in view.named_parameters())
        return self._names[arch]

    def teach(self, teacher: Teacher, batch: Batch) -> SoftTargets:
        """Return what a frozen teacher says of a batch."""

        def run(tensors: Tensors) -> Tensors:
            return _parts(self._plain.teach(teacher, _batch(tensors)))

        key = "teacher", id(teacher)
        probs_NV, hidden_ND = self._graphs("the teacher", key, run, _tensors(batch))
        assert probs_NV is not None
        return SoftTargets(probs_NV, hidden_ND)

    def forget(self) -> None:
        """Drop all graphs: another stage has another teacher."""
        self._graphs.forget()
        self._names.clear()


def _tensors(batch: Batch) -> Tensors:
    assert batch.scored.rows == slice(None)
    return batch.inputs, batch.targets, batch.scored.weight_N


def _batch(tensors: Tensors) -> Batch:
    inputs, targets, weight_N, *_ = tensors
    assert inputs is not None and targets is not None
    return Batch(inputs, targets, Scored(slice(None), weight_N))


def _parts(word: SoftTargets | None) -> Tensors:
    return (None, None) if word is None else (word.probs_NV, word.hidden_ND)


def _soft_targets(tensors: Tensors) -> SoftTargets | None:
    probs_NV, hidden_ND = tensors[3:]
    return None if probs_NV is None else SoftTargets(probs_NV, hidden_ND)
