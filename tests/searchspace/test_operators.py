from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from searchspace.errors import UserError
from searchspace.ffn import FFNS
from searchspace.ffn.mlp import FFN
from searchspace.linear import Linear, project
from searchspace.mixers import MIXERS
from searchspace.mixers.base import ATTENTION_AXES, ProjectedMixer
from searchspace.mixers.linear_elu import LinearAttention
from searchspace.norms import NORMS, RMSNorm
from searchspace.specs import FFNSpec, MixerSpec
from searchspace.testing import check_operator

TOKENS, D_MODEL, HEAD_DIM = 23, 24, 8


@pytest.mark.parametrize("name", [*MIXERS, *FFNS, *NORMS])
def test_every_operator_conforms(name: str) -> None:
    done = {result.check for result in check_operator(name)}
    assert len(done) == (10 if name in MIXERS or name in NORMS else 8)


def test_unknown_operator() -> None:
    with pytest.raises(UserError, match="did you mean 'softmax'"):
        check_operator("sotfmax")


class Acausal(LinearAttention):
    def forward(self, x_BTD: Tensor, state: Any = None) -> Tensor:
        return super().forward(x_BTD + 1e-3 * x_BTD.mean(dim=1, keepdim=True), state)


class WrongAxes(LinearAttention):
    axes: ClassVar = {**ATTENTION_AXES, "k_proj.weight": ("num_heads*head_dim", "d_model")}


class UndeclaredParameter(LinearAttention):
    def __init__(self, spec: MixerSpec) -> None:
        super().__init__(spec)
        self.extra = nn.Parameter(torch.ones(3))


class DeadParameter(UndeclaredParameter):
    axes: ClassVar = {**ATTENTION_AXES, "extra": ("three",)}


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


BROKEN_MIXERS = {
    Acausal: "check_causal fails .* before token 1: relative RMS",
    WrongAxes: r"check_axes fails .* op.k_proj.weight: num_heads\*head_dim is 60, the axis has 30",
    UndeclaredParameter: "check_axes fails .* differ in op.extra",
    DeadParameter: "check_reset fails .* leaves extra",
    ForgottenReset: "check_reset fails .* leaves scale",
    ForgottenState: "check_steps fails .* calls of",
    GrowingState: "check_state_size fails .* grew",
    StateOfMaxTokens: "check_state_size fails .* for more tokens",
    WrongSize: r"check_axes fails .* op.mix: num_heads\*num_kv_heads is 16, the axis has 17",
}


@pytest.mark.parametrize("broken", BROKEN_MIXERS)
def test_broken_mixers_are_found(
    broken: type[LinearAttention], monkeypatch: pytest.MonkeyPatch
) -> None:
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


BROKEN_FFNS = {
    LooksAtNeighbours: "check_causal fails",
    UnusedGate: "check_gradients fails .* no gradient reaches op.gate_proj.weight",
    OneScaleForAllTokens: "check_causal fails",
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
    with pytest.raises(AssertionError, match=r"check_causal fails .*over_tokens"):
        check_operator("over_tokens")


def build(
    name: str, heads: tuple[int, int] = (4, 2), position: str = "nope", **options: int
) -> ProjectedMixer:
    spec = MixerSpec(D_MODEL, name, *heads, HEAD_DIM, position, options=tuple(options.items()))
    mixer = MIXERS[name](spec)
    mixer.reset(torch.Generator().manual_seed(0), depth=1)
    assert isinstance(mixer, ProjectedMixer)
    return mixer.double()


def make_x() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, TOKENS, D_MODEL, generator=generator, dtype=torch.float64)


