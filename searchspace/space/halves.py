"""The two halves of a layer slot, and every way a space offers to fill them.

A *half* is the mixer or the FFN sub-block of a slot. Its genes are numbered off, so that a table
over all combinations serves many genotypes by one lookup per slot: what they cost, and which
combination stands for all those that compute the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from searchspace.arch import LayerArch, ffn_spec, mixer_spec, sharing_kind
from searchspace.errors import UserError
from searchspace.specs import ABSENT, SubBlockSpec

if TYPE_CHECKING:
    from searchspace.space import SearchSpace

NORM_GENES = ("norm", "norm_placement")
MIXER_GENES = ("heads", "position", "mixer_precision", "kv_shared")
FFN_GENES = ("intermediate_size", "ffn_precision")

Indices = NDArray[np.int64]
Operators = Mapping[str, Mapping[str, tuple[Any, ...]]]
"""By name the choices of each operator's own options."""


class Half:
    """All combinations of the genes of one half, numbered off.

    For each operator they are its own options times the genes that all operators have.

    Args:
        space: the search space.
        kind: the gene that says which operator stands here, ``"mixer"`` or ``"ffn"``.
        operators: by name the choices of each operator's own options.
        common: the genes that all operators have; norms belong to both halves.
        fixed: values that leave the other half out.
    """

    absent_gene: str
    """The gene that says whether this half is there."""

    def __init__(
        self,
        space: SearchSpace,
        kind: str,
        operators: Operators,
        common: Sequence[str],
        fixed: Mapping[str, Any],
    ) -> None:
        self.space = space
        self.kind = kind
        self.operators = operators
        own = [f"{name}.{option}" for name in operators for option in operators[name]]
        self.genes = (kind, *own, *common)
        self.layers: list[LayerArch] = []
        """What each combination describes, with nothing in the other half."""
        self._chosen: list[dict[str, int]] = []
        self._first: dict[tuple[Any, ...], int] = {}
        self._parts: list[tuple[int, list[str]]] = []
        for number, name in enumerate(operators):
            own = [f"{name}.{option}" for option in operators[name]]
            genes = [] if name == ABSENT else [*own, *common, *NORM_GENES]
            self._parts.append((len(self.layers), genes))
            self._add(genes, {**fixed, kind: name}, **{kind: number})

    def _add(self, genes: Sequence[str], fixed: Mapping[str, Any], **indices: int) -> None:
        """Add every combination of the choices of `genes`; `indices` are those of other genes."""
        choices = self.space.layer_choices()
        base = {gene: options[0] for gene, options in choices.items()} | {**fixed, "skip": False}
        for values in itertools.product(*(enumerate(choices[gene]) for gene in genes)):
            picked = dict(zip(genes, values, strict=True))
            layer = self.space.layer(base | {gene: value for gene, (_, value) in picked.items()})
            self._first.setdefault(self.key(layer), len(self.layers))
            self.layers.append(layer)
            self._chosen.append(indices | {gene: index for gene, (index, _) in picked.items()})

    @cached_property
    def canonical(self) -> Indices:
        """For each combination the indices of `genes` in the first one that means the same."""
        first = [self._chosen[self._first[self.key(layer)]] for layer in self.layers]
        return np.array([[chosen.get(gene, 0) for gene in self.genes] for chosen in first])

    @cached_property
    def absent(self) -> NDArray[np.bool_]:
        """Whether each combination leaves this half out."""
        return np.array([self.key(layer) == () for layer in self.layers])

    @cached_property
    def varying(self) -> list[tuple[list[int], list[int]]]:
        """For each slot, which of `genes` have a column in a genotype, and those columns."""
        columns = self.space.columns
        slots = []
        for slot in range(self.space.num_layers):
            names = [f"layers.{slot}.{gene}" for gene in self.genes]
            there = [number for number, name in enumerate(names) if name in columns]
            slots.append((there, [columns[names[number]] for number in there]))
        return slots

    def key(self, layer: LayerArch) -> tuple[Any, ...]:
        """Return all that this half of a layer is; empty where it is absent."""
        raise NotImplementedError

    def options(self, layer: LayerArch) -> dict[str, Any]:
        """Return all options of the operator of a layer."""
        raise NotImplementedError

    def value(self, layer: LayerArch, gene: str) -> Any:
        """Return what a layer has in the place of a gene; None for another operator's option."""
        operator, _, option = gene.partition(".")
        if not option:
            return getattr(layer, gene)
        return self.options(layer)[option] if operator == getattr(layer, self.kind) else None

    def choice(self, layer: LayerArch, slot: int) -> dict[str, int]:
        """Return the indices of the genes that count, norms included, of a slot's layer.

        Raises:
            UserError: naming the gene whose value the space does not offer.
        """
        place = self._first.get(self.key(layer))
        if place is None:
            raise self._not_offered(layer, slot)
        unused = NORM_GENES if self.absent[place] else ()
        return {gene: i for gene, i in self._chosen[place].items() if gene not in unused}

    def _not_offered(self, layer: LayerArch, slot: int) -> UserError:
        alike = [other for other in self.layers if self._alike(other, layer)]
        genes = (*self.genes, *NORM_GENES) if self.key(layer) else (self.absent_gene,)
        for gene in genes:
            value = self.value(layer, gene)
            if value not in [self.value(other, gene) for other in alike]:
                return UserError(
                    f"layers.{slot}.{gene}={value!r} is not in space {self.space.name!r}; choose "
                    f"one of {', '.join(map(str, self.space.layer_choices()[gene]))}"
                )
        return UserError(
            f"layers[{slot}] is not in space {self.space.name!r}, which does not offer these "
            f"choices together: {layer.to_dict()}"
        )

    def _alike(self, other: LayerArch, layer: LayerArch) -> bool:
        """Whether the same genes count in two layers."""
        name = getattr(layer, self.kind)
        return getattr(other, self.kind) == name or name not in self.operators

    def index(self, genotypes: Indices, slot: int) -> Indices:
        """Return the place in `layers` of a slot's half, for each genotype (n, genes)."""
        offsets, strides = self._radix
        chosen = self.space.indices(genotypes, f"layers.{slot}.{self.kind}")
        out = offsets[chosen]
        for gene, by_operator in strides.items():
            out += by_operator[chosen] * self.space.indices(genotypes, f"layers.{slot}.{gene}")
        return out

    @cached_property
    def _radix(self) -> tuple[Indices, dict[str, Indices]]:
        """Return each operator's place of its first layer, and by gene how far a step goes there.

        A step in a gene that an operator does not have goes nowhere.
        """
        choices = self.space.layer_choices()
        offsets = np.array([offset for offset, _ in self._parts])
        strides: dict[str, Indices] = {}
        for number, (_, genes) in enumerate(self._parts):
            step = 1
            for gene in reversed(genes):
                if len(choices[gene]) > 1:
                    strides.setdefault(gene, np.zeros_like(offsets))[number] = step
                step *= len(choices[gene])
        return offsets, strides


