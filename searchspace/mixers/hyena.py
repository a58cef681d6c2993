"""Hyena: gates and long convolutions with implicit filters.

Shapes: B batch, T tokens, D d_model, C inner channels, N order, S tokens so far, L filter length,
P features of a position.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nas_kernels.constants import cached_constant
from searchspace.convolution import causal_conv, depthwise_conv, reset_conv
from searchspace.linear import Linear, project
from searchspace.mixers._bounded import require_room
from searchspace.mixers._long_conv import long_conv, long_conv_step
from searchspace.mixers.base import (
    ATTENTION_AXES,
    MixerState,
    ProjectedMixer,
)
from searchspace.specs import MixerSpec

NUM_WAVES = 8
NUM_FEATURES = 1 + 2 * NUM_WAVES
WIDTH = 64
SINE_FREQUENCY = 14.0
"""Of the activations; 14 is the paper's value for language."""
SLOWEST, FASTEST = math.log(100) / 1.5, math.log(100) / 0.3
"""Decay over the whole length: filters fall to 1 % after 1.5 and after 0.3 of it."""


@dataclass(kw_only=True)
class HyenaState(MixerState):
    """The inputs of the long convolutions for every token so far.

    The filters are worked out once per state, on its first use, and not once per token. They are
    the same for all sequences of a batch and follow from the weights, so `tensors` leaves them out.
    """

    by_position: ClassVar = frozenset({"history_BNSC"})

    history_BNSC: Tensor
    extra_conv_BTC: Tensor | None = None
    reversed_filters: list[Tensor]


