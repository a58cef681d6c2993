"""Frozen descriptions of single sub-blocks: what an operator is built from.

A spec is also the unit of every additive cost (latency, bytes, FLOPs): its `key` names a row of a
latency table.
"""

from __future__ import annotations

from dataclasses import dataclass

Options = tuple[tuple[str, int | float | str], ...]
ABSENT = "none"
"""The name that stands for "no such sub-block"."""


@dataclass(frozen=True)
class MixerSpec:
    """A residual token-mixing sub-block: norm, projections, mixer, residual add."""

    d_model: int
    mixer: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    position: str = "nope"
    precision: str = "fp32"
    norm: str = "rmsnorm"
    options: Options = ()

    @property
    def key(self) -> str:
        """A stable, readable name, unique among specs."""
        options = "".join(f"_{name}{value}" for name, value in self.options)
        return (
            f"mixer/{self.mixer}{options}/d{self.d_model}"
            f"/h{self.num_heads}x{self.num_kv_heads}x{self.head_dim}"
            f"/{self.position}/{self.norm}/{self.precision}"
        )


@dataclass(frozen=True)
class FFNSpec:
    """A residual feed-forward sub-block: norm, FFN, residual add."""

    d_model: int
    ffn: str
    intermediate_size: int
    precision: str = "fp32"
    norm: str = "rmsnorm"

    @property
    def key(self) -> str:
        """A stable, readable name, unique among specs."""
        return (
            f"ffn/{self.ffn}/d{self.d_model}/f{self.intermediate_size}/{self.norm}/{self.precision}"
        )


@dataclass(frozen=True)
class EndsSpec:
    """What every network has once: token embedding, final norm and output head."""

    d_model: int
    vocab_size: int

    @property
    def key(self) -> str:
        """A stable, readable name, unique among specs."""
        return f"ends/d{self.d_model}/v{self.vocab_size}"


SubBlockSpec = MixerSpec | FFNSpec | EndsSpec