def by_loops(
    mixer: ProjectedMixer, x: Tensor, attend: Callable[[Tensor, Tensor, Tensor, int, int], Tensor]
) -> Tensor:
    """Project every token, attend with `attend(q, k, v, t, kv_head)` per head and token."""
    spec, out = mixer.spec, torch.zeros(2, TOKENS, D_MODEL, dtype=torch.float64)
    for b in range(2):
        q, k, v = (x[b] @ w.weight.T for w in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
        context = torch.zeros(TOKENS, spec.num_heads * HEAD_DIM, dtype=torch.float64)
        for head in range(spec.num_heads):
            group = head // (spec.num_heads // spec.num_kv_heads)
            own, shared = (slice(h * HEAD_DIM, (h + 1) * HEAD_DIM) for h in (head, group))
            for t in range(TOKENS):
                context[t, own] = attend(q[t, own], k[:, shared], v[:, shared], t, group)
        out[b] = context @ mixer.o_proj.weight.T
    return out


def softmax_reference(window: int, rope: bool) -> Callable[..., Tensor]:
    def rotated(x: Tensor, position: int) -> Tensor:
        out = x.clone()
        half = HEAD_DIM // 2
        for i in range(half):
            # The shipped table is float32, as it is in training.
            angle = torch.tensor(position * 10_000.0 ** (-2 * i / HEAD_DIM)).item()
            out[i] = x[i] * math.cos(angle) - x[half + i] * math.sin(angle)
            out[half + i] = x[half + i] * math.cos(angle) + x[i] * math.sin(angle)
        return out

    def attend(q: Tensor, k: Tensor, v: Tensor, t: int, group: int) -> Tensor:
        seen = range(max(0, t - window + 1), t + 1)
        if rope:
            q, keys = rotated(q, t), [rotated(k[s], s) for s in seen]
        else:
            keys = [k[s] for s in seen]
        weights = [math.exp(float(q @ key) / math.sqrt(HEAD_DIM)) for key in keys]
        return sum(w * v[s] for w, s in zip(weights, seen, strict=True)) / sum(weights)

    return attend


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("position", ["rope", "nope"])
def test_softmax_against_loops(heads: tuple[int, int], position: str) -> None:
    mixer, x = build("softmax", heads, position), make_x()
    with torch.no_grad():
        expected = by_loops(mixer, x, softmax_reference(TOKENS, position == "rope"))
        torch.testing.assert_close(mixer(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [1, 4, 8, 16, 23, 64])
@pytest.mark.parametrize("position", ["rope", "nope"])
def test_sliding_window_against_loops(window: int, position: str) -> None:
    # Windows of TOKENS / window > 2, between 1 and 2, and at most 1 take different ways.
    mixer, x = build("sliding_window", (4, 2), position, window=window), make_x()
    with torch.no_grad():
        expected = by_loops(mixer, x, softmax_reference(window, position == "rope"))
        torch.testing.assert_close(mixer(x), expected, rtol=1e-5, atol=1e-5)


def test_linear_elu_against_sums() -> None:
    def phi(z: Tensor) -> Tensor:
        return torch.where(z > 0, z + 1, z.exp())

    def attend(q: Tensor, k: Tensor, v: Tensor, t: int, group: int) -> Tensor:
        weights = [phi(q) @ phi(k[s]) for s in range(t + 1)]
        return sum(w * v[s] for s, w in enumerate(weights)) / sum(weights)

    mixer, x = build("linear_elu"), make_x()
    with torch.no_grad():
        torch.testing.assert_close(mixer(x), by_loops(mixer, x, attend))


def test_gla_against_its_recurrence() -> None:
    mixer, x = build("gla"), make_x()
    spec, out = mixer.spec, torch.zeros_like(make_x())
    with torch.no_grad():
        mixer.head_norm.add_(torch.linspace(-0.5, 0.5, HEAD_DIM, dtype=torch.float64))
        for b in range(2):
            state = torch.zeros(spec.num_kv_heads, HEAD_DIM, HEAD_DIM, dtype=torch.float64)
            for t in range(TOKENS):
                q, k, v = (
                    (w.weight @ x[b, t]).reshape(-1, HEAD_DIM)
                    for w in (mixer.q_proj, mixer.k_proj, mixer.v_proj)
                )
                gate_in = mixer.decay_up.weight @ (mixer.decay_down.weight @ x[b, t])
                decay = torch.sigmoid(gate_in + mixer.decay_bias) ** (1 / 16)
                state = decay.reshape(-1, HEAD_DIM, 1) * state + k[:, :, None] * v[:, None, :]
                heads = []
                for head in range(spec.num_heads):
                    read = q[head] / math.sqrt(HEAD_DIM) @ state[head // 2]
                    heads.append(mixer.head_norm * read / (read.square().mean() + 1e-5).sqrt())
                gate = mixer.out_gate.weight @ x[b, t]
                out[b, t] = mixer.o_proj.weight @ (torch.cat(heads) * gate * torch.sigmoid(gate))
        torch.testing.assert_close(mixer(x), out)


def test_ffns_against_their_formulas() -> None:
    x = make_x()

    def gelu_tanh(h: Tensor) -> Tensor:
        return h / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))

    for name, ffn_class in FFNS.items():
        ffn = ffn_class(FFNSpec(D_MODEL, name, 10)).double()
        ffn.reset(torch.Generator().manual_seed(0), depth=3)
        up = x @ ffn.up_proj.weight.T
        if name == "swiglu":
            gate = x @ ffn.gate_proj.weight.T
            hidden = gate / (1 + torch.exp(-gate)) * up
        else:
            hidden = gelu_tanh(up) if name == "gelu" else up.clamp_min(0) ** 2
        torch.testing.assert_close(ffn(x), hidden @ ffn.down_proj.weight.T)


def test_norms_against_their_formulas() -> None:
    x = 3 * make_x() + 1
    for name, norm_class in NORMS.items():
        norm = norm_class(D_MODEL).double()
        with torch.no_grad():
            norm.weight.copy_(torch.arange(D_MODEL))
        centred = x - x.mean(dim=-1, keepdim=True) if name == "layernorm" else x
        expected = centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
        torch.testing.assert_close(norm(x), expected * torch.arange(D_MODEL))


def test_a_cache_that_is_full_says_so() -> None:
    mixer = build("softmax").float()
    state = mixer.init_state(1, 4)
    with pytest.raises(ValueError, match="state holds 4 tokens, 5 were given"):
        mixer(torch.zeros(1, 5, D_MODEL), state)


def test_project_equals_the_single_maps() -> None:
    x = make_x().float()
    for precision in ("fp32", "int8"):
        maps = [Linear(D_MODEL, width, precision) for width in (3, 8)]
        for linear in maps:
            linear.reset(torch.Generator().manual_seed(0))
        for packed in (False, True):
            if packed:
                for linear in maps:
                    linear.pack()
            for shared, linear in zip(project(x, *maps), maps, strict=True):
                torch.testing.assert_close(shared, linear(x))
