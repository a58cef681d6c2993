"""Recurrences without matrices: every channel of the state is a gated sum of its own past.

Shapes: B batch, T tokens, D d_model, C = H * K channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from nas_kernels.linear_scan import linear_scan
from searchspace.linear import Linear
from searchspace.mixers.base import ATTENTION_AXES, Mixer, MixerState
from searchspace.specs import MixerSpec

LONGEST_MEMORY = 512
"""Tokens up to which the memory of freshly initialised channels reaches."""


@dataclass(kw_only=True)
class ScanState(MixerState):
    """The hidden state after the last token.

    Args:
        hidden_BC: one number per channel.
    """

    hidden_BC: Tensor


class ValueMixer(Mixer):
    """Base of the recurrent mixers that have values but no attention: `v_proj` and `o_proj`.

    The inner width, one number or vector of state per channel, is that of all heads.
    """

    ordered: ClassVar[bool] = True
    fixed_state: ClassVar[bool] = True
    heads: ClassVar[Literal["grouped", "equal", "none"]] = "equal"
    axes: ClassVar[dict[str, tuple[str, ...]]] = {
        name: ATTENTION_AXES[name] for name in ("v_proj.weight", "o_proj.weight")
    }

    def __init__(self, spec: MixerSpec) -> None:
        super().__init__(spec)
        self.width = spec.num_heads * spec.head_dim
        self.v_proj = Linear(spec.d_model, self.width, spec.precision)
        self.o_proj = Linear(self.width, spec.d_model, spec.precision)

    def output_linear(self) -> Linear | None:
        """Return the output projection."""
        return self.o_proj


class ScanMixer(ValueMixer):
    """Base of the mixers `h_t = a_t h_{t-1} + b_t` with gates of the input."""

    def init_state(
        self, batch: int, max_tokens: int, device: torch.device | None = None
    ) -> ScanState:
        """Return the zero state; its size does not depend on `max_tokens`."""
        return ScanState(hidden_BC=torch.zeros(batch, self.width, device=device))

    def scan(self, decay_BTC: Tensor, added_BTC: Tensor, state: ScanState | None) -> Tensor:
        """Return every h; the bidirectional form returns the mean of both directions."""
        if not self.causal:
            forward, backward = linear_scan(both_ways(decay_BTC), both_ways(added_BTC))[0].chunk(2)
            return (forward + backward.flip(1)) / 2
        before = None if state is None else state.hidden_BC
        hidden_BTC, after = linear_scan(decay_BTC, added_BTC, before)
        if state is not None:
            state.hidden_BC = after
            state.length += added_BTC.shape[1]
        return hidden_BTC


def both_ways(x_BTC: Tensor) -> Tensor:
    """Return the sequences and, as further sequences, what they are backward in time."""
    return torch.cat([x_BTC, x_BTC.flip(1)])


@torch.no_grad()
def reset_memory(bias_C: Tensor, generator: torch.Generator, sign: float = 1.0) -> None:
    """Set gate biases so that memories last from 1 to `LONGEST_MEMORY` tokens.

    Args:
        bias_C: changed in place.
        generator: draws the lengths.
        sign: 1 for a gate that keeps the state, -1 for one that lets new input in.

    Source: Tallec and Ollivier 2018, "Can recurrent neural networks warp time?", equation 16.
    """
    bias_C.uniform_(1.0, LONGEST_MEMORY - 1.0, generator=generator).log_().mul_(sign)
