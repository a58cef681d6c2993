"""The quasi-recurrent network: convolutions over time make the gates, a pooling the memory.

Shapes: B batch, T tokens, D d_model, C = H * K channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nas_kernels.linear_scan import linear_scan
from nas_kernels.precision import at_least_fp32
from searchspace.linear import Linear, project
from searchspace.mixers.scan import ScanMixer, ScanState, reset_memory
from searchspace.specs import MixerSpec
from searchspace.token_shift import next_token, previous_token

NOW = ("qrnn_forget", "qrnn_output")
BEFORE = ("qrnn_value_before", "qrnn_forget_before", "qrnn_output_before")
"""Maps of the own token beside `v_proj`, and of the token before (`taps` = 2)."""


@dataclass(kw_only=True)
class QRNNState(ScanState):
    """The memory, and the token the convolution still needs.

    Args:
        token_BD: the last input; None where the convolution has one tap.
    """

    token_BD: Tensor | None = None


class QRNN(ScanMixer):
    """`c_t = f_t c_{t-1} + (1 - f_t) z_t`, `h_t = o_t c_t` (fo-pooling).

    `z = tanh(W_z * x)`, `f = sigmoid(W_f * x + b)`, `o = sigmoid(W_o * x)` with full convolutions
    over the last `taps` tokens. In the backward pass of the bidirectional form, they look at the
    token after.

    Source: Bradbury et al. 2016, "Quasi-Recurrent Neural Networks", equations 1, 3 and 4.
    """

    options: ClassVar[dict[str, Any]] = {"taps": 2}
    option_choices: ClassVar[dict[str, tuple[Any, ...]]] = {"taps": (1, 2)}

    def __init__(self, spec: MixerSpec) -> None:
        super().__init__(spec)
        self.looks_back = self.option("taps") == 2
        for name in (*NOW, *BEFORE) if self.looks_back else NOW:
            self.add_module(name, Linear(spec.d_model, self.width, spec.precision))
        self.qrnn_forget_bias = nn.Parameter(torch.empty(self.width))

    @classmethod
    def param_axes(cls, spec: MixerSpec) -> dict[str, tuple[str, ...]]:
        """Return the axes, those of the token before only where it is looked at."""
        maps = (*NOW, *BEFORE) if cls.option_of(spec, "taps") == 2 else NOW
        named = {f"{name}.weight": ("num_heads*head_dim", "d_model") for name in maps}
        return {**cls.axes, **named, "qrnn_forget_bias": ("num_heads*head_dim",)}

    def reset(self, generator: torch.Generator, depth: int) -> None:
        """Initialise every parameter."""
        super().reset(generator, depth)
        reset_memory(self.qrnn_forget_bias, generator)

    def _maps(self, *names: str) -> list[Linear]:
        return [self.get_submodule(name) for name in names]  # type: ignore[misc]

    def input_linears(self) -> list[Linear]:
        """Return every map of the input, unless the token before is an input too."""
        return [] if self.looks_back else self._maps("v_proj", *NOW)

    def init_state(
        self, batch: int, max_tokens: int, device: torch.device | None = None
    ) -> QRNNState:
        """Return the zero state; its size does not depend on `max_tokens`."""
        token = torch.zeros(batch, self.spec.d_model, device=device) if self.looks_back else None
        hidden = super().init_state(batch, max_tokens, device).hidden_BC
        return QRNNState(hidden_BC=hidden, token_BD=token)

    def forward(self, x_BTD: Tensor, state: QRNNState | None = None) -> Tensor:
        """Mix every token up to and including the own one; bidirectional: both directions."""
        now = project(x_BTD, *self._maps("v_proj", *NOW))
        if not self.causal:
            return self.o_proj(self._both_directions(x_BTD, now))
        if self.looks_back:
            earlier = previous_token(x_BTD, None if state is None else state.token_BD)
            before = project(earlier, *self._maps(*BEFORE))
            now = [a + b for a, b in zip(now, before, strict=True)]
            if state is not None:
                state.token_BD = at_least_fp32(x_BTD[:, -1]).clone()
        forget, added, output = self._gates(now)
        return self.o_proj(output * self.scan(forget, added, state))

    def _gates(self, sums: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return f, (1 - f) z and o."""
        value, forget, output = (at_least_fp32(x) for x in sums)
        forget = forget + self.qrnn_forget_bias
        return forget.sigmoid(), (-forget).sigmoid() * value.tanh(), output.sigmoid()

    def _both_directions(self, x_BTD: Tensor, now: list[Tensor]) -> Tensor:
        earlier, later = now, now
        if self.looks_back:
            beside = project(x_BTD, *self._maps(*BEFORE))
            earlier = [a + previous_token(b) for a, b in zip(now, beside, strict=True)]
            later = [a + next_token(b) for a, b in zip(now, beside, strict=True)]
        both = [torch.cat([a, b.flip(1)]) for a, b in zip(earlier, later, strict=True)]
        forget, added, output = self._gates(both)
        forward, backward = (output * linear_scan(forget, added)[0]).chunk(2)
        return (forward + backward.flip(1)) / 2
