"""Residual sub-blocks: the modules a `Subnet` is a list of and a latency table is made of.

Shapes: B batch, T tokens, D d_model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from searchspace.ends import Ends
from searchspace.ffn import FFNS
from searchspace.ffn.mlp import FFN
from searchspace.mixers import MIXERS, Mixer
from searchspace.mixers.base import SharedKV
from searchspace.norms import NORMS
from searchspace.specs import EndsSpec, FFNSpec, MixerSpec, SubBlockSpec


class ResidualBlock(nn.Module):
    """An operator with its norms and the residual addition.

    `placement` says where norms stand: ``"pre"`` is `x + f(N(x))`, ``"post"`` is `N(x + f(x))`,
    ``"peri"`` is `x + N'(f(N(x)))`.

    Source: Xiong et al. 2020, "On Layer Normalization in the Transformer Architecture" (pre and
    post); Kim et al. 2025, "Peri-LN", equation 3.
    """

    op: Mixer | FFN

    def __init__(self, spec: MixerSpec | FFNSpec) -> None:
        super().__init__()
        self.spec = spec
        self.norm: nn.Module = NORMS[spec.norm](spec.d_model)
        if spec.placement == "peri":
            self.norm_out: nn.Module = NORMS[spec.norm](spec.d_model)

    def residual(self, x_BTD: Tensor, *args: Any) -> Tensor:
        """Return the sub-block's result; `args` go to the operator."""
        if self.spec.placement == "post":
            out: Tensor = self.norm(x_BTD + self.op(x_BTD, *args))
            return out
        change = self.op(self.norm(x_BTD), *args)
        if self.spec.placement == "peri":
            change = self.norm_out(change)
        return x_BTD + change

    def init_state(self, batch: int, max_tokens: int, device: torch.device | None = None) -> Any:
        """Return the operator's empty state; None where it remembers nothing."""
        return self.op.init_state(batch, max_tokens, device)


class MixerBlock(ResidualBlock):
    """A token mixer with its norms and the residual addition."""

    spec: MixerSpec
    op: Mixer

    def __init__(self, spec: MixerSpec) -> None:
        super().__init__(spec)
        self.op = MIXERS[spec.mixer](spec)

    def forward(self, x_BTD: Tensor, state: Any = None, shared: SharedKV | None = None) -> Tensor:
        """Mix tokens.

        Args:
            x_BTD: the residual stream.
            state: gone on from and updated in place.
            shared: keys and values of an earlier layer, for mixers that can share them.
        """
        if self.op.shares_kv:
            return self.residual(x_BTD, state, shared)
        return self.residual(x_BTD, state)


class FFNBlock(ResidualBlock):
    """An FFN with its norms and the residual addition."""

    spec: FFNSpec
    op: FFN

    def __init__(self, spec: FFNSpec) -> None:
        super().__init__(spec)
        self.op = FFNS[spec.ffn](spec)

    def forward(self, x_BTD: Tensor, state: Any = None) -> Tensor:
        """Map each token; only a stateful FFN has a state."""
        return self.residual(x_BTD, state)


def build_sub_block(spec: SubBlockSpec) -> MixerBlock | FFNBlock | Ends:
    """Build the module of a spec with uninitialised parameters; see `reset_sub_block`."""
    if isinstance(spec, MixerSpec):
        return MixerBlock(spec)
    if isinstance(spec, FFNSpec):
        return FFNBlock(spec)
    return Ends(spec)


def reset_sub_block(
    block: MixerBlock | FFNBlock | Ends, generator: torch.Generator, depth: int
) -> None:
    """Initialise a sub-block of a network with `depth` layers."""
    if isinstance(block, Ends):
        block.reset(generator)
    else:
        block.op.reset(generator, depth)


def param_axes(spec: SubBlockSpec) -> dict[str, tuple[str, ...]]:
    """Return the named dimension of every axis of every parameter of a sub-block."""
    if isinstance(spec, EndsSpec):
        return Ends.param_axes(spec)
    if isinstance(spec, MixerSpec):
        axes = MIXERS[spec.mixer].param_axes(spec)
    else:
        axes = FFNS[spec.ffn].param_axes(spec)
    norms = ("norm", "norm_out") if spec.placement == "peri" else ("norm",)
    named = {
        f"{norm}.{name}": named for norm in norms for name, named in NORMS[spec.norm].axes.items()
    }
    return {**named, **{f"op.{name}": named for name, named in axes.items()}}
