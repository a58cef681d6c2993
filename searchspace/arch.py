"""`Arch`: the one value that says what a network is.

An `Arch` holds `d_model`, the vocabulary facts and one `LayerArch` per layer slot. Both are frozen
and canonical by construction: choices that do not change the computed function (the heads of a
slot without a mixer, the activation of an FFN of width 0, ...) are reset when the value is made, so
two archs are equal, hash equal and share an `id` exactly when they compute the same function from
the same weights.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from searchspace.errors import UserError, unknown
from searchspace.family import DECODER, Family
from searchspace.layer_arch import LayerArch, check_whole
from searchspace.specs import ABSENT, EndsSpec, FFNSpec, MixerSpec, SubBlockSpec

__all__ = [
    "Arch",
    "LayerArch",
    "check_family",
    "ffn_spec",
    "mixer_spec",
    "sharing_kind",
    "width_of_head",
]


@dataclass(frozen=True)
class Arch:
    """A whole transformer: decoder, encoder or ViT.

    Args:
        d_model: width of the residual stream.
        head_dim: width of one attention head; 0 for heads that split the residual stream, of
            `d_model / num_heads` each.
        vocab_size: number of token ids; 0 for images.
        family: what goes in and comes out.
        layers: one `LayerArch` per layer slot, skipped ones included.

    Raises:
        UserError: naming the field when sizes do not fit.
    """

    d_model: int
    head_dim: int
    vocab_size: int
    layers: tuple[LayerArch, ...]
    family: Family = DECODER

    def __post_init__(self) -> None:
        layers = resolve_sharing(tuple(self.layers), self.head_dim)
        object.__setattr__(self, "layers", layers)
        check_whole("d_model", self.d_model, minimum=1)
        check_whole("head_dim", self.head_dim, minimum=0)
        check_whole("vocab_size", self.vocab_size, minimum=int(self.family.kind != "vit"))
        if self.head_dim % 2:
            raise UserError(f"head_dim={self.head_dim} must be even (rotary positions pair it up)")
        for slot, layer in enumerate(layers):
            try:
                check_family(layer, self.family)
                width_of_head(layer, self.d_model, self.head_dim)
            except UserError as error:
                raise UserError(f"layers[{slot}]: {error}") from None

    @functools.cached_property
    def id(self) -> str:
        """Ten hexadecimal digits of the canonical form's hash."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:10]

    @property
    def depth(self) -> int:
        """Number of layer slots that are not skipped."""
        return sum(not layer.skip for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON-ready form."""
        values: dict[str, Any] = {
            "d_model": self.d_model,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab_size,
            "layers": [layer.to_dict() for layer in self.layers],
        }
        family = self.family.to_dict()
        return {**values, "family": family} if family else values

    def to_json(self) -> str:
        """Return the canonical JSON text (sorted keys, no spaces)."""
        return json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Arch:
        """Build from `to_dict`'s form.

        Raises:
            UserError: for a missing or unknown field, or a layer that is wrong (its slot is named).
        """
        known = ("d_model", "head_dim", "vocab_size", "layers")
        if not isinstance(values, Mapping):
            raise UserError(f"an arch is a mapping with {', '.join(known)}, not {values!r:.40}")
        for name in values:
            if name not in (*known, "family"):
                raise unknown("arch field", name, (*known, "family"))
        for name in known:
            if name not in values:
                raise UserError(f"arch field {name!r} is missing; an arch has {', '.join(known)}")
        if not isinstance(values["layers"], list | tuple):
            raise UserError(
                f"arch field 'layers' is a list of layers, not {values['layers']!r:.40}"
            )
        layers = []
        for slot, layer in enumerate(values["layers"]):
            try:
                layers.append(LayerArch.from_dict(layer))
            except UserError as error:
                raise UserError(f"layers[{slot}]: {error}") from None
        family = Family.from_dict(values.get("family", {}))
        sizes = values["d_model"], values["head_dim"], values["vocab_size"]
        return cls(*sizes, tuple(layers), family)

    @classmethod
    def from_json(cls, text: str) -> Arch:
        """Build from `to_json`'s form.

        Raises:
            UserError: as `from_dict`, and for text that is not JSON.
        """
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"the text of an arch is not JSON: {error}") from None
        return cls.from_dict(values)

    def named_sub_blocks(self) -> Iterator[tuple[int, MixerSpec | FFNSpec]]:
        """Yield (slot, spec) of every residual sub-block that is there, in order."""
        for slot, layer in enumerate(self.layers):
            if layer.mixer != ABSENT:
                yield slot, mixer_spec(layer, self.d_model, self.head_dim, self.family)
            if layer.intermediate_size:
                yield slot, ffn_spec(layer, self.d_model)

    @property
    def ends(self) -> EndsSpec:
        """The spec of embedding, final norm and head together."""
        return EndsSpec(self.d_model, self.vocab_size, self.family)

    def sub_blocks(self) -> tuple[SubBlockSpec, ...]:
        """Return the specs of all sub-blocks, the ends last: what a latency table sums over."""
        return (*(spec for _, spec in self.named_sub_blocks()), self.ends)


def resolve_sharing(layers: tuple[LayerArch, ...], head_dim: int) -> tuple[LayerArch, ...]:
    """Return the layers with `kv_shared` dropped where no earlier layer can provide.

    Source: Brandon et al. 2024, "Reducing Transformer Key-Value Cache Size with Cross-Layer
    Attention", section 2.2; its sharing factor n is n - 1 sharing layers after each provider.
    """
    provider: tuple[Any, ...] | None = None
    resolved = []
    for layer in layers:
        kind = sharing_kind(layer, head_dim)
        if layer.kv_shared and kind != provider:
            layer = replace(layer, kv_shared=False)
        if kind is not None and not layer.kv_shared:
            provider = kind
        resolved.append(layer)
    return tuple(resolved)


def sharing_kind(layer: LayerArch, head_dim: int) -> tuple[Any, ...] | None:
    """Return what two layers must agree in to share keys and values; None where they cannot.

    Args:
        layer: of an arch.
        head_dim: of the arch; with 0 the number of query heads decides the width of keys.
    """
    from searchspace.mixers import MIXERS

    if layer.mixer == ABSENT or not MIXERS[layer.mixer].can_share_kv(layer.all_options):
        return None
    width = head_dim or f"d_model / {layer.num_heads}"
    return layer.mixer, layer.mixer_options, layer.num_kv_heads, layer.position, width


def check_family(layer: LayerArch, family: Family) -> None:
    """Refuse a layer that cannot stand in a family.

    Raises:
        UserError: for a mixer without the form that is needed, or a bidirectional one that would
            not know the order of tokens.
    """
    from searchspace.mixers import MIXERS

    if layer.mixer == ABSENT:
        return
    mixer, direction = MIXERS[layer.mixer], "causal" if family.causal else "bidirectional"
    if direction not in mixer.directions:
        having = [name for name, other in MIXERS.items() if direction in other.directions]
        raise UserError(
            f"mixer={layer.mixer!r} has no {direction} form, which a {family.kind} needs; choose "
            f"one of {', '.join(having)}"
        )
    blind = layer.position == "nope" and not mixer.knows_order(layer.all_options)
    if not family.causal and blind and family.embedding_position == "none":
        raise UserError(
            f"mixer={layer.mixer!r} with position='nope' in a bidirectional {family.kind}: without "
            "a causal mask nothing tells it the order of tokens; choose rope or alibi where the "
            "mixer takes it, or give the family embedding_position='learned'"
        )


def width_of_head(layer: LayerArch, d_model: int, head_dim: int) -> int:
    """Return the width of a layer's heads; 0 where heads have no meaning.

    Args:
        layer: of an arch.
        d_model: of the arch.
        head_dim: of the arch; 0 for `d_model / num_heads`.

    Raises:
        UserError: where heads cannot split the residual stream into equal, even widths.
    """
    if head_dim or not layer.num_heads:
        return head_dim if layer.num_heads else 0
    if d_model % (2 * layer.num_heads):
        fitting = [n for n in range(1, d_model // 2 + 1) if d_model % (2 * n) == 0]
        raise UserError(
            f"num_heads={layer.num_heads} does not split d_model={d_model} into heads of equal, "
            f"even width, which head_dim=0 asks for; choose {' or '.join(map(str, fitting))} "
            "heads, or give head_dim"
            if fitting
            else f"d_model={d_model} is odd, so head_dim=0 cannot split it; give head_dim"
        )
    return d_model // layer.num_heads


def mixer_spec(layer: LayerArch, d_model: int, head_dim: int, family: Family) -> MixerSpec:
    """Return the spec of a slot's mixer sub-block."""
    from searchspace.mixers import MIXERS

    mixer = MIXERS[layer.mixer]
    return MixerSpec(
        d_model=d_model,
        mixer=layer.mixer,
        num_heads=layer.num_heads,
        num_kv_heads=layer.num_kv_heads,
        head_dim=width_of_head(layer, d_model, head_dim),
        position=layer.position,
        precision=layer.mixer_precision,
        norm=layer.norm,
        options=layer.mixer_options,
        placement=layer.norm_placement,
        causal=family.causal,
        kv_shared=layer.kv_shared,
        max_tokens=family.sequence_tokens if mixer.bounded else 0,
    )


def ffn_spec(layer: LayerArch, d_model: int) -> FFNSpec:
    """Return the spec of a slot's FFN sub-block."""
    return FFNSpec(
        d_model=d_model,
        ffn=layer.ffn,
        intermediate_size=layer.intermediate_size,
        precision=layer.ffn_precision,
        norm=layer.norm,
        placement=layer.norm_placement,
        options=layer.ffn_options,
    )
