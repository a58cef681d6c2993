"""Frozen descriptions of single sub-blocks: what an operator is built from.

A spec is also the unit of every additive cost (latency, bytes, FLOPs): its `key` names a row of a
latency table. What is at its default is left out of the key.
"""

from __future__ import annotations

from dataclasses import dataclass

from searchspace.family import DECODER, Family

Options = tuple[tuple[str, int | float | str], ...]
ABSENT = "none"
"""The name that stands for "no such sub-block"."""
PLACEMENTS = ("pre", "post", "peri")
"""Where norms stand: `x + f(N(x))`, `N(x + f(x))`, `x + N'(f(N(x)))`."""


@dataclass(frozen=True)
class MixerSpec:
    """A residual token-mixing sub-block: norm, projections, mixer, residual add.

    Args:
        d_model: width of the residual stream.
        mixer: a name in `MIXERS`.
        num_heads: query heads; 0 where heads have no meaning.
        num_kv_heads: key/value heads.
        head_dim: width of a head.
        position: a position encoding.
        precision: a name in `PRECISIONS`.
        norm: a name in `NORMS`.
        options: the mixer's own options that are not at their default, sorted.
        placement: one of `PLACEMENTS`.
        causal: whether a token sees only itself and earlier ones.
        kv_shared: whether keys and values come from an earlier layer.
        max_tokens: longest sequence; 0 for mixers that are not `bounded`.
    """

    d_model: int
    mixer: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    position: str = "nope"
    precision: str = "fp32"
    norm: str = "rmsnorm"
    options: Options = ()
    placement: str = "pre"
    causal: bool = True
    kv_shared: bool = False
    max_tokens: int = 0

    @property
    def key(self) -> str:
        """A stable, readable name, unique among specs."""
        options = "".join(f"_{name}{value}" for name, value in self.options)
        special = {
            f"/{self.placement}": self.placement != "pre",
            "/bidirectional": not self.causal,
            "/kv_shared": self.kv_shared,
            f"/t{self.max_tokens}": self.max_tokens > 0,
        }
        return (
            f"mixer/{self.mixer}{options}/d{self.d_model}"
            f"/h{self.num_heads}x{self.num_kv_heads}x{self.head_dim}"
            f"/{self.position}/{self.norm}/{self.precision}"
            + "".join(text for text, there in special.items() if there)
        )


@dataclass(frozen=True)
class FFNSpec:
    """A residual feed-forward sub-block: norm, FFN, residual add; fields as in `MixerSpec`.

    Args:
        ffn: a name in `FFNS`.
        intermediate_size: hidden width.
        options: the FFN's own options that are not at their default, sorted.
    """

    d_model: int
    ffn: str
    intermediate_size: int
    precision: str = "fp32"
    norm: str = "rmsnorm"
    placement: str = "pre"
    options: Options = ()

    @property
    def key(self) -> str:
        """A stable, readable name, unique among specs."""
        options = "".join(f"_{name}{value}" for name, value in self.options)
        key = (
            f"ffn/{self.ffn}{options}/d{self.d_model}/f{self.intermediate_size}"
            f"/{self.norm}/{self.precision}"
        )
        return key if self.placement == "pre" else f"{key}/{self.placement}"


@dataclass(frozen=True)
class EndsSpec:
    """What every network has once: input embedding, final norm and output head."""

    d_model: int
    vocab_size: int
    family: Family = DECODER

    @property
    def key(self) -> str:
        """A stable, readable name, unique among specs."""
        return f"ends/d{self.d_model}/v{self.vocab_size}{self.family.key}"


SubBlockSpec = MixerSpec | FFNSpec | EndsSpec
