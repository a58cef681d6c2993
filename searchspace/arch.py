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
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from searchspace.errors import UserError, unknown
from searchspace.specs import ABSENT, EndsSpec, FFNSpec, MixerSpec, Options, SubBlockSpec

PRECISIONS = ("fp32", "int8")
"""`fp32` is 32-bit weights and activations; `int8` is 8-bit weights and activations (W8A8)."""


@dataclass(frozen=True)
class LayerArch:
    """What one layer slot computes: `x + mixer(norm(x))`, then `x + ffn(norm(x))`.

    Args:
        mixer: a name in `searchspace.mixers.MIXERS`; ``"none"`` leaves the sub-block out.
        num_heads: query heads.
        num_kv_heads: key/value heads; divides `num_heads` (1 is multi-query attention).
        position: ``"rope"`` or ``"nope"``; mixers without a position encoding ignore it.
        mixer_precision: a name in `PRECISIONS`, for every projection of the mixer.
        ffn: a name in `searchspace.ffn.FFNS`.
        intermediate_size: hidden width of the FFN; 0 leaves the sub-block out.
        ffn_precision: a name in `PRECISIONS`.
        norm: a name in `searchspace.norms.NORMS`, used before both sub-blocks.
        mixer_options: the mixer's own options, such as ``(("window", 64),)``; a mapping is
            accepted too.

    Raises:
        UserError: for an unknown name or sizes that do not fit together.
    """

    mixer: str = "none"
    num_heads: int = 0
    num_kv_heads: int = 0
    position: str = "nope"
    mixer_precision: str = "fp32"
    ffn: str = "none"
    intermediate_size: int = 0
    ffn_precision: str = "fp32"
    norm: str = "rmsnorm"
    mixer_options: Options = ()

    def __post_init__(self) -> None:
        from searchspace.ffn import FFNS
        from searchspace.mixers import MIXERS
        from searchspace.norms import NORMS

        if self.mixer != ABSENT and self.mixer not in MIXERS:
            raise unknown("mixer", self.mixer, [*MIXERS, ABSENT])
        if self.ffn != ABSENT and self.ffn not in FFNS:
            raise unknown("ffn", self.ffn, FFNS)
        if self.norm != ABSENT and self.norm not in NORMS:
            raise unknown("norm", self.norm, NORMS)
        for field in ("mixer_precision", "ffn_precision"):
            if getattr(self, field) not in PRECISIONS:
                raise unknown(field, getattr(self, field), PRECISIONS)
        for field in ("num_heads", "num_kv_heads", "intermediate_size"):
            _check_whole(field, getattr(self, field), minimum=0)
        self._canonicalise_mixer()
        self._canonicalise_ffn()
        if self.skip:
            self._set(norm=ABSENT)
        elif self.norm == ABSENT:
            raise UserError(f"norm='none' in a layer that is not skipped; choose {_either(NORMS)}")

    def _set(self, **values: object) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _canonicalise_mixer(self) -> None:
        from searchspace.mixers import MIXERS

        if self.mixer == ABSENT:
            self._set(num_heads=0, num_kv_heads=0, position="nope", mixer_precision="fp32")
            self._set(mixer_options=())
            return
        if self.num_heads < 1 or self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            divisors = [n for n in range(1, self.num_heads + 1) if self.num_heads % n == 0]
            raise UserError(
                f"num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}; "
                f"choose {' or '.join(map(str, divisors)) or 'at least one head'}"
            )
        mixer = MIXERS[self.mixer]
        if self.position not in ("rope", "nope"):
            raise unknown("position", self.position, ("rope", "nope"))
        if self.position not in mixer.positions:
            self._set(position=mixer.positions[0])
        self._set(mixer_options=_canonical_options(self.mixer, self.mixer_options))

    def _canonicalise_ffn(self) -> None:
        if self.ffn == ABSENT or self.intermediate_size == 0:
            if self.ffn == ABSENT and self.intermediate_size:
                raise UserError(
                    f"ffn='none' with intermediate_size={self.intermediate_size}; "
                    "give a kind such as 'swiglu', or width 0"
                )
            self._set(ffn=ABSENT, intermediate_size=0, ffn_precision="fp32")

    @property
    def skip(self) -> bool:
        """Whether the slot is the identity."""
        return self.mixer == ABSENT and self.intermediate_size == 0

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready mapping; a skipped slot is ``{"skip": true}``."""
        if self.skip:
            return {"skip": True}
        values = {name: value for name, value in asdict(self).items() if name != "mixer_options"}
        return {**values, **({"mixer_options": dict(self.mixer_options)})}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LayerArch:
        """Build from `to_dict`'s form.

        Raises:
            UserError: for an unknown key, or what is no mapping.
        """
        if not isinstance(values, Mapping):
            raise UserError(f"a layer is a mapping of its fields, not {values!r:.40}")
        values = dict(values)
        if values.pop("skip", False):
            return cls()
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                raise unknown("layer field", name, [*known, "skip"])
        return cls(**values)


def _check_whole(field: str, value: object, minimum: int) -> None:
    # A bool or a whole float would compare equal to the int, but have another text and so id.
    if type(value) is not int or value < minimum:
        raise UserError(f"{field}={value!r} must be a whole number of at least {minimum}")


def _either(choices: Iterable[str]) -> str:
    return " or ".join(map(repr, choices))


def _canonical_options(mixer: str, options: Options | Mapping[str, Any]) -> Options:
    """Check and sort a mixer's options, filling in the defaults."""
    from searchspace.mixers import MIXERS

    defaults = MIXERS[mixer].options
    try:
        given = dict(options)
    except (TypeError, ValueError):
        raise UserError(f"mixer_options={options!r:.40} is no mapping of options") from None
    for name in given:
        if name not in defaults:
            if not defaults:
                raise UserError(f"mixer {mixer!r} has no options, but {name!r} was given")
            raise unknown(f"option of mixer {mixer!r}", name, defaults)
        if isinstance(defaults[name], int):
            _check_whole(f"{mixer}.{name}", given[name], minimum=1)
    return tuple(sorted({**defaults, **given}.items()))


