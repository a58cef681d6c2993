"""`SearchSpace`: which archs there are, and how to draw, encode, count and change them.

A genotype is a vector of choice indices, one per gene (a gene with a single choice is left out).
Work on many genotypes is vectorised over int matrices of shape (n, genes); `canonical` brings
genotypes of the same function to the same row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from searchspace.arch import Arch, LayerArch
from searchspace.canonical import Genotypes, canonicalise
from searchspace.errors import UserError, unknown
from searchspace.space_files import read_space, space_arguments, space_to_dict
from searchspace.specs import ABSENT, SubBlockSpec

MAX_KEPT = 0.9
"""Largest share of genes that a random arch keeps at the first choice."""


@dataclass(frozen=True)
class SearchSpace:
    """The choices of every dimension; each tuple lists the largest or default choice first.

    Args:
        name: for reports.
        vocab_size: number of token ids, a fact of the task.
        d_model: widths of the residual stream.
        head_dim: width of one head.
        num_layers: number of layer slots.
        min_depth: number of slots that are never skipped at once.
        mixers: for every mixer its options with their choices, such as
            ``{"softmax": {}, "sliding_window": {"window": (128, 32)}, "none": {}}``.
        heads: (query heads, key/value heads) pairs.
        position, mixer_precision, ffn, intermediate_size, ffn_precision, norm: choices per slot,
            with the meaning they have in `LayerArch`.

    Raises:
        UserError: for an empty or repeated choice, an unknown name, or sizes that do not fit.
    """

    name: str
    vocab_size: int
    d_model: tuple[int, ...]
    head_dim: int
    num_layers: int
    mixers: Mapping[str, Mapping[str, tuple[int, ...]]]
    heads: tuple[tuple[int, int], ...]
    intermediate_size: tuple[int, ...]
    min_depth: int = 1
    position: tuple[str, ...] = ("rope",)
    mixer_precision: tuple[str, ...] = ("fp32",)
    ffn: tuple[str, ...] = ("swiglu",)
    ffn_precision: tuple[str, ...] = ("fp32",)
    norm: tuple[str, ...] = ("rmsnorm",)

    def __post_init__(self) -> None:
        for field in ("num_layers", "min_depth"):
            if type(getattr(self, field)) is not int:
                raise UserError(f"{field}={getattr(self, field)!r} must be a whole number")
        if not 1 <= self.min_depth <= self.num_layers:
            raise UserError(
                f"min_depth={self.min_depth} must lie between 1 and num_layers={self.num_layers}"
            )
        for gene, choices in self._all_choices().items():
            if not choices:
                raise UserError(f"space {self.name!r}: {gene} has no choices; list at least one")
            if len(set(choices)) != len(choices):
                raise UserError(f"space {self.name!r}: {gene} lists a choice twice: {choices}")
        # Building the extreme archs validates every name and size once.
        self.largest(), self.smallest()
        for spec in self.sub_blocks():
            spec.key  # noqa: B018  (each spec is built from a validated LayerArch)

    def mixer_options(self) -> dict[str, tuple[Any, ...]]:
        """Choices of every mixer option gene, named `<mixer>.<option>`."""
        return {
            f"{mixer}.{option}": tuple(choices)
            for mixer, options in self.mixers.items()
            for option, choices in options.items()
        }

    def layer_choices(self) -> dict[str, tuple[Any, ...]]:
        """Return the choices of every gene of a layer slot, single-choice ones included."""
        can_skip = self.min_depth < self.num_layers
        return {
            "skip": (False, True) if can_skip else (False,),
            "mixer": tuple(self.mixers),
            **self.mixer_options(),
            "heads": tuple(f"{q}x{kv}" for q, kv in self.heads),
            "position": self.position,
            "mixer_precision": self.mixer_precision,
            "ffn": self.ffn,
            "intermediate_size": self.intermediate_size,
            "ffn_precision": self.ffn_precision,
            "norm": self.norm,
        }

    def _all_choices(self) -> dict[str, tuple[Any, ...]]:
        return {"d_model": self.d_model, **self.layer_choices()}

    @cached_property
    def genes(self) -> dict[str, tuple[Any, ...]]:
        """Choices of every gene that has more than one: `d_model`, `layers.<slot>.<gene>`."""
        genes: dict[str, tuple[Any, ...]] = {"d_model": self.d_model}
        for slot in range(self.num_layers):
            for gene, choices in self.layer_choices().items():
                genes[f"layers.{slot}.{gene}"] = choices
        return {name: choices for name, choices in genes.items() if len(choices) > 1}

    @cached_property
    def columns(self) -> dict[str, int]:
        """Column of every gene in a genotype."""
        return {name: column for column, name in enumerate(self.genes)}

    def indices(self, genotypes: Genotypes, name: str) -> Genotypes:
        """Return a gene's indices, zeros where it has only one choice."""
        column = self.columns.get(name)
        if column is None:
            return np.zeros(len(genotypes), dtype=np.int64)
        return np.asarray(genotypes[:, column])

    def canonical(self, genotypes: Genotypes) -> Genotypes:
        """Return a copy with every gene that does not count set to 0, and enough layers.

        Where fewer than `min_depth` slots are active, leading slots are switched on.
        """
        return canonicalise(self, genotypes)

    def decode(self, genotype: Sequence[int] | Genotypes) -> Arch:
        """Return the arch of a genotype (canonicalised first).

        Raises:
            UserError: when the length or an index is out of range.
        """
        row = np.asarray(genotype, dtype=np.int64)
        sizes = np.array([len(choices) for choices in self.genes.values()])
        if row.shape != sizes.shape or (row < 0).any() or (row >= sizes).any():
            raise UserError(
                f"a genotype of space {self.name!r} has {len(sizes)} indices below their number "
                f"of choices; got {row.tolist()}"
            )
        row = self.canonical(row[None])[0]
        layers = tuple(self._decode_layer(row, slot) for slot in range(self.num_layers))
        d_model = self.d_model[row[self.columns["d_model"]] if "d_model" in self.columns else 0]
        return Arch(d_model, self.head_dim, self.vocab_size, layers)

    def _decode_layer(self, row: Genotypes, slot: int) -> LayerArch:
        choice = {
            gene: choices[self.indices(row[None], f"layers.{slot}.{gene}")[0]]
            for gene, choices in self.layer_choices().items()
        }
        return self.layer(choice)

    def layer(self, choice: Mapping[str, Any]) -> LayerArch:
        """Return the layer that a value for every gene of a slot describes."""
        if choice["skip"]:
            return LayerArch()
        num_heads, num_kv_heads = map(int, choice["heads"].split("x"))
        mixer = choice["mixer"]
        options = {name: choice[f"{mixer}.{name}"] for name in self.mixers.get(mixer, {})}
        return LayerArch(
            mixer=mixer,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            position=choice["position"],
            mixer_precision=choice["mixer_precision"],
            ffn=choice["ffn"],
            intermediate_size=choice["intermediate_size"],
            ffn_precision=choice["ffn_precision"],
            norm=choice["norm"],
            mixer_options=tuple(sorted(options.items())),
        )

    def encode(self, arch: Arch) -> Genotypes:
        """Return the canonical genotype of an arch.

        Raises:
            UserError: naming the field that the space does not offer.
        """
        self._check_fixed(arch)
        values: dict[str, Any] = {"d_model": arch.d_model}
        for slot, layer in enumerate(arch.layers):
            for gene, value in self._layer_values(layer).items():
                values[f"layers.{slot}.{gene}"] = value
        row: Genotypes = self.canonical(self.to_genotypes([values]))[0]
        for slot, layer in enumerate(arch.layers):
            # What no gene stands for, such as the only position offered, could differ unnoticed.
            offered = self._decode_layer(row, slot)
            if layer != offered:
                raise UserError(
                    f"layers[{slot}] is not in space {self.name!r}: the nearest it offers is "
                    f"{offered.to_dict()}"
                )
        return row

    def _check_fixed(self, arch: Arch) -> None:
        for field, given, fixed in (
            ("layer slots", len(arch.layers), self.num_layers),
            ("head_dim", arch.head_dim, self.head_dim),
            ("vocab_size", arch.vocab_size, self.vocab_size),
        ):
            if given != fixed:
                raise UserError(
                    f"the arch has {field}={given}, all of space {self.name!r} have {fixed}; "
                    "choose an arch of the space"
                )
        if arch.depth < self.min_depth:
            raise UserError(
                f"the arch has depth {arch.depth}, below min_depth={self.min_depth} of space "
                f"{self.name!r}; skip fewer layers"
            )

    def _layer_values(self, layer: LayerArch) -> dict[str, Any]:
        if layer.skip:
            return {"skip": True}
        values: dict[str, Any] = {"mixer": layer.mixer, "norm": layer.norm}
        values["intermediate_size"] = layer.intermediate_size
        if layer.mixer != ABSENT:
            values["heads"] = f"{layer.num_heads}x{layer.num_kv_heads}"
            values["position"] = layer.position
            values["mixer_precision"] = layer.mixer_precision
            listed = self.mixers.get(layer.mixer, {})
            values |= {f"{layer.mixer}.{k}": v for k, v in layer.mixer_options if k in listed}
        if layer.intermediate_size:
            values["ffn"], values["ffn_precision"] = layer.ffn, layer.ffn_precision
        return values

    def to_genotypes(self, params: Sequence[Mapping[str, Any]]) -> Genotypes:
        """Return the int matrix of mappings from gene name to value; absent genes are 0."""
        out = np.zeros((len(params), len(self.genes)), dtype=np.int64)
        fixed = self._all_choices()
        for row, values in enumerate(params):
            for name, value in values.items():
                choices = self.genes.get(name)
                if choices is None:
                    choices = fixed.get(name.split(".", 2)[-1] if "." in name else name, ())
                if value not in choices:
                    # A position that the mixer ignores is canonical "nope" even where the space
                    # offers only "rope".
                    if name.endswith(".position"):
                        continue
                    raise UserError(
                        f"{name}={value!r} is not in space {self.name!r}; choose one of "
                        f"{', '.join(map(str, choices)) or 'its own fields'}"
                    )
                if name in self.columns:
                    out[row, self.columns[name]] = choices.index(value)
        return out

    def to_params(self, genotypes: Genotypes) -> list[dict[str, Any]]:
        """Return one mapping from gene name to value per row."""
        items = list(self.genes.items())
        return [
            {name: choices[index] for (name, choices), index in zip(items, row, strict=True)}
            for row in genotypes.tolist()
        ]

    def largest(self) -> Arch:
        """Return the arch with every dimension at its maximum and first choices elsewhere."""
        return self._uniform(
            max(self.d_model), max(self.heads), max(self.intermediate_size), self.num_layers
        )

    def smallest(self) -> Arch:
        """Return the arch with every dimension at its minimum above 0, first choices elsewhere."""
        nonzero = [size for size in self.intermediate_size if size] or [0]
        return self._uniform(min(self.d_model), min(self.heads), min(nonzero), self.min_depth)

    def uniform(self, **choices: Any) -> Arch:
        """Return the arch with the same layer in `depth` evenly spread slots.

        Args:
            choices: `d_model`, `depth`, and values of layer genes (`mixer="softmax"`,
                `heads="6x2"`, ...); what is not given takes the largest arch's value.

        Raises:
            UserError: for an unknown gene, or a value the space does not offer.
        """
        d_model = choices.pop("d_model", max(self.d_model))
        depth = choices.pop("depth", self.num_layers)
        if not self.min_depth <= depth <= self.num_layers:
            raise UserError(
                f"depth={depth} is not in space {self.name!r}; choose {self.min_depth} to "
                f"{self.num_layers}"
            )
        base = self._default_choice(max(self.heads), max(self.intermediate_size))
        for name in choices:
            if name not in base:
                raise unknown("gene", name, base)
        arch = self._stack(d_model, self.layer({**base, **choices}), depth)
        self.encode(arch)
        return arch

    def one_change_from_largest(self) -> list[Arch]:
        """Return every arch that differs from the largest in one gene, changed in all slots.

        Together with the largest it is the one-factor-at-a-time design around the network that
        people start from: it shows what each choice costs where networks are good.
        """
        largest = self.largest()
        base = self._default_choice(max(self.heads), max(self.intermediate_size))
        changed: list[dict[str, Any]] = [{"d_model": width} for width in self.d_model]
        changed += [{"depth": depth} for depth in range(self.min_depth, self.num_layers)]
        for gene, choices in self.layer_choices().items():
            if gene != "skip":
                changed += [{gene: choice} for choice in choices if choice != base[gene]]
        changed += [
            {"mixer": key.partition(".")[0], key: choice}
            for key, choices in self.mixer_options().items()
            for choice in choices
        ]
        archs = {arch.id: arch for arch in (self.uniform(**change) for change in changed)}
        archs.pop(largest.id, None)
        return list(archs.values())

    def _default_choice(self, heads: tuple[int, int], size: int) -> dict[str, Any]:
        first = {gene: choices[0] for gene, choices in self.layer_choices().items()}
        return {**first, "heads": f"{heads[0]}x{heads[1]}", "intermediate_size": size}

    def _uniform(self, d_model: int, heads: tuple[int, int], size: int, depth: int) -> Arch:
        return self._stack(d_model, self.layer(self._default_choice(heads, size)), depth)

    def _stack(self, d_model: int, layer: LayerArch, depth: int) -> Arch:
        active = {round(i * self.num_layers / depth) for i in range(depth)}
        layers = tuple(layer if slot in active else LayerArch() for slot in range(self.num_layers))
        return Arch(d_model, self.head_dim, self.vocab_size, layers)

    def sample_genotypes(self, rng: np.random.Generator, num: int) -> Genotypes:
        """Draw `num` canonical genotypes, spread in size and in distance from the largest arch.

        Every genotype draws its own distribution over the choices of each gene and uses it in all
        slots. Drawing each slot uniformly instead would concentrate depth and size around their
        means (law of large numbers), which is the main defect of usual set-ups. For the same
        reason every genotype draws the share of genes that keep the first choice.
        """
        out = np.zeros((num, len(self.genes)), dtype=np.int64)
        keep = rng.random((num, 1)) * MAX_KEPT
        shares: dict[str, NDArray[np.float64]] = {}
        for name, choices in self.genes.items():
            gene = name.split(".", 2)[-1]
            if gene not in shares:
                shares[gene] = rng.dirichlet(np.ones(len(choices)), size=num).cumsum(axis=1)
            drawn = (rng.random((num, 1)) > shares[gene][:, :-1]).sum(axis=1)
            # Depth stays spread evenly.
            kept = (rng.random(num) < keep[:, 0]) & (gene != "skip")
            out[:, self.columns[name]] = np.where(kept, 0, drawn)
        return self.canonical(out)

    def sample(self, rng: np.random.Generator) -> Arch:
        """Draw one arch; see `sample_genotypes`."""
        return self.decode(self.sample_genotypes(rng, 1)[0])

    def random_of_size(self, rng: np.random.Generator, params: int, num_draws: int = 512) -> Arch:
        """Draw the arch of `num_draws` whose parameter count is nearest to `params`."""
        from searchspace.cost import CostTable, num_params

        genotypes = self.sample_genotypes(rng, num_draws)
        distance = np.abs(CostTable(self, num_params).of(genotypes) - params)
        return self.decode(genotypes[int(distance.argmin())])

    def mutate(self, arch: Arch, rng: np.random.Generator, rate: float = 0.1) -> Arch:
        """Redraw every gene with probability `rate`, at least one."""
        row = self.encode(arch)
        change = rng.random(len(row)) < rate
        change[rng.integers(len(row))] = True
        sizes = np.array([len(choices) for choices in self.genes.values()])
        return self.decode(np.where(change, rng.integers(0, sizes), row))

    def crossover(self, first: Arch, second: Arch, rng: np.random.Generator) -> Arch:
        """Take every whole layer slot, and the width, from either parent."""
        a, b = self.encode(first), self.encode(second)
        from_first = rng.random(self.num_layers + 1) < 0.5
        slots = [int(n.split(".")[1]) if "." in n else self.num_layers for n in self.genes]
        return self.decode(np.where(from_first[slots], a, b))

    def size(self) -> int:
        """Return the exact number of different archs."""
        mixers, without_mixer = 0, ABSENT in self.mixers
        for name, options in self.mixers.items():
            if name != ABSENT:
                ways = math.prod(len(choices) for choices in options.values())
                mixers += ways * len(self._positions(name))
        mixers *= len(self.heads) * len(self.mixer_precision)
        widths = [size for size in self.intermediate_size if size]
        ffns = len(widths) * len(self.ffn) * len(self.ffn_precision)
        without_ffn = 0 in self.intermediate_size
        active = (mixers + without_mixer) * (ffns + without_ffn) - (without_mixer and without_ffn)
        active *= len(self.norm)
        stacks: int = sum(
            math.comb(self.num_layers, depth) * active**depth
            for depth in range(self.min_depth, self.num_layers + 1)
        )
        return len(self.d_model) * stacks

    def _positions(self, mixer: str) -> tuple[str, ...]:
        from searchspace.mixers import MIXERS

        offered = tuple(p for p in self.position if p in MIXERS[mixer].positions)
        return offered or MIXERS[mixer].positions[:1]

    def sub_blocks(self) -> list[SubBlockSpec]:
        """Return every different sub-block that an arch of the space can contain."""
        from searchspace.cost import reachable_specs

        return reachable_specs(self)

    def with_vocabulary(self, vocab_size: int) -> SearchSpace:
        """Return the same space for another vocabulary."""
        return replace(self, vocab_size=vocab_size)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON-ready form, which `from_dict` reads."""
        return space_to_dict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], vocab_size: int) -> SearchSpace:
        """Build a space from the form a preset's TOML file has.

        Raises:
            UserError: for a missing or unknown key, with the nearest known one, or a wrong value.
        """
        return cls(vocab_size=vocab_size, **space_arguments(values))

    @classmethod
    def load(cls, preset: str, vocab_size: int) -> SearchSpace:
        """Read a shipped preset by name, or a TOML file by path.

        Raises:
            UserError: when there is no such preset or file, or it is not valid.
        """
        return cls.from_dict(read_space(preset), vocab_size)