class MixerHalf(Half):
    """Every mixer sub-block.

    Args:
        space: the search space.
    """

    absent_gene = "mixer"

    def __init__(self, space: SearchSpace) -> None:
        super().__init__(space, "mixer", space.mixers, MIXER_GENES, {"intermediate_size": 0})

    @cached_property
    def sharing(self) -> Indices:
        """Number of what each combination must agree in to share keys and values, or -1."""
        numbers: dict[Any, int] = {None: -1}
        kinds = [sharing_kind(layer, self.space.head_dim) for layer in self.layers]
        return np.array([numbers.setdefault(kind, len(numbers)) for kind in kinds])

    def spec(self, layer: LayerArch, d_model: int) -> SubBlockSpec | None:
        """Return the mixer sub-block of a layer; None where there is none."""
        if layer.mixer == ABSENT:
            return None
        return mixer_spec(layer, d_model, self.space.head_dim, self.space.family)

    def key(self, layer: LayerArch) -> tuple[Any, ...]:
        """Return all that the mixer sub-block of a layer is."""
        if layer.mixer == ABSENT:
            return ()
        return (
            layer.mixer, layer.mixer_options, layer.num_heads, layer.num_kv_heads, layer.position,
            layer.mixer_precision, layer.kv_shared, layer.norm, layer.norm_placement,
        )  # fmt: skip

    def options(self, layer: LayerArch) -> dict[str, Any]:
        """Return all options of a layer's mixer."""
        return layer.all_options

    def value(self, layer: LayerArch, gene: str) -> Any:
        """Return what a layer has in the place of a gene; None for another mixer's option."""
        if gene == "heads":
            return f"{layer.num_heads}x{layer.num_kv_heads}"
        return super().value(layer, gene)


class FFNHalf(Half):
    """Every FFN sub-block.

    Args:
        space: the search space.
    """

    absent_gene = "intermediate_size"

    def __init__(self, space: SearchSpace) -> None:
        operators = {name: space.ffn_options.get(name, {}) for name in space.ffn}
        super().__init__(space, "ffn", operators, FFN_GENES, {"mixer": ABSENT})

    def spec(self, layer: LayerArch, d_model: int) -> SubBlockSpec | None:
        """Return the FFN sub-block of a layer; None where there is none."""
        return ffn_spec(layer, d_model) if layer.intermediate_size else None

    def key(self, layer: LayerArch) -> tuple[Any, ...]:
        """Return all that the FFN sub-block of a layer is."""
        if not layer.intermediate_size:
            return ()
        return (
            layer.ffn, layer.ffn_options, layer.intermediate_size, layer.ffn_precision,
            layer.norm, layer.norm_placement,
        )  # fmt: skip

    def options(self, layer: LayerArch) -> dict[str, Any]:
        """Return all options of a layer's FFN."""
        return layer.all_ffn_options
