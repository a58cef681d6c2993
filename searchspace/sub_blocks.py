"""Residual sub-blocks: the modules a `Subnet` is a list of and a latency table is made of.

Shapes: B batch, T tokens, D d_model, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from searchspace.ffn import FFNS
from searchspace.linear import Linear
from searchspace.mixers import MIXERS
from searchspace.norms import NORMS, RMSNorm
from searchspace.specs import EndsSpec, FFNSpec, MixerSpec, SubBlockSpec


class MixerBlock(nn.Module):
    """`x + mixer(norm(x))`."""

    def __init__(self, spec: MixerSpec) -> None:
        super().__init__()
        self.spec = spec
        self.norm = NORMS[spec.norm](spec.d_model)
        self.op = MIXERS[spec.mixer](spec)

    def forward(self, x_BTD: Tensor, state: Any = None) -> Tensor:
        """Mix tokens; a state is gone on from and updated in place."""
        return x_BTD + self.op(self.norm(x_BTD), state)

    def init_state(self, batch: int, max_tokens: int, device: torch.device | None = None) -> Any:
        """Return the mixer's empty state."""
        return self.op.init_state(batch, max_tokens, device)


class FFNBlock(nn.Module):
    """`x + ffn(norm(x))`."""

    def __init__(self, spec: FFNSpec) -> None:
        super().__init__()
        self.spec = spec
        self.norm = NORMS[spec.norm](spec.d_model)
        self.op = FFNS[spec.ffn](spec)

    def forward(self, x_BTD: Tensor, state: Any = None) -> Tensor:
        """Map each token on its own; there is no state."""
        return x_BTD + self.op(self.norm(x_BTD))

    def init_state(self, batch: int, max_tokens: int, device: torch.device | None = None) -> None:
        """Return None: an FFN remembers nothing."""
        return None


class Ends(nn.Module):
    """Token embedding, final norm and output head (not tied)."""

    def __init__(self, spec: EndsSpec) -> None:
        super().__init__()
        self.spec = spec
        self.embedding = nn.Parameter(torch.empty(spec.vocab_size, spec.d_model))
        self.norm = RMSNorm(spec.d_model)
        self.head = Linear(spec.d_model, spec.vocab_size)

    def embed(self, tokens_BT: Tensor) -> Tensor:
        """Look tokens up, (B, T) to (B, T, D)."""
        return F.embedding(tokens_BT, self.embedding)

    def logits(self, x_BTD: Tensor) -> Tensor:
        """Return the logits (B, T, V)."""
        return self.head(self.norm(x_BTD))

    def forward(self, tokens_BT: Tensor, state: Any = None) -> Tensor:
        """Embed and predict at once: the cost of a network without any layer."""
        return self.logits(self.embed(tokens_BT))

    def init_state(self, batch: int, max_tokens: int, device: torch.device | None = None) -> None:
        """Return None: the ends remember nothing."""
        return None


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
        with torch.no_grad():
            block.embedding.normal_(0.0, 1.0, generator=generator)
        # Small logits at first: the loss starts at log(vocabulary).
        block.head.reset(generator, gain=0.1)
    else:
        block.op.reset(generator, depth)


def pack(module: nn.Module) -> None:
    """Turn every int8 layer into the form that really runs in int8."""
    for child in module.modules():
        if isinstance(child, Linear):
            child.pack()


def param_axes(spec: SubBlockSpec) -> dict[str, tuple[str, ...]]:
    """Return the named dimension of every axis of every parameter of a sub-block."""
    if isinstance(spec, EndsSpec):
        return {
            "embedding": ("vocab_size", "d_model"),
            "norm.weight": ("d_model",),
            "head.weight": ("vocab_size", "d_model"),
        }
    op = MIXERS[spec.mixer] if isinstance(spec, MixerSpec) else FFNS[spec.ffn]
    norm = {f"norm.{name}": axes for name, axes in NORMS[spec.norm].axes.items()}
    return {**norm, **{f"op.{name}": axes for name, axes in op.axes.items()}}