class Hyena(ProjectedMixer):
    """`z_1 = v`, `z_{n+1} = x_n * (h_n conv z_n)`, output `W_o z_{N+1}`.

    A short convolution (option `qkv_dconv`) follows the projections to v and x_1 ... x_N. The
    filter h_n is a network of sines on features of the position, times an exponential window with
    a decay for every channel, plus a direct term; the bidirectional form evaluates the same
    network at negative positions too.

    Source: Poli et al. 2023, "Hyena Hierarchy", definition 3.1, equation 7 and algorithms 1-3.
    """

    heads: ClassVar = "equal"
    ordered: ClassVar = True
    bounded: ClassVar = True
    options: ClassVar[dict[str, Any]] = {"qkv_dconv": 3, "order": 2}
    option_choices: ClassVar[dict[str, tuple[Any, ...]]] = {
        **ProjectedMixer.option_choices,
        "order": (2, 3),
    }
    onnx: ClassVar = "its long convolutions use Fourier transforms of complex numbers"
    axes: ClassVar = {
        **ATTENTION_AXES,
        "hyena_in": ("hyena_width", "hyena_features"),
        "hyena_mid": ("hyena_layers", "hyena_width", "hyena_width"),
        "hyena_phase": ("hyena_sines", "hyena_width"),
        "hyena_filter": ("order", "num_heads*head_dim", "hyena_width"),
        "hyena_direct": ("order", "num_heads*head_dim"),
        "hyena_log_decay": ("num_heads*head_dim",),
    }

    def __init__(self, spec: MixerSpec) -> None:
        super().__init__(spec)
        self.order = int(self.option("order"))
        width = spec.num_heads * spec.head_dim
        if self.order == 3:
            self.hyena_proj = Linear(spec.d_model, width, spec.precision)
            if self.num_taps:
                self.hyena_conv = nn.Parameter(torch.empty(width, self.num_taps))
        self.hyena_in = nn.Parameter(torch.empty(WIDTH, NUM_FEATURES))
        self.hyena_mid = nn.Parameter(torch.empty(2, WIDTH, WIDTH))
        self.hyena_phase = nn.Parameter(torch.empty(3, WIDTH))
        self.hyena_filter = nn.Parameter(torch.empty(self.order, width, WIDTH))
        self.hyena_direct = nn.Parameter(torch.empty(self.order, width))
        self.hyena_log_decay = nn.Parameter(torch.empty(width))

    @classmethod
    def param_axes(cls, spec: MixerSpec) -> dict[str, tuple[str, ...]]:
        """Return the axes, with those of a third projection for order 3."""
        axes = super().param_axes(spec)
        if cls.option_of(spec, "order") == 3:
            axes = {**axes, "hyena_proj.weight": axes["q_proj.weight"]}
            if "q_conv" in axes:
                axes["hyena_conv"] = axes["q_conv"]
        return axes

    def input_linears(self) -> list[Linear]:
        """Return the projections to v and x_1 ... x_N."""
        return [*super().input_linears(), *([self.hyena_proj] if self.order == 3 else [])]

    def reset(self, generator: torch.Generator, depth: int) -> None:
        """Initialise; filters start with decays over the paper's range and gains near 1."""
        super().reset(generator, depth)
        for weight in (self.hyena_in, self.hyena_mid):
            bound = weight.shape[-1] ** -0.5
            nn.init.uniform_(weight, -bound, bound, generator=generator)
        # A filter of random values that lasts L / (2 decay) tokens: their squares sum up to 1.
        std = math.sqrt(2 * (SLOWEST + FASTEST) / max(self.spec.max_tokens, 1) / WIDTH)
        nn.init.normal_(self.hyena_filter, 0.0, std, generator=generator)
        nn.init.uniform_(self.hyena_phase, -math.pi, math.pi, generator=generator)
        nn.init.normal_(self.hyena_direct, 1.0, 0.1, generator=generator)
        decays = (math.log(SLOWEST), math.log(FASTEST))
        nn.init.uniform_(self.hyena_log_decay, *decays, generator=generator)
        if self.order == 3 and self.num_taps:
            reset_conv(self.hyena_conv, generator)

    def init_state(
        self, batch: int, max_tokens: int, device: torch.device | None = None
    ) -> HyenaState:
        """Return an empty history for `max_tokens` tokens."""
        width = self.spec.num_heads * self.spec.head_dim
        extra = None
        if self.order == 3 and self.num_taps:
            extra = torch.zeros(batch, self.num_taps - 1, width, device=device)
        return HyenaState(
            conv_BTC=self.init_conv(batch, device),
            history_BNSC=torch.zeros(batch, self.order, max_tokens, width, device=device),
            extra_conv_BTC=extra,
            reversed_filters=[],
        )

    def forward(self, x_BTD: Tensor, state: HyenaState | None = None) -> Tensor:
        """Mix all tokens, or those so far.

        Raises:
            UserError: for more tokens than `spec.max_tokens`.
        """
        tokens = x_BTD.shape[1]
        require_room(self.spec, tokens if state is None else state.length + tokens)
        z_BTC, *gates = self._projections(x_BTD, state)
        if state is None:
            filters_NLC = self.filters(0 if self.causal else 1 - tokens, tokens)
        for n, gate_BTC in enumerate(gates):
            if state is None:
                long_BTC = long_conv(z_BTC, filters_NLC[n])
            else:
                long_BTC = self._continue(n, z_BTC, state)
            z_BTC = gate_BTC * torch.addcmul(long_BTC, z_BTC, self.hyena_direct[n])
        if state is not None:
            state.length += tokens
        return self.o_proj(z_BTC)

    def _projections(self, x_BTD: Tensor, state: HyenaState | None) -> list[Tensor]:
        """Return v and x_1 ... x_N, behind the short convolutions."""
        q_BTC, k_BTC, v_BTC, *extra = project(x_BTD, *self.input_linears())
        q_BTC, k_BTC, v_BTC = self.convolve_qkv(q_BTC, k_BTC, v_BTC, state)
        if extra and self.num_taps:
            if self.causal:
                before = None if state is None else state.extra_conv_BTC
                extra[0], after = causal_conv(extra[0], self.hyena_conv, before)
                if state is not None:
                    state.extra_conv_BTC = after
            else:
                extra[0] = depthwise_conv(extra[0], self.hyena_conv)
        return [v_BTC, k_BTC, *extra, q_BTC]

    def _continue(self, n: int, z_BTC: Tensor, state: HyenaState) -> Tensor:
        """Convolve with the n-th filter, with the history of the state before the new tokens."""
        if not state.reversed_filters:
            filters_NLC = self.filters(0, state.history_BNSC.shape[2])
            reversed_NLC = filters_NLC.flip(1).to(state.history_BNSC.dtype)
            state.reversed_filters = list(reversed_NLC.unbind())
        start, end = state.length, state.length + z_BTC.shape[1]
        state.history_BNSC[:, n, start:end] = z_BTC
        history_BSC, reversed_LC = state.history_BNSC[:, n, :end], state.reversed_filters[n]
        if z_BTC.shape[1] == 1:
            return long_conv_step(history_BSC, reversed_LC)
        filter_SC = reversed_LC[reversed_LC.shape[0] - end :].flip(0)
        return long_conv(history_BSC, filter_SC)[:, start:]

    def filters(self, first: int, end: int) -> Tensor:
        """Return the filters (N, L, C), float64, for distances `first` to `end - 1`.

        They take few operations but fast sines: in low precision those would be noise, and float64
        also keeps autocast away.
        """
        features_LP = position_features(first, end, self.spec.max_tokens, self.hyena_in.device)
        hidden = features_LP
        for weight, phase in zip([self.hyena_in, *self.hyena_mid], self.hyena_phase, strict=True):
            hidden = torch.sin(SINE_FREQUENCY * F.linear(hidden, weight.double()) + phase)
        decay_C = self.hyena_log_decay.double().exp()
        window_LC = torch.exp(-features_LP[:, :1].abs() * decay_C)
        return hidden @ self.hyena_filter.double().transpose(1, 2) * window_LC


@cached_constant
def position_features(first: int, end: int, max_tokens: int, device: torch.device) -> Tensor:
    """Return t / max_tokens and its waves of 1 to 8 periods, (L, P), float64."""
    time_L1 = torch.arange(first, end, dtype=torch.float64, device=device)[:, None] / max_tokens
    angle_LP = 2 * math.pi * time_L1 * torch.arange(1, NUM_WAVES + 1, device=device)
    return torch.cat([time_L1, angle_LP.cos(), angle_LP.sin()], dim=1)
