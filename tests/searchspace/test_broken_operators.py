"""`check_operator` must fail on operators that are wrong in one way each."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from searchspace.ffn import FFNS
from searchspace.ffn.mlp import FFN
from searchspace.linear import Linear
from searchspace.mixers import MIXERS
from searchspace.mixers.base import ATTENTION_AXES, Mixer
from searchspace.mixers.linear_elu import LinearAttention
from searchspace.mixers.pool import AveragePool
from searchspace.norms import NORMS, RMSNorm
from searchspace.specs import FFNSpec, MixerSpec
from searchspace.testing import check_operator


class Acausal(LinearAttention):
    def forward(self, x_BTD: Tensor, state: Any = None) -> Tensor:
        return super().forward(x_BTD + 1e-3 * x_BTD.mean(dim=1, keepdim=True), state)


class LeaksTheNextToken(LinearAttention):
    def forward(self, x_BTD: Tensor, state: Any = None) -> Tensor:
        return super().forward(x_BTD + 1e-3 * F.pad(x_BTD[:, 1:], (0, 0, 0, 1)), state)


class MixesSequences(LinearAttention):
    def forward(self, x_BTD: Tensor, state: Any = None) -> Tensor:
        return super().forward(x_BTD, state) + 1e-3 * x_BTD.mean(dim=0)


class WrongAxes(LinearAttention):
    axes: ClassVar = {**ATTENTION_AXES, "k_proj.weight": ("num_heads*head_dim", "d_model")}


class UndeclaredParameter(LinearAttention):
    def __init__(self, spec: MixerSpec) -> None:
        super().__init__(spec)
        self.extra = nn.Parameter(torch.ones(3))


class DeadParameter(UndeclaredParameter):
    axes: ClassVar = {**ATTENTION_AXES, "extra": ("three",)}


class UnusedParameter(LinearAttention):
    axes: ClassVar = {**ATTENTION_AXES, "extra_bias": ("num_heads",)}

    def __init__(self, spec: MixerSpec) -> None:
        super().__init__(spec)
        self.extra_bias = nn.Parameter(torch.empty(spec.num_heads))

    def reset(self, generator: torch.Generator, depth: int) -> None:
        super().reset(generator, depth)
        with torch.no_grad():
            self.extra_bias.normal_(generator=generator)


class ScaledHeads(LinearAttention):
    """Base of what has a scale per channel of the heads, in some layout."""

    axes: ClassVar = {**ATTENTION_AXES, "extra_scale": ("num_heads*head_dim",)}

    def __init__(self, spec: MixerSpec) -> None:
        super().__init__(spec)
        self.extra_scale = nn.Parameter(torch.empty(spec.num_heads * spec.head_dim))

    def reset(self, generator: torch.Generator, depth: int) -> None:
        super().reset(generator, depth)
        with torch.no_grad():
            self.extra_scale.normal_(generator=generator)

    def scale_HK(self) -> Tensor:
        return self.extra_scale.unflatten(0, (-1, self.spec.head_dim))

    def merge_heads(self, x_BHTK: Tensor) -> Tensor:
        return super().merge_heads(x_BHTK * self.scale_HK()[:, None])


class ScrambledHeads(ScaledHeads):
    """Channels come before heads, so that the leading part is not that of the first heads."""

    def scale_HK(self) -> Tensor:
        return self.extra_scale.unflatten(0, (self.spec.head_dim, -1)).T


class ScrambledWidth(LinearAttention):
    axes: ClassVar = {**ATTENTION_AXES, "extra_mix": ("d_model",)}

    def __init__(self, spec: MixerSpec) -> None:
        super().__init__(spec)
        self.extra_mix = nn.Parameter(torch.empty(spec.d_model))

    def reset(self, generator: torch.Generator, depth: int) -> None:
        super().reset(generator, depth)
        with torch.no_grad():
            self.extra_mix.normal_(generator=generator)

    def forward(self, x_BTD: Tensor, state: Any = None) -> Tensor:
        return super().forward(x_BTD * self.extra_mix.flip(0), state)


class IgnoresStrides(LinearAttention):
    """What a kernel does that reads a weight as if its rows stood one behind the other."""

    axes: ClassVar = {**ATTENTION_AXES, "extra_map": ("num_heads*head_dim", "d_model")}

    def __init__(self, spec: MixerSpec) -> None:
        super().__init__(spec)
        self.extra_map = nn.Parameter(torch.empty(spec.num_heads * spec.head_dim, spec.d_model))

    def reset(self, generator: torch.Generator, depth: int) -> None:
        super().reset(generator, depth)
        with torch.no_grad():
            self.extra_map.normal_(generator=generator)

    def forward(self, x_BTD: Tensor, state: Any = None) -> Tensor:
        rows = self.extra_map.as_strided(self.extra_map.shape, (self.extra_map.shape[1], 1))
        return super().forward(x_BTD, state) + self.o_proj(x_BTD @ rows.T)


class KeepsOldWeights(ScaledHeads):
    """Computes something from its weights once and for all."""

    kept: Tensor | None = None

    def scale_HK(self) -> Tensor:
        if torch.is_grad_enabled() or self.extra_scale.is_meta:
            return super().scale_HK()
        if self.kept is None:
            self.kept = super().scale_HK().clone()
        return self.kept


class RoundsWhenPacked(LinearAttention):
    def forward(self, x_BTD: Tensor, state: Any = None) -> Tensor:
        out_BTD = super().forward(x_BTD, state)
        return 1.2 * out_BTD if self.q_proj.packed else out_BTD


class ClaimsOrder(LinearAttention):
    ordered: ClassVar = True


class HidesOrder(AveragePool):
    ordered: ClassVar = False


class NeedsItsHistory(LinearAttention):
    """Divides by what an unfilled state has not seen."""

    def forward(self, x_BTD: Tensor, state: Any = None) -> Tensor:
        seen = 1.0
        if state is not None and state.length:
            total = state.keys_BGK.sum()
            seen = total / total
        return super().forward(x_BTD, state) * seen


class CountsItself(LinearAttention):
    """Keeps a count of its own, which a rewound state does not match."""

    def forward(self, x_BTD: Tensor, state: Any = None) -> Tensor:
        if state is not None:
            own = getattr(state, "own", 0)
            if own != state.length:
                raise ValueError(f"the state has {own} tokens, not {state.length}")
            state.own = own + x_BTD.shape[1]
        return super().forward(x_BTD, state)


class LooksAtValues(LinearAttention):
    """Branches on data, which no graph can hold."""

    def forward(self, x_BTD: Tensor, state: Any = None) -> Tensor:
        if not x_BTD.is_meta and bool((x_BTD > 1e9).any()):
            raise ValueError("the input is too large")
        return super().forward(x_BTD, state)


class ForgottenReset(LinearAttention):
    axes: ClassVar = {**ATTENTION_AXES, "scale": ("one",)}

    def __init__(self, spec: MixerSpec) -> None:
        super().__init__(spec)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x_BTD: Tensor, state: Any = None) -> Tensor:
        return super().forward(x_BTD, state) * self.scale


class ForgottenState(LinearAttention):
    def forward(self, x_BTD: Tensor, state: Any = None) -> Tensor:
        if state is not None:
            state.length = x_BTD.shape[1]
        return super().forward(x_BTD, None)


class GrowingState(LinearAttention):
    def forward(self, x_BTD: Tensor, state: Any = None) -> Tensor:
        out = super().forward(x_BTD, state)
        if state is not None:
            state.tensors = lambda length=state.length: {"sum": torch.zeros(length)}
        return out


class StateOfMaxTokens(LinearAttention):
    def init_state(self, batch: int, max_tokens: int, device: Any = None) -> Any:
        state = super().init_state(batch, max_tokens, device)
        state.tensors = lambda: {"sum": torch.zeros(batch, max_tokens)}
        return state


class StateOfFixedBatch(LinearAttention):
    def init_state(self, batch: int, max_tokens: int, device: Any = None) -> Any:
        state = super().init_state(batch, max_tokens, device)
        state.tensors = lambda: {"sum": torch.zeros(8)}
        return state


class HiddenState(LinearAttention):
    def init_state(self, batch: int, max_tokens: int, device: Any = None) -> Any:
        state = super().init_state(batch, max_tokens, device)
        state.tensors = dict
        return state


class WrongSize(LinearAttention):
    axes: ClassVar = {**ATTENTION_AXES, "mix": ("num_heads*num_kv_heads",)}

    def __init__(self, spec: MixerSpec) -> None:
        super().__init__(spec)
        self.mix = nn.Parameter(torch.empty(spec.num_heads * spec.num_kv_heads + 1))

    def reset(self, generator: torch.Generator, depth: int) -> None:
        super().reset(generator, depth)
        with torch.no_grad():
            self.mix.normal_(generator=generator)

    def forward(self, x_BTD: Tensor, state: Any = None) -> Tensor:
        return super().forward(x_BTD, state) * self.mix.sum()


BROKEN_MIXERS: dict[type[Mixer], str] = {
    Acausal: "check_isolation fails .* before token 1: relative RMS",
    LeaksTheNextToken: "check_isolation fails .* before token 1: relative RMS",
    MixesSequences: "check_isolation fails .* the other sequence: relative RMS",
    WrongAxes: r"check_axes fails .* op.k_proj.weight: num_heads\*head_dim is 60, the axis has 30",
    UndeclaredParameter: "check_axes fails .* differ in op.extra",
    DeadParameter: "check_reset fails .* leaves extra",
    UnusedParameter: "check_gradients fails .* no gradient reaches op.extra_bias",
    ScrambledHeads: "check_nested fails .* axis 0 of extra_scale",
    ScrambledWidth: "check_nested fails .* axis 0 of extra_mix",
    IgnoresStrides: "check_views fails .* view and extracted copy differ",
    KeepsOldWeights: "check_views fails .* after a change of the weights",
    RoundsWhenPacked: "check_packed fails .*bf16: packed: relative RMS",
    ClaimsOrder: "check_order fails .*bidirectional: it says it knows the order",
    HidesOrder: "check_order fails .*bidirectional: tokens in another order",
    NeedsItsHistory: "check_rewind fails .* not finite",
    CountsItself: "check_rewind fails .* the state has 0 tokens, not 40",
    LooksAtValues: "check_export fails",
    ForgottenReset: "check_reset fails .* leaves scale",
    ForgottenState: "check_steps fails .* calls of",
    GrowingState: "check_state_size fails .* grew",
    StateOfMaxTokens: "check_state_size fails .* for more tokens",
    StateOfFixedBatch: "check_state_size fails .* takes 32 bytes, not 64",
    HiddenState: "check_state_size fails .* has no tensors",
    WrongSize: r"check_axes fails .* op.mix: num_heads\*num_kv_heads is 16, the axis has 17",
}


@pytest.mark.parametrize("broken", BROKEN_MIXERS)
def test_broken_mixers_are_found(broken: type[Mixer], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MIXERS, broken.__name__, broken)
    with pytest.raises(AssertionError, match=BROKEN_MIXERS[broken]):
        check_operator(broken.__name__)


class LooksAtNeighbours(FFN):
    def activation(self, hidden: Tensor) -> Tensor:
        return torch.relu(hidden + 1e-3 * hidden.roll(1, dims=1))


class UnusedGate(FFN):
    axes: ClassVar = {**FFN.axes, "gate_proj.weight": ("intermediate_size", "d_model")}

    def __init__(self, spec: FFNSpec) -> None:
        super().__init__(spec)
        self.gate_proj = Linear(spec.d_model, spec.intermediate_size, spec.precision)

    def activation(self, hidden: Tensor) -> Tensor:
        return torch.relu(hidden)


class OneScaleForAllTokens(FFN):
    """What per-tensor int8 activations do: a large token drowns all others."""

    def activation(self, hidden: Tensor) -> Tensor:
        scale = hidden.detach().abs().amax() / 127
        return torch.relu(hidden + ((hidden / scale).round() * scale - hidden).detach())


class OtherInBf16(FFN):
    def activation(self, hidden: Tensor) -> Tensor:
        return torch.relu(hidden) if hidden.dtype == torch.float32 else torch.tanh(hidden)


class ScrambledUnits(FFN):
    """Hidden units stand in pairs of halves, so that the leading part is not that of the first."""

    def activation(self, hidden: Tensor) -> Tensor:
        return torch.relu(hidden.flip(-1))


BROKEN_FFNS = {
    LooksAtNeighbours: "check_isolation fails",
    UnusedGate: "check_gradients fails .* no gradient reaches op.gate_proj.weight",
    OneScaleForAllTokens: "check_isolation fails",
    ScrambledUnits: "check_nested fails .* axis 0 of up_proj.weight",
    OtherInBf16: "check_bf16 fails",
}


@pytest.mark.parametrize("broken", BROKEN_FFNS)
def test_broken_ffns_are_found(broken: type[FFN], monkeypatch: pytest.MonkeyPatch) -> None:
    broken.activation.__doc__ = ""
    monkeypatch.setitem(FFNS, broken.__name__, broken)
    with pytest.raises(AssertionError, match=BROKEN_FFNS[broken]):
        check_operator(broken.__name__)


class NormOverTokens(RMSNorm):
    def forward(self, x_BTD: Tensor) -> Tensor:
        return super().forward(x_BTD + 1e-3 * x_BTD.flip(1))


def test_broken_norms_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NORMS, "over_tokens", NormOverTokens)
    with pytest.raises(AssertionError, match=r"check_isolation fails .*over_tokens"):
        check_operator("over_tokens")
