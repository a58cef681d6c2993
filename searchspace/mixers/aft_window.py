"""Attention free transformers with position biases in a window: AFT-local and AFT-conv.

Outside the window every token counts with `exp(key)` alone, so a running sum stands for all of
them: linear time, and a state of fixed size.

Shapes: B batch, T tokens, D d_model, C inner channels, H heads, K head width, E sums side by side
(of weighted values, of weights), R rank, W window, N blocks, I tokens of a block, M tokens that a
block sees.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from searchspace.linear import Linear, project
from searchspace.mixers._bounded import require_room
from searchspace.mixers._windows import band_index, band_sums, block_size, padding, sides
from searchspace.mixers.aft import BIAS_STD, FactorisedAft, average, bounded_exp, weigh
from searchspace.mixers.base import ATTENTION_AXES, Mixer, MixerState
from searchspace.specs import MixerSpec


@dataclass(kw_only=True)
class AftWindowState(MixerState):
    """Weighted values and weights: of the last W - 1 tokens, and the sum of all older ones."""

    older_BHE: Tensor
    last_BWHE: Tensor


class AftLocal(FactorisedAft):
    """AFT whose position biases are zero outside a window; older tokens are a running sum.

    Source: Zhai et al. 2021, "An Attention Free Transformer", section 3.2, "AFT-local", with the
    factorised position biases of "Parameterization" there. The window is counted in tokens (see
    `_windows`).
    """

    fixed_state: ClassVar = True
    options: ClassVar[dict[str, Any]] = {**FactorisedAft.options, "window": 32}

    def init_state(
        self, batch: int, max_tokens: int, device: torch.device | None = None
    ) -> AftWindowState:
        """Return the zero state; its size does not depend on `max_tokens`."""
        width = 2 * self.spec.num_heads * self.spec.head_dim
        return AftWindowState(
            conv_BTC=self.init_conv(batch, device),
            older_BHE=torch.zeros(batch, 1, width, device=device),
            last_BWHE=torch.zeros(batch, self.option("window") - 1, 1, width, device=device),
        )

    def forward(self, x_BTD: Tensor, state: AftWindowState | None = None) -> Tensor:
        """Average values, of all tokens or those so far.

        Raises:
            UserError: for more tokens than `spec.max_tokens`.
        """
        start = 0 if state is None else state.length
        require_room(self.spec, start + x_BTD.shape[1])
        q_BTC, k_BTC, v_BTC = self.project_qkv_flat(x_BTD, state)
        band_NHIM = self._band(start, x_BTD.shape[1])
        sums_BTHE = weigh(k_BTC, v_BTC).unsqueeze(2)
        sums_BTHE = window_and_rest(
            sums_BTHE, band_NHIM, int(self.option("window")), self.causal, state
        )
        out_BTC = average(sums_BTHE.squeeze(2), q_BTC.shape[-1])
        return self.o_proj(torch.sigmoid(q_BTC) * out_BTC)

    def _band(self, start: int, tokens: int) -> Tensor:
        """Return the weights of the windows of `tokens` tokens from position `start` on."""
        window = int(self.option("window"))
        before, after = sides(window, self.causal)
        block = block_size(tokens, window)
        padded = tokens + padding(tokens, block)
        room = 2 * block + window
        query_TR = rows(self.aft_query_position, start, start + padded, room)
        query_NIR = query_TR.unflatten(0, (-1, block))
        key_TR = rows(self.aft_key_position, start - before, start + padded + after, room)
        bias_NIM = query_NIR @ key_TR.unfold(0, block + window - 1, block)
        _, inside_IM = band_index(block, window, self.causal, bias_NIM.device)
        return (bounded_exp(bias_NIM) * inside_IM).unsqueeze(1)


def rows(factor_TR: Tensor, first: int, end: int, room: int) -> Tensor:
    """Return rows `first` to `end`, zeros where there are none, of which `room` are on a side."""
    if isinstance(first, torch.SymInt) or isinstance(end, torch.SymInt):
        # In a graph for any number of tokens all rows and zeros are a constant.
        return F.pad(factor_TR, (0, 0, room, room))[first + room : end + room]
    held = factor_TR[max(first, 0) : end]
    return F.pad(held, (0, 0, max(-first, 0), max(end - factor_TR.shape[0], 0)))


class AftConv(Mixer):
    """AFT with position biases by distance, for every head its own, and one key per head.

    The sum over the window weighs with `exp(w)`, the sum over all others with 1: the paper's
    `conv(exp(w) - 1) + global sum` without taking away again what was just added.

    Source: Zhai et al. 2021, "An Attention Free Transformer", section 3.2, "AFT-conv", and
    "Parameterization" for the biases `w_h = gain_h (raw_h - mean) / std + shift_h`.
    """

    heads: ClassVar = "equal"
    ordered: ClassVar = True
    fixed_state: ClassVar = True
    options: ClassVar[dict[str, Any]] = {"window": 32}
    option_choices: ClassVar[dict[str, tuple[Any, ...]]] = {"window": (4, 8, 16, 32, 64, 128)}
    axes: ClassVar = {
        "q_proj.weight": ATTENTION_AXES["q_proj.weight"],
        "v_proj.weight": ("num_heads*head_dim", "d_model"),
        "o_proj.weight": ATTENTION_AXES["o_proj.weight"],
        "aft_key.weight": ("num_heads", "d_model"),
        "aft_bias": ("num_heads", "window"),
        "aft_bias_gain": ("num_heads",),
        "aft_bias_shift": ("num_heads",),
    }

    def __init__(self, spec: MixerSpec) -> None:
        super().__init__(spec)
        width, heads = spec.num_heads * spec.head_dim, spec.num_heads
        self.q_proj = Linear(spec.d_model, width, spec.precision)
        self.v_proj = Linear(spec.d_model, width, spec.precision)
        self.o_proj = Linear(width, spec.d_model, spec.precision)
        self.aft_key = Linear(spec.d_model, heads, spec.precision)
        self.aft_bias = nn.Parameter(torch.empty(heads, int(self.option("window"))))
        self.aft_bias_gain = nn.Parameter(torch.empty(heads))
        self.aft_bias_shift = nn.Parameter(torch.empty(heads))

    def input_linears(self) -> list[Linear]:
        """Return all projections but the output's."""
        return [self.q_proj, self.aft_key, self.v_proj]

    def output_linear(self) -> Linear | None:
        """Return the output projection."""
        return self.o_proj

    def reset(self, generator: torch.Generator, depth: int) -> None:
        """Initialise; gain and shift start small: the paper's 0 would leave `raw` no gradient."""
        super().reset(generator, depth)
        nn.init.normal_(self.aft_bias, 0.0, 1.0, generator=generator)
        for value_H in (self.aft_bias_gain, self.aft_bias_shift):
            nn.init.normal_(value_H, 0.0, BIAS_STD, generator=generator)

    def init_state(
        self, batch: int, max_tokens: int, device: torch.device | None = None
    ) -> AftWindowState:
        """Return the zero state; its size does not depend on `max_tokens`."""
        shape = (self.spec.num_heads, self.spec.head_dim + 1)
        return AftWindowState(
            older_BHE=torch.zeros(batch, *shape, device=device),
            last_BWHE=torch.zeros(batch, self.option("window") - 1, *shape, device=device),
        )

    def forward(self, x_BTD: Tensor, state: AftWindowState | None = None) -> Tensor:
        """Average values, of all tokens or those so far."""
        q_BTC, k_BTH, v_BTC = project(x_BTD, self.q_proj, self.aft_key, self.v_proj)
        sums_BTHE = weigh(k_BTH.unsqueeze(-1), v_BTC.unflatten(-1, (-1, self.spec.head_dim)))
        window = int(self.option("window"))
        block = block_size(x_BTD.shape[1], window)
        index_IM, inside_IM = band_index(block, window, self.causal, x_BTD.device)
        band_HIM = bounded_exp(self._biases())[:, index_IM] * inside_IM
        sums_BTHE = window_and_rest(sums_BTHE, band_HIM[None], window, self.causal, state)
        out_BTC = average(sums_BTHE, self.spec.head_dim).flatten(2)
        return self.o_proj(torch.sigmoid(q_BTC) * out_BTC)

    def _biases(self) -> Tensor:
        """Return the position biases (H, W), by distance."""
        normal_HW = F.layer_norm(self.aft_bias, self.aft_bias.shape[1:])
        return torch.addcmul(self.aft_bias_shift[:, None], normal_HW, self.aft_bias_gain[:, None])


