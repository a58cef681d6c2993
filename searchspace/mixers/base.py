"""What a token mixer is.

Shapes: B batch, T tokens, D d_model, H query heads, G key/value heads, K head width, C channels,
W taps of a convolution.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from searchspace.convolution import causal_conv, depthwise_conv, reset_conv
from searchspace.linear import Linear, project
from searchspace.operator import Operator
from searchspace.specs import MixerSpec


@dataclass(kw_only=True)
class MixerState:
    """What a mixer remembers of the tokens it has seen; changed in place by `forward`.

    A subclass adds its tensors as fields. Setting `length` back to an earlier value is allowed
    (a cache forgets the newest tokens; a fixed-size state merely goes on).

    Args:
        length: tokens seen so far.
        conv_BTC: the last inputs of the convolutions after the projections, if there are any.
    """

    by_position: ClassVar[frozenset[str]] = frozenset()
    """Tensors with a place of its own for every token, of which only the first `length` are read:
    for them an earlier `length` forgets the newest tokens exactly. See `searchspace.state_mark`."""

    length: int = 0
    conv_BTC: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that make up the state."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}


@dataclass
class SharedKV:
    """Keys and values that a layer hands to later ones (cross-layer attention).

    Args:
        k_BGSK: keys of every token so far, positions applied; None before the first provider.
        v_BGSK: values.
        start: position of the first query token of this call.
        visible_BS: which tokens are no padding; None where all count.
    """

    k_BGSK: Tensor | None = None
    v_BGSK: Tensor | None = None
    start: int = 0
    visible_BS: Tensor | None = None


class Mixer(Operator):
    """A token mixer built at its final size from a `MixerSpec`.

    A subclass declares the class variables below, and implements `forward` and, for its causal
    form, `init_state`. A parameter called `weight` with two axes is a matrix of a `Linear`; other
    parameters have other names.
    """

    spec: MixerSpec

    directions: ClassVar[tuple[str, ...]] = ("causal", "bidirectional")
    """The forms it has: ``"causal"`` (with a state), ``"bidirectional"`` (for encoders)."""
    positions: ClassVar[tuple[str, ...]] = ("nope",)
    """Kinds of position encoding it can use (see `searchspace.positions`), the default first."""
    ordered: ClassVar[bool] = False
    """Whether it tells the order of tokens apart without a position encoding."""
    heads: ClassVar[Literal["grouped", "equal", "none"]] = "grouped"
    """``"grouped"``: any number of key/value heads; ``"equal"``: as many as query heads;
    ``"none"``: heads have no meaning."""
    has_linears: ClassVar[bool] = True
    """Whether it has `Linear` maps, so that a precision has a meaning."""
    fixed_state: ClassVar[bool] = False
    """Whether the size of the causal state does not depend on the number of tokens."""
    bounded: ClassVar[bool] = False
    """Whether it has parameters for every position up to `spec.max_tokens`."""
    shares_kv: ClassVar[bool] = False
    """Whether it can take keys and values from an earlier layer (``spec.kv_shared``)."""

    def __init__(self, spec: MixerSpec) -> None:
        super().__init__()
        self.spec = spec
        self.causal = spec.causal

    @classmethod
    def head_kind(cls, options: Mapping[str, Any]) -> Literal["grouped", "equal", "none"]:
        """Return which numbers of heads have a meaning with these options; see `heads`."""
        return cls.heads

    @classmethod
    def knows_order(cls, options: Mapping[str, Any]) -> bool:
        """Whether it tells the order of tokens apart without a position encoding."""
        return cls.ordered or bool(options.get("qkv_dconv"))

    @classmethod
    def can_share_kv(cls, options: Mapping[str, Any]) -> bool:
        """Whether a layer with these options may take or provide keys and values."""
        return cls.shares_kv

    def forward(self, x_BTD: Tensor, state: Any = None) -> Tensor:
        """Mix `x_BTD`; with a state (causal form), go on from it and update it in place."""
        raise NotImplementedError

    def init_state(self, batch: int, max_tokens: int, device: torch.device | None = None) -> Any:
        """Return the empty state for `batch` sequences of at most `max_tokens` tokens."""
        raise NotImplementedError

    def attention_probs(self, x_BTD: Tensor, shared: SharedKV | None = None) -> Tensor | None:
        """Return the weights (B, H, T, S) that a softmax over keys gives; None without one.

        Only to look at: `forward` need not have them in one piece.
        """
        return None


ATTENTION_AXES: dict[str, tuple[str, ...]] = {
    "q_proj.weight": ("num_heads*head_dim", "d_model"),
    "k_proj.weight": ("num_kv_heads*head_dim", "d_model"),
    "v_proj.weight": ("num_kv_heads*head_dim", "d_model"),
    "o_proj.weight": ("d_model", "num_heads*head_dim"),
}
CONV_AXES: dict[str, tuple[str, ...]] = {
    "q_conv": ("num_heads*head_dim", "qkv_dconv"),
    "k_conv": ("num_kv_heads*head_dim", "qkv_dconv"),
    "v_conv": ("num_kv_heads*head_dim", "qkv_dconv"),
}
BIASED: dict[str, tuple[str, ...]] = {
    "none": (),
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "all": ("q_proj", "k_proj", "v_proj", "o_proj"),
}
"""Which projections have a bias, by the choices of the option `bias`."""


class ProjectedMixer(Mixer):
    """A mixer with the query, key, value and output projections that attention types share.

    Its option `qkv_dconv` (taps, 0 for none) puts a depthwise convolution over time behind each of
    the three projections; `bias` gives them, or all four, a bias.

    Source: So et al. 2021, "Primer", section 3.1 (multi-DConv-head attention), for `qkv_dconv`;
    Bai et al. 2023, "Qwen Technical Report", section 2.3 (`bias` ``"qkv"``).
    """

    axes: ClassVar[dict[str, tuple[str, ...]]] = ATTENTION_AXES
    options: ClassVar[dict[str, Any]] = {"qkv_dconv": 0, "bias": "none"}
    option_choices: ClassVar[dict[str, tuple[Any, ...]]] = {
        "qkv_dconv": (0, 2, 3, 4),
        "bias": tuple(BIASED),
    }

    def __init__(self, spec: MixerSpec) -> None:
        super().__init__(spec)
        d_model, precision = spec.d_model, spec.precision
        width, kv_width = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        biased = BIASED[self.option("bias")]
        self.q_proj = Linear(d_model, width, precision, "q_proj" in biased)
        self.k_proj = Linear(d_model, kv_width, precision, "k_proj" in biased)
        self.v_proj = Linear(d_model, kv_width, precision, "v_proj" in biased)
        self.o_proj = Linear(width, d_model, precision, "o_proj" in biased)
        self.num_taps = int(self.option("qkv_dconv"))
        if self.num_taps:
            self.q_conv = nn.Parameter(torch.empty(width, self.num_taps))
            self.k_conv = nn.Parameter(torch.empty(kv_width, self.num_taps))
            self.v_conv = nn.Parameter(torch.empty(kv_width, self.num_taps))

    @classmethod
    def param_axes(cls, spec: MixerSpec) -> dict[str, tuple[str, ...]]:
        """Return the axes, those of convolutions and biases only where they are there."""
        convolutions = CONV_AXES if cls.option_of(spec, "qkv_dconv") else {}
        return {**cls.axes, **convolutions, **cls.bias_axes(spec)}

    @classmethod
    def bias_axes(cls, spec: MixerSpec) -> dict[str, tuple[str, ...]]:
        """Return the axes of the biases that there are."""
        names = BIASED[cls.option_of(spec, "bias")]
        return {f"{name}.bias": cls.axes[f"{name}.weight"][:1] for name in names}

    def input_linears(self) -> list[Linear]:
        """Return the query, key and value projections; override where the input has other uses."""
        return [self.q_proj, self.k_proj, self.v_proj]

    def output_linear(self) -> Linear | None:
        """Return the output projection."""
        return self.o_proj

    def reset(self, generator: torch.Generator, depth: int) -> None:
        """Initialise; convolutions start near the identity."""
        super().reset(generator, depth)
        if self.num_taps:
            for weight_CW in (self.q_conv, self.k_conv, self.v_conv):
                reset_conv(weight_CW, generator)

    def split_heads(self, x_BTD: Tensor) -> Tensor:
        """View (B, T, heads*K) as (B, heads, T, K)."""
        return x_BTD.unflatten(-1, (-1, self.spec.head_dim)).transpose(1, 2)

    def merge_heads(self, x_BHTK: Tensor) -> Tensor:
        """Bring (B, H, T, K) back to (B, T, H*K)."""
        return x_BHTK.transpose(1, 2).flatten(2)

    def init_conv(self, batch: int, device: torch.device | None = None) -> Tensor | None:
        """Return `MixerState.conv_BTC` of an empty state; None without `qkv_dconv`."""
        if not self.num_taps:
            return None
        width = (self.spec.num_heads + 2 * self.spec.num_kv_heads) * self.spec.head_dim
        return torch.zeros(batch, self.num_taps - 1, width, device=device)

    def project_qkv(
        self, x_BTD: Tensor, state: MixerState | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries (B, H, T, K), keys and values (B, G, T, K).

        Args:
            x_BTD: the mixer's input.
            state: its `conv_BTC` is gone on from and updated; its `length` is left to the caller.
        """
        q, k, v = project(x_BTD, self.q_proj, self.k_proj, self.v_proj)
        q, k, v = self.convolve_qkv(q, k, v, state)
        return self.split_heads(q), self.split_heads(k), self.split_heads(v)

    def convolve_qkv(
        self, q_BTC: Tensor, k_BTC: Tensor, v_BTC: Tensor, state: MixerState | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Apply the convolutions of `qkv_dconv`; returns what it was given where there are none."""
        if not self.num_taps:
            return q_BTC, k_BTC, v_BTC
        sizes = [q_BTC.shape[-1], k_BTC.shape[-1], v_BTC.shape[-1]]
        x_BTC = torch.cat([q_BTC, k_BTC, v_BTC], dim=-1)
        weight_CW = torch.cat([self.q_conv, self.k_conv, self.v_conv])
        if not self.causal:
            return depthwise_conv(x_BTC, weight_CW).split(sizes, dim=-1)
        before = None if state is None else state.conv_BTC
        out_BTC, after = causal_conv(x_BTC, weight_CW, before)
        if state is not None:
            state.conv_BTC = after
        return out_BTC.split(sizes, dim=-1)