@dataclass(frozen=True)
class Arch:
    """A whole decoder-only transformer.

    Args:
        d_model: width of the residual stream.
        head_dim: width of one attention head.
        vocab_size: number of token ids.
        layers: one `LayerArch` per layer slot, skipped ones included.

    Raises:
        UserError: naming the field when sizes do not fit.
    """

    d_model: int
    head_dim: int
    vocab_size: int
    layers: tuple[LayerArch, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        for field in ("d_model", "head_dim", "vocab_size"):
            _check_whole(field, getattr(self, field), minimum=1)
        if self.head_dim % 2:
            raise UserError(f"head_dim={self.head_dim} must be even (rotary positions pair it up)")

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
        return {
            "d_model": self.d_model,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab_size,
            "layers": [layer.to_dict() for layer in self.layers],
        }

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
            if name not in known:
                raise unknown("arch field", name, known)
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
        return cls(values["d_model"], values["head_dim"], values["vocab_size"], tuple(layers))

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

    def named_sub_blocks(self) -> Iterator[tuple[int, SubBlockSpec]]:
        """Yield (slot, spec) of every residual sub-block that is there, in order."""
        for slot, layer in enumerate(self.layers):
            if layer.mixer != ABSENT:
                yield slot, mixer_spec(layer, self.d_model, self.head_dim)
            if layer.intermediate_size:
                yield slot, ffn_spec(layer, self.d_model)

    @property
    def ends(self) -> EndsSpec:
        """The spec of embedding, final norm and head together."""
        return EndsSpec(d_model=self.d_model, vocab_size=self.vocab_size)

    def sub_blocks(self) -> tuple[SubBlockSpec, ...]:
        """Return the specs of all sub-blocks, the ends last: what a latency table sums over."""
        return (*(spec for _, spec in self.named_sub_blocks()), self.ends)


def mixer_spec(layer: LayerArch, d_model: int, head_dim: int) -> MixerSpec:
    """Return the spec of a slot's mixer sub-block."""
    return MixerSpec(
        d_model=d_model,
        mixer=layer.mixer,
        num_heads=layer.num_heads,
        num_kv_heads=layer.num_kv_heads,
        head_dim=head_dim,
        position=layer.position,
        precision=layer.mixer_precision,
        norm=layer.norm,
        options=layer.mixer_options,
    )


def ffn_spec(layer: LayerArch, d_model: int) -> FFNSpec:
    """Return the spec of a slot's FFN sub-block."""
    return FFNSpec(
        d_model=d_model,
        ffn=layer.ffn,
        intermediate_size=layer.intermediate_size,
        precision=layer.ffn_precision,
        norm=layer.norm,
    )
