"""`LayerArch`: what one layer slot of an arch computes.

It is frozen and canonical by construction: choices that do not change the computed function (the
heads of a slot without a mixer, the activation of an FFN of width 0, ...) are reset when the value
is made.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from searchspace.errors import UserError, unknown
from searchspace.position_names import position_kind
from searchspace.specs import ABSENT, PLACEMENTS, Options


@dataclass(frozen=True)
class LayerArch:
    """What one layer slot computes: a residual mixer sub-block, then a residual FFN sub-block.

    Args:
        mixer: a name in `searchspace.mixers.MIXERS`; ``"none"`` leaves the sub-block out.
        num_heads: query heads.
        num_kv_heads: key/value heads; divides `num_heads` (1 is multi-query attention). Mixers
            that have no such choice have as many as query heads, or none at all.
        position: ``"rope"`` (or a variant, see `searchspace.positions`), ``"alibi"`` or ``"nope"``;
            a mixer that cannot use it takes its own default.
        mixer_precision: a name in `searchspace.precisions.PRECISIONS`, for every projection.
        ffn: a name in `searchspace.ffn.FFNS`.
        intermediate_size: hidden width of the FFN; 0 leaves the sub-block out.
        ffn_precision: a name in `PRECISIONS`.
        norm: a name in `searchspace.norms.NORMS`, used in both sub-blocks.
        norm_placement: ``"pre"``, ``"post"`` or ``"peri"``; see `sub_blocks.ResidualBlock`.
        kv_shared: use the keys and values of the nearest earlier layer that makes its own; it
            must agree in mixer, options, key/value heads and position, or the choice is dropped.
        mixer_options: the mixer's own options, such as ``(("window", 32),)``; a mapping is
            accepted too. What is at its default is left out.
        ffn_options: the FFN's own options, in the same form.

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
    norm_placement: str = "pre"
    kv_shared: bool = False
    mixer_options: Options = ()
    ffn_options: Options = ()

    def __post_init__(self) -> None:
        from searchspace.ffn import FFNS
        from searchspace.mixers import MIXERS
        from searchspace.norms import NORMS
        from searchspace.precisions import PRECISIONS

        if self.mixer != ABSENT and self.mixer not in MIXERS:
            raise unknown("mixer", self.mixer, [*MIXERS, ABSENT])
        if self.ffn != ABSENT and self.ffn not in FFNS:
            raise unknown("ffn", self.ffn, FFNS)
        if self.norm != ABSENT and self.norm not in NORMS:
            raise unknown("norm", self.norm, NORMS)
        for field in ("mixer_precision", "ffn_precision"):
            if getattr(self, field) not in PRECISIONS:
                raise unknown(field, getattr(self, field), PRECISIONS)
        if self.norm_placement not in PLACEMENTS:
            raise unknown("norm_placement", self.norm_placement, PLACEMENTS)
        if type(self.kv_shared) is not bool:
            raise UserError(f"kv_shared={self.kv_shared!r} must be true or false")
        for field in ("num_heads", "num_kv_heads", "intermediate_size"):
            check_whole(field, getattr(self, field), minimum=0)
        self._canonicalise_mixer()
        self._canonicalise_ffn()
        if self.skip:
            self._set(norm=ABSENT, norm_placement="pre")
        elif self.norm == ABSENT:
            raise UserError(f"norm='none' in a layer that is not skipped; choose {_either(NORMS)}")

    def _set(self, **values: object) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _canonicalise_mixer(self) -> None:
        from searchspace.mixers import MIXERS
        from searchspace.operator import canonical_options

        if self.mixer == ABSENT:
            self._set(num_heads=0, num_kv_heads=0, position="nope", mixer_precision="fp32")
            self._set(mixer_options=(), kv_shared=False)
            return
        mixer = MIXERS[self.mixer]
        self._set(mixer_options=canonical_options("mixer", self.mixer, mixer, self.mixer_options))
        self._canonicalise_heads(mixer.head_kind(self.all_options))
        if position_kind(self.position) not in mixer.positions:
            self._set(position=mixer.positions[0])
        if not mixer.has_linears:
            self._set(mixer_precision="fp32")
        if not mixer.can_share_kv(self.all_options):
            self._set(kv_shared=False)

    def _canonicalise_heads(self, kind: str) -> None:
        if kind == "none":
            self._set(num_heads=0, num_kv_heads=0)
            return
        if kind == "equal":
            self._set(num_kv_heads=self.num_heads)
        if self.num_heads < 1 or self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            divisors = [n for n in range(1, self.num_heads + 1) if self.num_heads % n == 0]
            raise UserError(
                f"num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}; "
                f"choose {' or '.join(map(str, divisors)) or 'at least one head'}"
            )

    @property
    def all_options(self) -> dict[str, Any]:
        """All options of the mixer, defaults included."""
        from searchspace.mixers import MIXERS

        defaults = MIXERS[self.mixer].options if self.mixer != ABSENT else {}
        return {**defaults, **dict(self.mixer_options)}

    @property
    def all_ffn_options(self) -> dict[str, Any]:
        """All options of the FFN, defaults included."""
        from searchspace.ffn import FFNS

        defaults = FFNS[self.ffn].options if self.ffn != ABSENT else {}
        return {**defaults, **dict(self.ffn_options)}

    def _canonicalise_ffn(self) -> None:
        from searchspace.ffn import FFNS
        from searchspace.operator import canonical_options

        if self.ffn == ABSENT or self.intermediate_size == 0:
            if self.ffn == ABSENT and self.intermediate_size:
                raise UserError(
                    f"ffn='none' with intermediate_size={self.intermediate_size}; "
                    "give a kind such as 'swiglu', or width 0"
                )
            self._set(ffn=ABSENT, intermediate_size=0, ffn_precision="fp32", ffn_options=())
            return
        options = canonical_options("ffn", self.ffn, FFNS[self.ffn], self.ffn_options)
        self._set(ffn_options=options)

    @property
    def skip(self) -> bool:
        """Whether the slot is the identity."""
        return self.mixer == ABSENT and self.intermediate_size == 0

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready mapping; a skipped slot is ``{"skip": true}``."""
        if self.skip:
            return {"skip": True}
        values = asdict(self)
        values |= {"mixer_options": dict(self.mixer_options), "ffn_options": dict(self.ffn_options)}
        # Fields that came later are left out at their default, so that no older id changes.
        for name, default in (("norm_placement", "pre"), ("kv_shared", False), ("ffn_options", {})):
            if values[name] == default:
                del values[name]
        return values

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


def check_whole(field: str, value: object, minimum: int) -> None:
    """Raise a `UserError` unless the value is an int of at least `minimum`."""
    # A bool or a whole float would compare equal to the int, but have another text and so id.
    if type(value) is not int or value < minimum:
        raise UserError(f"{field}={value!r} must be a whole number of at least {minimum}")


def _either(choices: Iterable[str]) -> str:
    return " or ".join(map(repr, choices))
