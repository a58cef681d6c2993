"""Archs as totals over their active layers: needs no space, so archs of any spaces compare.

Letters: N archs, U different sub-blocks, R sub-blocks of all archs, K kinds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from predictors.encodings.features import SHARE, Features
from searchspace.arch import Arch
from searchspace.cost import flops, num_params, weight_bytes
from searchspace.space import SearchSpace
from searchspace.specs import EndsSpec, FFNSpec, MixerSpec, SubBlockSpec
from searchspace.sub_blocks import build_sub_block, param_axes

FloatArray = NDArray[np.float64]
TOKENS = 128
"""Tokens of the sequence whose FLOPs are counted, where the network takes as many."""

Part = tuple[type[MixerSpec] | type[FFNSpec] | type[EndsSpec], ...]
_MIXERS: Part = (MixerSpec,)
_FFNS: Part = (FFNSpec,)
_BLOCKS: Part = (MixerSpec, FFNSpec)
PARTS: dict[str, Part] = {"mixers": _MIXERS, "ffns": _FFNS, "ends": (EndsSpec,)}
FACTS: dict[str, Callable[[Any], float]] = {
    "params": num_params,
    "weight bytes": weight_bytes,
    "flops": lambda spec: flop_count(spec),
    "heads": lambda spec: getattr(spec, "num_heads", 0),
    "kv heads": lambda spec: getattr(spec, "num_kv_heads", 0),
    "head width": lambda spec: getattr(spec, "num_heads", 0) * getattr(spec, "head_dim", 0),
    "shared keys and values": lambda spec: getattr(spec, "kv_shared", False),
    "ffn width": lambda spec: sum(hidden_widths(spec)),
    "ffn hidden layers": lambda spec: len(hidden_widths(spec)),
}
"""What is known of a sub-block."""

KINDS: dict[str, tuple[Part, Callable[[Any], str]]] = {
    "mixer": (_MIXERS, lambda spec: spec.mixer),
    "position": (_MIXERS, lambda spec: spec.position),
    "mixer precision": (_MIXERS, lambda spec: spec.precision),
    "ffn": (_FFNS, lambda spec: spec.ffn),
    "ffn precision": (_FFNS, lambda spec: spec.precision),
    "norm": (_BLOCKS, lambda spec: spec.norm),
    "norm placement": (_BLOCKS, lambda spec: spec.placement),
}
"""What a sub-block can be one of several of. Shares are of the active layers, of norms of the
sub-blocks."""


def aggregate(archs: Sequence[Arch], space: SearchSpace | None = None) -> Features:
    """Return totals, means, shares and trends over the active layers.

    - size: depth, width, their products, and the logarithms of parameters, weight bytes and
      FLOPs (of one sequence of up to `TOKENS` tokens), in all and in mixers, FFNs and ends;
    - heads, key/value heads, head width and FFN width (hidden units, of all hidden layers of a
      stack): total over the layers, its logarithm, and the mean over the sub-blocks that have any;
    - FFN hidden layers, and layers that share the keys and values of others: total;
    - trend of the same and of the parameters from the first active layer (-1) to the last (1):
      1 where all of it is in the last, -1 where all is in the first;
    - share of the active layers with each kind of mixer, FFN, position and precision, and of the
      sub-blocks with each norm and placement. Kinds that occur in none of the archs have no
      column (see `Features.aligned`).

    A logarithm is ``log(1 + x)``, so that nothing is 0.

    Args:
        archs: of any spaces and families.
        space: not needed.
    """
    table = _SubBlocks.of(archs)
    columns = _sizes(archs, table)
    for fact in ("heads", "kv heads", "head width", "ffn width"):
        total, having = table.total(fact), table.having(fact)
        columns[f"{fact} total"] = total
        columns[f"log {fact} total"] = np.log1p(total)
        columns[f"{fact} mean"] = total / np.maximum(having, 1.0)
    for fact in ("ffn hidden layers", "shared keys and values"):
        columns[f"{fact} total"] = table.total(fact)
    for fact in ("params", "heads", "ffn width"):
        columns[f"{fact} trend"] = table.trend(fact)
    columns |= _shares(archs, table)
    values = np.stack(list(columns.values()), axis=1) if archs else np.zeros((0, len(columns)))
    return Features(values, tuple(columns))


def flop_count(spec: SubBlockSpec) -> int:
    """Return the FLOPs of a sub-block for one sequence of up to `TOKENS` tokens."""
    if isinstance(spec, EndsSpec):
        return flops(spec, min(TOKENS, spec.family.max_tokens))
    tokens = TOKENS
    if isinstance(spec, MixerSpec) and spec.max_tokens:
        tokens = min(tokens, spec.max_tokens)
    # Norms and rounding hold no matrix product: so a fifth of the sub-blocks is followed.
    return flops(replace(spec, norm="rmsnorm", placement="pre", precision="fp32"), tokens)


def hidden_widths(spec: SubBlockSpec) -> tuple[int, ...]:
    """Return the hidden units of every hidden layer of an FFN; none of what is no FFN."""
    if not isinstance(spec, FFNSpec):
        return ()
    with torch.device("meta"):
        parameters = dict(build_sub_block(replace(spec, precision="fp32")).named_parameters())
    # Every hidden layer is read by one matrix; gates double what writes it.
    return tuple(
        parameters[name].shape[1]
        for name, axes in param_axes(spec).items()
        if len(axes) == 2 and name.endswith(".weight") and axes[1] != "d_model"
    )


@functools.cache
def _facts(spec: SubBlockSpec) -> tuple[float, ...]:
    return tuple(float(fact(spec)) for fact in FACTS.values())


@dataclass(frozen=True)
class _SubBlocks:
    """Every sub-block of some archs, one after the other.

    Args:
        specs: those that differ, U of them.
        row: which arch each is of, shape (R,).
        spec: which of `specs` each is, shape (R,).
        place: of its layer, from -1 (first active) to 1 (last), shape (R,); 0 for the ends.
        facts: what is known of `specs`, shape (U, len(FACTS)).
        num_archs: N.
    """

    specs: tuple[SubBlockSpec, ...]
    row: NDArray[np.int64]
    spec: NDArray[np.int64]
    place: FloatArray
    facts: FloatArray
    num_archs: int

    @staticmethod
    def of(archs: Sequence[Arch]) -> _SubBlocks:
        numbers: dict[SubBlockSpec, int] = {}
        found: list[tuple[int, int, float]] = []
        for row, arch in enumerate(archs):
            active = [slot for slot, layer in enumerate(arch.layers) if not layer.skip]
            spread = np.linspace(-1.0, 1.0, len(active)) if len(active) > 1 else np.zeros(1)
            places = dict(zip(active, spread.tolist(), strict=False))
            for slot, spec in arch.named_sub_blocks():
                found.append((row, numbers.setdefault(spec, len(numbers)), places[slot]))
            found.append((row, numbers.setdefault(arch.ends, len(numbers)), 0.0))
        rows, specs, place = np.array(found, dtype=np.float64).reshape(-1, 3).T
        facts = np.array([_facts(spec) for spec in numbers]).reshape(-1, len(FACTS))
        return _SubBlocks(
            tuple(numbers), rows.astype(np.int64), specs.astype(np.int64), place, facts, len(archs)
        )

    def _sum(self, values: FloatArray) -> FloatArray:
        return np.bincount(self.row, values, minlength=self.num_archs).astype(np.float64)

    def _fact(self, fact: str) -> FloatArray:
        return np.asarray(self.facts[self.spec, list(FACTS).index(fact)])

    def _are(self, test: Callable[[SubBlockSpec], bool]) -> FloatArray:
        return np.array([test(spec) for spec in self.specs], dtype=np.float64)[self.spec]

    def total(self, fact: str, part: Part | None = None) -> FloatArray:
        """Return a fact's sum over the sub-blocks (of one part) of each arch, shape (N,)."""
        values = self._fact(fact)
        if part is not None:
            values = values * self._are(lambda spec: isinstance(spec, part))
        return self._sum(values)

    def having(self, fact: str) -> FloatArray:
        """Return how many sub-blocks of each arch have a fact above 0."""
        return self._sum((self._fact(fact) > 0).astype(np.float64))

    def trend(self, fact: str) -> FloatArray:
        """Return the mean place of a fact in each arch, from -1 to 1; 0 where there is none."""
        values = self._fact(fact) * self._are(lambda spec: isinstance(spec, _BLOCKS))
        return self._sum(values * self.place) / np.maximum(self._sum(values), 1e-300)

    def count(self, part: Part, kind: Callable[[Any], str]) -> Mapping[str, FloatArray]:
        """Return for every kind that occurs how many sub-blocks of each arch are of it."""
        kinds = [kind(spec) if isinstance(spec, part) else None for spec in self.specs]
        return {
            name: self._sum(np.array([k == name for k in kinds], dtype=np.float64)[self.spec])
            for name in sorted({k for k in kinds if k is not None})
        }