def window_and_rest(
    x_BTHE: Tensor, band_NHIM: Tensor, window: int, causal: bool, state: AftWindowState | None
) -> Tensor:
    """Return weighted sums over each token's window plus plain sums over all other tokens.

    Args:
        x_BTHE: what is summed.
        band_NHIM: weights inside the window, see `band_sums`.
        window: tokens of a window.
        causal: whether later tokens count.
        state: gone on from and updated; only where `causal`.
    """
    before, after = sides(window, causal)
    tokens = x_BTHE.shape[1]
    if state is None:
        padded = F.pad(x_BTHE, (0, 0, 0, 0, before, after))
        older = torch.zeros_like(x_BTHE[:, :1])
    else:
        padded = torch.cat([state.last_BWHE, x_BTHE], dim=1)
        older = state.older_BHE.unsqueeze(1)
    sums = torch.cat([older, padded[:, :tokens]], dim=1).cumsum(dim=1)
    out = band_sums(padded, band_NHIM) + sums[:, :tokens]
    if state is not None:
        # Copies, so that the state does not keep whole prompts alive.
        state.older_BHE, state.last_BWHE = sums[:, -1].clone(), padded[:, tokens:].clone()
        state.length += tokens
    if not causal:
        later = padded[:, window:].flip(1).cumsum(dim=1).flip(1)
        out = out + F.pad(later, (0, 0, 0, 0, 0, 1))
    return out
