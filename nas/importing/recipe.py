"""What becomes of a checkpoint: the arch that it is, and where each of our tensors comes from.

Shapes: D d_model, F hidden units of an FFN, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from searchspace.arch import Arch
from searchspace.errors import UserError
from searchspace.family import Family
from searchspace.layer_arch import LayerArch

MAX_LAYERS = 1024


def _the_only(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class Part:
    """How one of our tensors is made of a checkpoint's.

    Args:
        sources: names of the checkpoint's tensors with the shapes that they must have.
        make: takes these tensors in that order.
    """

    sources: Mapping[str, tuple[int, ...]]
    make: Callable[..., Tensor] = _the_only


def same(name: str, *shape: int) -> Part:
    """Return the part that is a tensor as it is."""
    return Part({name: shape})


def linear(ours: str, theirs: str, out_features: int, in_features: int, bias: bool) -> Parts:
    """Return the parts of a linear map that both sides store as (out, in)."""
    parts = {f"{ours}.weight": same(f"{theirs}.weight", out_features, in_features)}
    if bias:
        parts[f"{ours}.bias"] = same(f"{theirs}.bias", out_features)
    return parts


def layer_norm(ours: str, theirs: str, width: int) -> Parts:
    """Return the parts of a norm with scale and shift."""
    return {f"{ours}.{name}": same(f"{theirs}.{name}", width) for name in ("weight", "bias")}


Parts = dict[str, Part]


@dataclass(frozen=True)
class Recipe:
    """A checkpoint's network in our terms.

    Args:
        architecture: name of the class in transformers.
        layer: what every slot of the largest arch is.
        d_model: width of the residual stream.
        head_dim: width of a head.
        vocab_size: number of token ids.
        num_layers: number of layer slots.
        family: what goes in and comes out.
        parts: of every parameter of our network.
        meaningless: names of tensors that may be there and change nothing end like this.
    """

    architecture: str
    layer: LayerArch
    d_model: int
    head_dim: int
    vocab_size: int
    num_layers: int
    family: Family
    parts: Parts
    meaningless: tuple[str, ...] = field(default=())

    @property
    def arch(self) -> Arch:
        """The whole network."""
        layers = (self.layer,) * self.num_layers
        return Arch(self.d_model, self.head_dim, self.vocab_size, layers, self.family)

    def sources(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor that the checkpoint must hold."""
        return {n: shape for part in self.parts.values() for n, shape in part.sources.items()}


def norm_name(kind: str, eps: float) -> str:
    """Return the norm of a kind (``"rmsnorm"``, ``"layernorm"``) with this number under the root.

    Raises:
        UserError: when there is none.
    """
    from searchspace.norms import NORMS

    known = {norm.eps: name for name, norm in NORMS.items() if name.split("_")[0] == kind}  # type: ignore[attr-defined]
    if eps not in known:
        raise UserError(
            f"config.json asks for a {kind} with {eps:g} under the root; known are "
            f"{', '.join(f'{value:g}' for value in known)}, add a class like those in "
            "searchspace/norms"
        )
    return known[eps]


def check_num_layers(number: int) -> int:
    """Refuse what no checkpoint has, before a list of that length is made."""
    if number > MAX_LAYERS:
        raise UserError(f"config.json claims {number} layers; at most {MAX_LAYERS} are read")
    return number
