"""What a token mixer is.

Shapes: B batch, T tokens, D d_model, H query heads, G key/value heads, K head width.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from searchspace.linear import Linear, project
from searchspace.specs import MixerSpec


class MixerState(Protocol):
    """What a mixer remembers of the tokens it has seen; changed in place by `forward`."""

    length: int

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that make up the state."""
        ...


class Mixer(nn.Module):
    """A causal token mixer built at its final size from a `MixerSpec`.

    A subclass declares `positions` (the position encodings it can use, the default first),
    `options` (its own options with defaults) and `axes` (the named dimension of each parameter
    axis), and implements `forward` and `init_state`.
    """

    positions: ClassVar[tuple[str, ...]] = ("nope",)
    options: ClassVar[dict[str, Any]] = {}
    axes: ClassVar[dict[str, tuple[str, ...]]] = {}

    def __init__(self, spec: MixerSpec) -> None:
        super().__init__()
        self.spec = spec

    def forward(self, x_BTD: Tensor, state: Any = None) -> Tensor:
        """Mix `x_BTD` causally; with a state, go on from it and update it in place."""
        raise NotImplementedError

    def init_state(self, batch: int, max_tokens: int, device: torch.device | None = None) -> Any:
        """Return the empty state for `batch` sequences of at most `max_tokens` tokens."""
        raise NotImplementedError

    def reset(self, generator: torch.Generator, depth: int) -> None:
        """Initialise every parameter; output projections shrink with the `depth`."""
        for name, module in self.named_children():
            if isinstance(module, Linear):
                gain = 1.0 / math.sqrt(2 * max(depth, 1)) if name == "o_proj" else 1.0
                module.reset(generator, gain)


ATTENTION_AXES: dict[str, tuple[str, ...]] = {
    "q_proj.weight": ("num_heads*head_dim", "d_model"),
    "k_proj.weight": ("num_kv_heads*head_dim", "d_model"),
    "v_proj.weight": ("num_kv_heads*head_dim", "d_model"),
    "o_proj.weight": ("d_model", "num_heads*head_dim"),
}


class ProjectedMixer(Mixer):
    """A mixer with the query, key, value and output projections that attention types share."""

    axes: ClassVar[dict[str, tuple[str, ...]]] = ATTENTION_AXES

    def __init__(self, spec: MixerSpec) -> None:
        super().__init__(spec)
        d_model, precision = spec.d_model, spec.precision
        self.q_proj = Linear(d_model, spec.num_heads * spec.head_dim, precision)
        self.k_proj = Linear(d_model, spec.num_kv_heads * spec.head_dim, precision)
        self.v_proj = Linear(d_model, spec.num_kv_heads * spec.head_dim, precision)
        self.o_proj = Linear(spec.num_heads * spec.head_dim, d_model, precision)

    def split_heads(self, x_BTD: Tensor) -> Tensor:
        """View (B, T, heads*K) as (B, heads, T, K)."""
        return x_BTD.unflatten(-1, (-1, self.spec.head_dim)).transpose(1, 2)

    def merge_heads(self, x_BHTK: Tensor) -> Tensor:
        """Bring (B, H, T, K) back to (B, T, H*K)."""
        return x_BHTK.transpose(1, 2).flatten(2)

    def project_qkv(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries (B, H, T, K), keys and values (B, G, T, K)."""
        q, k, v = project(x_BTD, self.q_proj, self.k_proj, self.v_proj)
        return self.split_heads(q), self.split_heads(k), self.split_heads(v)
