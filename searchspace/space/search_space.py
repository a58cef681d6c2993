"""`SearchSpace`: which archs there are, and how to draw, encode, count and change them.

A genotype is a vector of choice indices, one per gene (a gene with a single choice is left out).
Work on many genotypes is vectorised over int matrices of shape (n, genes); `canonical` brings
genotypes of the same function to the same row.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from searchspace.arch import Arch, LayerArch, check_family, width_of_head
from searchspace.errors import UserError, unknown
from searchspace.family import DECODER, Family
from searchspace.space import drawing, encoding, named, restricting
from searchspace.space.canonical import Genotypes, canonicalise
from searchspace.space.counting import count_archs
from searchspace.space.files import family_of, read_space, space_arguments, space_to_dict
from searchspace.space.halves import FFNHalf, MixerHalf
from searchspace.space.halves import Operators as OptionChoices
from searchspace.specs import SubBlockSpec


@dataclass(frozen=True)
class SearchSpace:
    """The choices of every dimension; each tuple lists the largest or default choice first.

    Args:
        name: for reports.
        vocab_size: number of token ids, a fact of the task.
        d_model: widths of the residual stream.
        head_dim: width of one head; 0 for heads that split the residual stream among them.
        num_layers: number of layer slots.
        min_depth: number of slots that are never skipped at once.
        mixers: for every mixer its options with their choices, such as
            ``{"softmax": {}, "sliding_window": {"window": (128, 32)}, "none": {}}``.
        heads: (query heads, key/value heads) pairs.
        position, mixer_precision, kv_shared, ffn, intermediate_size, ffn_precision, norm,
            norm_placement: choices per slot, with the meaning they have in `LayerArch`.
        ffn_options: for every FFN its options with their choices, such as
            ``{"gelu_stack": {"num_inner": (2, 0)}}``; FFNs without may be left out.
        family: what goes in and comes out.

    Raises:
        UserError: for an empty or repeated choice, an unknown name, or sizes that do not fit.
    """

    name: str
    vocab_size: int
    d_model: tuple[int, ...]
    head_dim: int
    num_layers: int
    mixers: OptionChoices
    heads: tuple[tuple[int, int], ...]
    intermediate_size: tuple[int, ...]
    min_depth: int = 1
    position: tuple[str, ...] = ("rope",)
    mixer_precision: tuple[str, ...] = ("fp32",)
    ffn: tuple[str, ...] = ("swiglu",)
    ffn_precision: tuple[str, ...] = ("fp32",)
    norm: tuple[str, ...] = ("rmsnorm",)
    norm_placement: tuple[str, ...] = ("pre",)
    kv_shared: tuple[bool, ...] = (False,)
    family: Family = DECODER
    ffn_options: OptionChoices = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("num_layers", "min_depth"):
            if type(getattr(self, name)) is not int:
                raise UserError(f"{name}={getattr(self, name)!r} must be a whole number")
        if not 1 <= self.min_depth <= self.num_layers:
            raise UserError(
                f"min_depth={self.min_depth} must lie between 1 and num_layers={self.num_layers}"
            )
        for name in self.ffn_options:
            if name not in self.ffn:
                raise unknown(f"FFN of space {self.name!r} with ffn_options", name, self.ffn)
        given = {name: options for name, options in self.ffn_options.items() if options}
        object.__setattr__(self, "ffn_options", given)
        for gene, choices in self.all_choices().items():
            if not choices:
                raise UserError(f"space {self.name!r}: {gene} has no choices; list at least one")
            if len(set(choices)) != len(choices):
                raise UserError(f"space {self.name!r}: {gene} lists a choice twice: {choices}")
        if self.kv_shared == (True,):
            raise UserError(
                f"space {self.name!r}: kv_shared=[true] leaves no layer that makes keys and "
                "values; list [false, true]"
            )
        try:
            self._check_layers()
        except UserError as error:
            raise UserError(f"space {self.name!r}: {error}") from None

    def _check_layers(self) -> None:
        """Build every half of a layer and the extreme archs: this validates every name and size."""
        if self.layer({gene: options[0] for gene, options in self.layer_choices().items()}).skip:
            raise UserError(
                "the first mixer is 'none' and the first intermediate_size 0, which is no layer; "
                "put another choice first"
            )
        for layer in (*self.mixer_half.layers, *self.ffn_half.layers):
            check_family(layer, self.family)
        for layer, d_model in itertools.product(self.mixer_half.layers, self.d_model):
            width_of_head(layer, d_model, self.head_dim)
        self.largest(), self.smallest()

    @cached_property
    def mixer_half(self) -> MixerHalf:
        """Every mixer sub-block of a slot."""
        return MixerHalf(self)

    @cached_property
    def ffn_half(self) -> FFNHalf:
        """Every FFN sub-block of a slot."""
        return FFNHalf(self)

    def layer_choices(self) -> dict[str, tuple[Any, ...]]:
        """Return the choices of every gene of a layer slot, single-choice ones included."""
        return self._layer_choices

    @cached_property
    def _layer_choices(self) -> dict[str, tuple[Any, ...]]:
        can_skip = self.min_depth < self.num_layers
        return {
            "skip": (False, True) if can_skip else (False,),
            "mixer": tuple(self.mixers),
            **_option_genes(self.mixers),
            "heads": tuple(f"{q}x{kv}" for q, kv in self.heads),
            "position": self.position,
            "mixer_precision": self.mixer_precision,
            "kv_shared": self.kv_shared,
            "ffn": self.ffn,
            **_option_genes(self.ffn_options),
            "intermediate_size": self.intermediate_size,
            "ffn_precision": self.ffn_precision,
            "norm": self.norm,
            "norm_placement": self.norm_placement,
        }

    def all_choices(self) -> dict[str, tuple[Any, ...]]:
        """Return the choices of the width and of every gene of a slot."""
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

    @cached_property
    def slot_columns(self) -> list[list[int]]:
        """Columns of each slot's genes in a genotype."""
        prefixes = [f"layers.{slot}." for slot in range(self.num_layers)]
        return [[c for n, c in self.columns.items() if n.startswith(p)] for p in prefixes]

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
        return encoding.decode(self, genotype)

    def arch(self, d_model: int, layers: tuple[LayerArch, ...]) -> Arch:
        """Return the arch of these layers with the facts that all archs of the space share."""
        return Arch(d_model, self.head_dim, self.vocab_size, layers, self.family)

    def layer(self, choice: Mapping[str, Any]) -> LayerArch:
        """Return the layer that a value for every gene of a slot describes."""
        if choice["skip"]:
            return LayerArch()
        num_heads, num_kv_heads = map(int, choice["heads"].split("x"))
        mixer, ffn = choice["mixer"], choice["ffn"]
        options = {name: choice[f"{mixer}.{name}"] for name in self.mixers.get(mixer, {})}
        ffn_options = {name: choice[f"{ffn}.{name}"] for name in self.ffn_options.get(ffn, {})}
        return LayerArch(
            mixer=mixer,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            position=choice["position"],
            mixer_precision=choice["mixer_precision"],
            ffn=ffn,
            intermediate_size=choice["intermediate_size"],
            ffn_precision=choice["ffn_precision"],
            norm=choice["norm"],
            norm_placement=choice["norm_placement"],
            kv_shared=choice["kv_shared"],
            mixer_options=tuple(sorted(options.items())),
            ffn_options=tuple(sorted(ffn_options.items())),
        )

    def encode(self, arch: Arch) -> Genotypes:
        """Return the canonical genotype of an arch.

        Raises:
            UserError: naming the field that the space does not offer.
        """
        return encoding.encode(self, arch)

    def to_genotypes(self, params: Sequence[Mapping[str, Any]]) -> Genotypes:
        """Return the int matrix of mappings from gene name to value; absent genes are 0.

        Raises:
            UserError: for a gene or value that the space does not have.
        """
        return encoding.to_genotypes(self, params)

    def to_params(self, genotypes: Genotypes) -> list[dict[str, Any]]:
        """Return one mapping from gene name to value per row."""
        return encoding.to_params(self, genotypes)

    def largest(self) -> Arch:
        """Return the arch with every dimension at its maximum and first choices elsewhere."""
        return named.largest(self)

    def smallest(self) -> Arch:
        """Return the arch with every dimension at its minimum above 0, first choices elsewhere."""
        return named.smallest(self)

    def uniform(self, **choices: Any) -> Arch:
        """Return the arch with the same layer in `depth` evenly spread slots.

        Args:
            choices: `d_model`, `depth`, `cla_factor` (so many layers in a row use the keys and
                values of the first), and values of layer genes (`mixer="softmax"`,
                `heads="6x2"`, ...); what is not given takes the largest arch's value.

        Raises:
            UserError: for an unknown gene, or a value the space does not offer.
        """
        return named.uniform(self, **choices)

    def one_change_from_largest(self) -> list[Arch]:
        """Return every arch that differs from the largest in one gene, changed in all slots."""
        return named.one_change_from_largest(self)

    def sample_genotypes(self, rng: np.random.Generator, num: int) -> Genotypes:
        """Draw `num` canonical genotypes, spread in size and in distance from the largest arch.

        Every genotype draws its own distribution over the choices of each gene and uses it in all
        slots. Drawing each slot uniformly instead would concentrate depth and size around their
        means (law of large numbers), which is the main defect of usual set-ups. For the same
        reason every genotype draws the share of genes that keep the first choice.
        """
        return drawing.sample_genotypes(self, rng, num)

    def sample(self, rng: np.random.Generator) -> Arch:
        """Draw one arch; see `sample_genotypes`."""
        return self.decode(self.sample_genotypes(rng, 1)[0])

    def random_of_size(self, rng: np.random.Generator, params: int, num_draws: int = 512) -> Arch:
        """Draw the arch of `num_draws` whose parameter count is nearest to `params`."""
        return drawing.random_of_size(self, rng, params, num_draws)

    def mutate(self, arch: Arch, rng: np.random.Generator, rate: float = 0.1) -> Arch:
        """Redraw every gene with probability `rate`, at least one."""
        return drawing.mutate(self, arch, rng, rate)

    def crossover(self, first: Arch, second: Arch, rng: np.random.Generator) -> Arch:
        """Take every whole layer slot, and the width, from either parent."""
        return drawing.crossover(self, first, second, rng)

    def size(self) -> int:
        """Return the exact number of different archs."""
        return count_archs(self)

    def sub_blocks(self) -> list[SubBlockSpec]:
        """Return every different sub-block that an arch of the space can contain."""
        from searchspace.cost import reachable_specs

        return reachable_specs(self)

    def restricted(self, **choices: Sequence[Any]) -> SearchSpace:
        """Return the part of the space that keeps only some choices of some genes.

        Its archs are archs of this space with the same ids, so tables and weights of this space
        serve them.

        Args:
            choices: by gene, as in `all_choices`, the choices to keep, such as
                ``mixer_precision=["fp32"], heads=["4x4"], skip=[False]``; an option of an operator
                as ``**{"sliding_window.window": [32]}``. Other genes keep all of theirs.

        Raises:
            UserError: for an unknown gene or choice, or when no arch is left.
        """
        return restricting.restricted(self, choices)

    def with_vocabulary(self, vocab_size: int) -> SearchSpace:
        """Return the same space for another vocabulary."""
        return replace(self, vocab_size=vocab_size)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON-ready form, which `from_dict` reads."""
        return space_to_dict(self)

    @classmethod
    def from_dict(
        cls, values: Mapping[str, Any], vocab_size: int, facts: Mapping[str, Any] | None = None
    ) -> SearchSpace:
        """Build a space from the form a preset's TOML file has.

        Args:
            values: the form of the file.
            vocab_size: token ids of the task.
            facts: fields of `Family` that the task decides, such as `num_classes`.

        Raises:
            UserError: for a missing or unknown key, with the nearest known one, or a wrong value.
        """
        arguments = space_arguments(values)
        arguments["family"] = family_of(arguments["family"], facts or {}, arguments["name"])
        return cls(vocab_size=vocab_size, **arguments)

    @classmethod
    def load(
        cls, preset: str, vocab_size: int, facts: Mapping[str, Any] | None = None
    ) -> SearchSpace:
        """Read a shipped preset by name, or a TOML file by path; see `from_dict`.

        Raises:
            UserError: when there is no such preset or file, or it is not valid.
        """
        return cls.from_dict(read_space(preset), vocab_size, facts)


def _option_genes(operators: OptionChoices) -> dict[str, tuple[Any, ...]]:
    """Return the choices of every option gene, named `<operator>.<option>`."""
    return {
        f"{operator}.{option}": tuple(choices)
        for operator, options in operators.items()
        for option, choices in options.items()
    }
