"""Additive scores: what the loss of the largest network gains when one block of it is replaced.

For every layer slot and every choice of its mixer or FFN, that one sub-block is replaced in the
largest network of a width, with the supernet's weights, and the loss on held-out tokens is taken.
A norm belongs to both halves of a layer, so it changes in both; the FFN's score is then what it
adds to the same layer under that norm, and the two scores of a layer add up to what was evaluated.

Letters: L layer slots, M choices of a mixer, F of an FFN.

Source: Bercovich et al. 2024, "Puzzle: Distillation-Based NAS for Inference-Optimized LLMs",
replace-1-block scores, added up under hard limits by a mixed integer programme.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nas.assignment.choices import HalfChoice, LayerChoices, joined
from nas.assignment.depth import block_influence, run_layer
from nas.assignment.problem import Floats
from nas.assignment.score_file import ScoreFile
from nas.calibration import calibrated_view, needs_calibration
from nas.evaluation import EvaluationFailed, held_out_loss
from nas.progress import Progress
from nas.tasks.base import Task
from searchspace.arch import Arch, LayerArch
from searchspace.errors import UserError
from searchspace.subnet import Subnet
from searchspace.supernet import Supernet

Batches = Sequence[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class WidthScores:
    """Scores of all choices of one width, in nats per unit of the task.

    Args:
        choices: what they are scores of.
        loss: of the reference, the largest network of the width.
        mixers: loss increase of each mixer in each slot, shape (L, M); infinite where it failed.
        ffns: loss increase of each FFN in each slot, beside the reference's mixer, shape (L, F).
        skips: loss increase without each layer, shape (L,).
        influence: block influence of each layer, shape (L,).
    """

    choices: LayerChoices
    loss: float
    mixers: Floats
    ffns: Floats
    skips: Floats
    influence: Floats


class Scorer:
    """Evaluates networks that differ from the largest one, each of them once.

    Args:
        supernet: trained weights.
        task: says what losses are divided by.
        batches: held-out inputs and targets.
        known: figures so far; new ones are added at once.
    """

    def __init__(self, supernet: Supernet, task: Task, batches: Batches, known: ScoreFile) -> None:
        self._supernet, self._task, self._batches = supernet, task, batches
        self._known = known

    def score(self, choices: LayerChoices, progress: Progress) -> WidthScores:
        """Return the scores of every choice of a width; what is known already is not repeated.

        Raises:
            UserError: when the largest network cannot be evaluated.
        """
        loss = self._reference_loss(choices)
        self._evaluate_missing(choices, progress)
        slots = range(len(choices.reference.layers))

        def gain(slot: int, layer: LayerArch) -> float:
            return self._known_loss(choices.with_layer(slot, layer)) - loss

        def ffn_gain(slot: int, ffn: HalfChoice) -> float:
            beside = (choices.reference_half(half, ffn.norm) for half in ("mixer", "ffn"))
            base = gain(slot, joined(*beside))
            total = gain(slot, _beside(choices, ffn, "ffn"))
            return math.inf if math.isinf(total) or math.isinf(base) else total - base

        def mixer_gain(slot: int, mixer: HalfChoice) -> float:
            return gain(slot, _beside(choices, mixer, "mixer"))

        return WidthScores(
            choices,
            loss,
            np.array([[mixer_gain(slot, mixer) for mixer in choices.mixers] for slot in slots]),
            np.array([[ffn_gain(slot, ffn) for ffn in choices.ffns] for slot in slots]),
            np.array([gain(slot, LayerArch()) for slot in slots]),
            np.array(self.influence(choices)),
        )

    def loss(self, arch: Arch) -> float:
        """Return the loss of any arch; infinite where it cannot be evaluated."""
        if arch.id not in self._known:
            self._keep(arch, partial(self._whole, arch))
        return self._known_loss(arch)

    def _reference_loss(self, choices: LayerChoices) -> float:
        loss = self.loss(choices.reference)
        if not math.isfinite(loss):
            raise UserError(
                f"the largest network of width {choices.d_model} has no finite loss, so nothing "
                "can be compared with it; train the supernet again"
            )
        return loss

    def _known_loss(self, arch: Arch) -> float:
        value = self._known[arch.id]
        return math.inf if value is None else float(value)

    def _keep(self, arch: Arch, evaluate: Callable[[], float]) -> None:
        try:
            self._known.put(arch.id, evaluate())
        except EvaluationFailed:
            self._known.put(arch.id, None)

    def _whole(self, arch: Arch) -> float:
        view = calibrated_view(self._supernet, arch, self._task)
        return held_out_loss(view, self._batches, self._task)

    def _evaluate_missing(self, choices: LayerChoices, progress: Progress) -> None:
        wanted = [list(_variants(choices, s)) for s in range(len(choices.reference.layers))]
        total, done = sum(map(len, wanted)), 0
        streams: list[Tensor] | None = None
        for slot, archs in enumerate(wanted):
            missing = [arch for arch in archs if arch.id not in self._known]
            done += len(archs) - len(missing)
            for arch in missing:
                streams = self._streams(choices, slot) if streams is None else streams
                self._keep(arch, partial(self._rest, arch, slot, streams))
                done += 1
                progress.update(done / total, f"width {choices.d_model}, {done} of {total}")
            streams = None
        progress.update(1.0, f"width {choices.d_model}, {total} of {total}")

    def _streams(self, choices: LayerChoices, slot: int) -> list[Tensor]:
        """Return the residual stream that goes into a slot of the reference, batch by batch."""
        view = self._supernet.view(choices.reference)
        streams = []
        with torch.inference_mode():
            for inputs, _ in self._batches:
                x_BTD = view.ends.embed(inputs)
                for before in range(slot):
                    x_BTD = run_layer(view, before, x_BTD)
                streams.append(x_BTD)
        return streams

    def _rest(self, arch: Arch, slot: int, streams: list[Tensor]) -> float:
        """Return the loss of an arch that is the reference before a slot."""
        if needs_calibration(arch):
            return self._whole(arch)
        network = _From(self._supernet.view(arch), slot)
        batches: Any = [
            ((stream, inputs), targets)
            for stream, (inputs, targets) in zip(streams, self._batches, strict=True)
        ]
        return held_out_loss(network, batches, self._task)

    def influence(self, choices: LayerChoices) -> list[float]:
        """Return the block influence of every layer of the largest network of a width."""
        name = f"influence/{choices.reference.id}"
        if name not in self._known:
            self._known.put(name, self._measured_influence(choices.reference))
        return [float(value) for value in self._known[name]]

    def _measured_influence(self, reference: Arch) -> list[float]:
        view = calibrated_view(self._supernet, reference, self._task)
        totals, tokens = np.zeros(len(reference.layers)), 0
        with torch.inference_mode():
            for inputs, _ in self._batches:
                x_BTD = view.ends.embed(inputs)
                num = x_BTD.shape[0] * x_BTD.shape[1]
                for slot in range(len(reference.layers)):
                    after_BTD = run_layer(view, slot, x_BTD)
                    totals[slot] += num * block_influence(x_BTD, after_BTD)
                    x_BTD = after_BTD
                tokens += num
        return [float(value) for value in totals / tokens]


class _From(nn.Module):
    """A network from one layer slot on."""

    def __init__(self, network: Subnet, slot: int) -> None:
        super().__init__()
        self._network, self._slot = network, slot

    def forward(self, given: tuple[Tensor, Tensor]) -> Tensor:
        """Return the logits for (residual stream that goes into the slot, inputs)."""
        x_BTD, inputs = given
        for slot in range(self._slot, len(self._network.arch.layers)):
            x_BTD = run_layer(self._network, slot, x_BTD)
        return self._network.ends.logits(x_BTD, inputs)


def _beside(choices: LayerChoices, choice: HalfChoice, half: str) -> LayerArch:
    """Return the layer of a choice and the reference's other half under the same norm."""
    if half == "mixer":
        return joined(choice, choices.reference_half("ffn", choice.norm))
    return joined(choices.reference_half("mixer", choice.norm), choice)


def _variants(choices: LayerChoices, slot: int) -> Iterator[Arch]:
    """Yield every arch that the scores of a slot need, each once."""
    seen: set[str] = set()
    layers = [_beside(choices, mixer, "mixer") for mixer in choices.mixers]
    layers += [_beside(choices, ffn, "ffn") for ffn in choices.ffns]
    for layer in [*layers, LayerArch()]:
        arch = choices.with_layer(slot, layer)
        if arch.id not in seen:
            seen.add(arch.id)
            yield arch
