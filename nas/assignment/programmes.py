"""The assignment problems of a run: one per width and depth, and the arch that a choice is.

Letters: L layer slots.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from nas.assignment.choices import HalfChoice, Norm, joined
from nas.assignment.costs import CostModel
from nas.assignment.depth import LossWithout, skipped_by_depth
from nas.assignment.problem import AssignmentProblem, Coupling, Floats, Slot
from nas.assignment.scores import WidthScores
from searchspace.arch import Arch, LayerArch
from searchspace.specs import EndsSpec

SKIP = "skip"


@dataclass(frozen=True)
class Option:
    """One choice of a half: what stands there, or that its whole layer is skipped."""

    half: HalfChoice | None
    score: float

    @property
    def norm(self) -> Norm:
        """What the two halves of a layer agree in."""
        return self.half.norm if self.half else (SKIP, SKIP)

    @property
    def absent(self) -> bool:
        """Whether this half is left out of a layer that stays."""
        return self.half is not None and self.half.spec is None


@dataclass(frozen=True)
class DepthProgramme:
    """Which blocks to take at one width and depth.

    Args:
        problem: two slots per layer that stays, the mixer first.
        options: what the choices of each slot are.
        reference: the largest arch of the width.
        stay: the layer slots that the problem is about.
        skipped: layer slots that are skipped whatever is chosen.
    """

    problem: AssignmentProblem
    options: tuple[tuple[Option, ...], ...]
    reference: Arch
    stay: tuple[int, ...]
    skipped: frozenset[int]

    def arch(self, choice: Sequence[int]) -> Arch:
        """Return the arch that a choice is."""
        taken = [options[i] for options, i in zip(self.options, choice, strict=True)]
        layers = [LayerArch()] * len(self.reference.layers)
        for number, slot in enumerate(self.stay):
            mixer, ffn = taken[2 * number].half, taken[2 * number + 1].half
            if mixer is not None and ffn is not None:
                layers[slot] = joined(mixer, ffn)
        return Arch(
            self.reference.d_model, self.reference.head_dim, self.reference.vocab_size,
            tuple(layers), self.reference.family,
        )  # fmt: skip


def depth_programmes(
    scores: WidthScores,
    model: CostModel,
    min_depth: int,
    order: str,
    loss_without: LossWithout,
) -> Iterator[DepthProgramme]:
    """Yield the problems of one width, from all layers to the fewest.

    Args:
        scores: of the width.
        model: what sub-blocks cost.
        min_depth: fewest layers that stay.
        order: one of `depth.ORDERS`; ``"additive"`` gives one problem in which whole layers may be
            skipped at their own score.
        loss_without: the loss of the largest network of the width with slots skipped.
    """
    if order == "additive":
        may_skip = len(scores.choices.reference.layers) - min_depth
        yield _programme(scores, model, frozenset(), scores.loss, may_skip)
        return
    ranks = scores.influence.tolist(), scores.skips.tolist()
    for skipped in skipped_by_depth(order, *ranks, min_depth, loss_without):
        base = loss_without(skipped) if skipped else scores.loss
        if math.isfinite(base):
            yield _programme(scores, model, skipped, base, 0)


def _programme(
    scores: WidthScores, model: CostModel, skipped: frozenset[int], base: float, may_skip: int
) -> DepthProgramme:
    reference = scores.choices.reference
    stay = tuple(slot for slot in range(len(reference.layers)) if slot not in skipped)
    options = list(chain.from_iterable(_options(scores, slot, may_skip > 0) for slot in stay))
    names = [f"layers[{slot}].{half}" for slot in stay for half in ("mixer", "ffn")]
    rules = list(chain.from_iterable(_layer_rules(options, 2 * i) for i in range(len(stay))))
    if may_skip:
        mixers = {2 * i: _flags(options[2 * i], lambda o: o.half is None) for i in range(len(stay))}
        rules.append(Coupling(mixers, 0.0, float(may_skip)))
    problem = AssignmentProblem(
        [_slot(name, items, model) for name, items in zip(names, options, strict=True)],
        base,
        model.fixed(EndsSpec(reference.d_model, reference.vocab_size, reference.family)),
        rules,
        model.once,
        model.curves,
    )
    return DepthProgramme(problem, tuple(options), reference, stay, skipped)


def _options(
    scores: WidthScores, slot: int, may_skip: bool
) -> tuple[tuple[Option, ...], tuple[Option, ...]]:
    """Return the choices of a layer's halves that could be evaluated."""
    choices = scores.choices
    mixers = [Option(half, s) for half, s in zip(choices.mixers, scores.mixers[slot], strict=True)]
    ffns = [Option(half, s) for half, s in zip(choices.ffns, scores.ffns[slot], strict=True)]
    if may_skip:
        mixers.append(Option(None, float(scores.skips[slot])))
        ffns.append(Option(None, 0.0))
    finite = [tuple(o for o in items if np.isfinite(o.score)) for items in (mixers, ffns)]
    return finite[0], finite[1]


def _slot(name: str, options: Sequence[Option], model: CostModel) -> Slot:
    specs = [option.half.spec if option.half else None for option in options]
    scores = np.array([option.score for option in options])
    return Slot(name, scores, model.costs(specs), model.traits(specs))


def _layer_rules(options: Sequence[Sequence[Option]], first: int) -> Iterator[Coupling]:
    """Yield what the two halves of a layer owe each other."""
    pair = {first: options[first], first + 1: options[first + 1]}
    norms = sorted({option.norm for items in pair.values() for option in items})
    for norm in norms if len(norms) > 1 else []:
        flags = {i: np.array([float(o.norm == norm) for o in items]) for i, items in pair.items()}
        yield Coupling({first: flags[first], first + 1: -flags[first + 1]}, 0.0, 0.0)
    absent = {i: _flags(items, lambda x: x.absent) for i, items in pair.items()}
    if all(flags.any() for flags in absent.values()):
        yield Coupling(absent, 0.0, 1.0)


def _flags(options: Sequence[Option], is_so: Callable[[Option], bool]) -> Floats:
    return np.array([float(is_so(option)) for option in options])
