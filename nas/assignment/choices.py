"""What a layer slot can take: the mixer and the FFN sub-blocks of a space at one width.

A layer's norm is shared by its two sub-blocks, so each choice of a half carries a norm, and the two
halves of a layer must agree in it.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from functools import cached_property

from searchspace.arch import Arch, LayerArch
from searchspace.space import SearchSpace
from searchspace.space.halves import FFNHalf, MixerHalf
from searchspace.specs import ABSENT, SubBlockSpec

Norm = tuple[str, str]
"""Norm and its placement."""


@dataclass(frozen=True)
class HalfChoice:
    """One way to fill the mixer or the FFN half of a layer.

    Args:
        layer: with nothing in the other half.
        spec: the sub-block; None where this half is left out.
        norm: of the layer.
    """

    layer: LayerArch
    spec: SubBlockSpec | None
    norm: Norm

    def is_half(self, layer: LayerArch) -> bool:
        """Whether this is all there is of a layer."""
        return self.layer == layer if self.spec else layer.skip

    @property
    def name(self) -> str:
        """The sub-block's key, or that it is left out beside which norm."""
        return self.spec.key if self.spec else f"none/{'/'.join(self.norm)}"


@dataclass(frozen=True)
class LayerChoices:
    """All choices of a layer slot at one width.

    Args:
        d_model: the width.
        mixers: of the mixer half.
        ffns: of the FFN half.
        reference: the largest arch of this width, whose layers are all alike.
    """

    d_model: int
    mixers: tuple[HalfChoice, ...]
    ffns: tuple[HalfChoice, ...]
    reference: Arch

    @staticmethod
    def of(space: SearchSpace, d_model: int) -> LayerChoices:
        """Return the choices of a space at a width; layers that share keys and values are out.

        What a layer with shared keys and values costs and computes depends on another layer, so
        neither adds up over layers.

        Raises:
            UserError: when the space does not have that width.
        """
        return LayerChoices(
            d_model,
            _choices_of(space, space.mixer_half, d_model),
            _choices_of(space, space.ffn_half, d_model),
            space.uniform(d_model=d_model, kv_shared=False),
        )

    def reference_half(self, half: str, norm: Norm) -> HalfChoice:
        """Return the reference's mixer or FFN half under another norm."""
        return self._reference_halves[half, norm]

    @cached_property
    def _reference_halves(self) -> dict[tuple[str, Norm], HalfChoice]:
        found = {}
        for norm in dict.fromkeys(choice.norm for choice in (*self.mixers, *self.ffns)):
            layer = replace(self.reference.layers[0], norm=norm[0], norm_placement=norm[1])
            for half, choices in (("mixer", self.mixers), ("ffn", self.ffns)):
                alone = _alone(layer, half)
                found[half, norm] = next(c for c in choices if c.norm == norm and c.is_half(alone))
        return found

    def with_layer(self, slot: int, layer: LayerArch) -> Arch:
        """Return the reference with another layer in a slot."""
        layers = list(self.reference.layers)
        layers[slot] = layer
        return replace(self.reference, layers=tuple(layers))

    def without(self, slots: frozenset[int]) -> Arch:
        """Return the reference with slots skipped."""
        layers = [
            LayerArch() if slot in slots else layer
            for slot, layer in enumerate(self.reference.layers)
        ]
        return replace(self.reference, layers=tuple(layers))


def joined(mixer: HalfChoice, ffn: HalfChoice) -> LayerArch:
    """Return the layer of two halves that agree in their norm; skipped where both are absent."""
    if ffn.spec is None:
        return mixer.layer if mixer.spec else LayerArch()
    if mixer.spec is None:
        return ffn.layer
    return replace(
        mixer.layer,
        ffn=ffn.layer.ffn,
        intermediate_size=ffn.layer.intermediate_size,
        ffn_precision=ffn.layer.ffn_precision,
        ffn_options=ffn.layer.ffn_options,
    )


def _choices_of(
    space: SearchSpace, half: MixerHalf | FFNHalf, d_model: int
) -> tuple[HalfChoice, ...]:
    found: dict[str, HalfChoice] = {}
    for layer in half.layers:
        spec = half.spec(layer, d_model)
        norms = (
            [(layer.norm, layer.norm_placement)]
            if spec is not None
            else list(itertools.product(space.norm, space.norm_placement))
        )
        for norm in norms if not layer.kv_shared else []:
            choice = HalfChoice(layer, spec, norm)
            found.setdefault(choice.name, choice)
    return tuple(found.values())


def _alone(layer: LayerArch, half: str) -> LayerArch:
    """Return a layer with the other half left out."""
    if half == "mixer":
        return replace(layer, ffn=ABSENT, intermediate_size=0)
    return replace(layer, mixer=ABSENT)