def _sizes(archs: Sequence[Arch], table: _SubBlocks) -> dict[str, FloatArray]:
    depth = np.array([arch.depth for arch in archs], dtype=np.float64)
    d_model = np.array([arch.d_model for arch in archs], dtype=np.float64)
    columns = {
        "depth": depth,
        "log depth": np.log1p(depth),
        "d_model": d_model,
        "log d_model": np.log1p(d_model),
        "depth x d_model": depth * d_model,
        "depth x log d_model": depth * np.log1p(d_model),
    }
    for fact in ("params", "weight bytes", "flops"):
        columns[f"log {fact}"] = np.log1p(table.total(fact))
    for fact in ("params", "flops"):
        for name, part in PARTS.items():
            columns[f"log {fact} in {name}"] = np.log1p(table.total(fact, part))
    return columns


def _shares(archs: Sequence[Arch], table: _SubBlocks) -> dict[str, FloatArray]:
    depth = np.maximum([arch.depth for arch in archs], 1).astype(np.float64)
    blocks = np.maximum(table.count(_BLOCKS, lambda _: "any").get("any", np.zeros(len(depth))), 1.0)
    columns: dict[str, FloatArray] = {}
    for name, (part, kind) in KINDS.items():
        for value, counts in table.count(part, kind).items():
            columns[f"{SHARE}{name}={value}"] = counts / (blocks if part is _BLOCKS else depth)
    return columns
