"""Recurrent mixers without attention against loops over tokens, from the papers' formulas."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from searchspace.errors import UserError
from searchspace.mixers import MIXERS
from searchspace.mixers.base import Mixer
from searchspace.specs import MixerSpec

D_MODEL, HEAD_DIM, TOKENS = 12, 6, 37
Loop = Callable[..., Tensor]


def make_mixer(name: str, causal: bool = True, **options: int) -> Mixer:
    cls = MIXERS[name]
    given = tuple(sorted({**cls.options, **options}.items()))
    spec = MixerSpec(D_MODEL, name, 4, 4, HEAD_DIM, options=given, causal=causal)
    mixer = cls(spec).double()
    generator = torch.Generator().manual_seed(1)
    mixer.reset(generator, 2)
    with torch.no_grad():
        for parameter in mixer.parameters():
            if parameter.ndim == 1:
                noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                parameter += 0.3 * noise
    return mixer


def make_input(tokens: int = TOKENS) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, tokens, D_MODEL, generator=generator, dtype=torch.float64)


def require_equal(actual: Tensor, expected: Tensor) -> None:
    error = ((actual - expected).square().mean() / expected.square().mean()).sqrt().item()
    assert error < 1e-10


def per_direction(loop: Loop, causal: bool, *sequences: Tensor) -> Tensor:
    """Run a loop over axis 1; bidirectional: the mean with the run over reversed sequences."""
    if causal:
        return loop(*sequences)
    return (loop(*sequences) + loop(*(x.flip(1) for x in sequences)).flip(1)) / 2


def shifted(x_BTC: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(x_BTC[:, :1]), x_BTC[:, :-1]], dim=1)


def mamba(mixer: Mixer, x: Tensor) -> Tensor:
    def loop(inner: Tensor) -> Tensor:
        a_CS, state, out = -mixer.mamba_log_a.exp(), 0.0, []
        for t in range(inner.shape[1]):
            conv = mixer.mamba_conv_bias.expand_as(inner[:, 0])
            for back in range(min(t + 1, 4)):
                conv = conv + mixer.mamba_conv[:, back] * inner[:, t - back]
            u = F.silu(conv)
            low = u @ mixer.mamba_step_down.weight.T @ mixer.mamba_step_up.weight.T
            step = (1 + (low + mixer.mamba_step_bias).exp()).log()
            write, read = u @ mixer.mamba_write.weight.T, u @ mixer.mamba_read.weight.T
            state = (step[..., None] * a_CS).exp() * state + (step * u)[..., None] * write[:, None]
            out.append((state * read[:, None]).sum(dim=-1) + mixer.mamba_skip * u)
        return torch.stack(out, dim=1)

    out = per_direction(loop, mixer.causal, mixer.v_proj(x))
    return mixer.o_proj(out * F.silu(mixer.mamba_gate(x)))


def rwkv_timemix(mixer: Mixer, x: Tensor) -> Tensor:
    beside = shifted(x)
    if not mixer.causal:
        beside[:, :, 1::2] = shifted(x.flip(1)).flip(1)[:, :, 1::2]

    def mixed(mix_D: Tensor) -> Tensor:
        return mix_D * x + (1 - mix_D) * beside

    k, v = mixer.k_proj(mixed(mixer.rwkv_mix_k)), mixer.v_proj(mixed(mixer.rwkv_mix_v))
    gate = mixer.rwkv_receptance(mixed(mixer.rwkv_mix_r)).sigmoid()
    decay, out = mixer.rwkv_log_decay.exp(), torch.zeros_like(v)
    for t in range(x.shape[1]):
        others = [i for i in range(x.shape[1]) if i < t or (i > t and not mixer.causal)]
        weights = [(-(abs(t - i) - 1) * decay + k[:, i]).exp() for i in others]
        own = (mixer.rwkv_bonus + k[:, t]).exp()
        num = own * v[:, t] + sum(w * v[:, i] for w, i in zip(weights, others, strict=True))
        out[:, t] = num / (own + sum(weights))
    return mixer.o_proj(gate * out)


def gated(mixer: Mixer, keep: Tensor, added: Tensor) -> Tensor:
    def loop(keep: Tensor, added: Tensor) -> Tensor:
        state, out = 0.0, []
        for t in range(keep.shape[1]):
            state = keep[:, t] * state + added[:, t]
            out.append(state)
        return torch.stack(out, dim=1)

    return per_direction(loop, mixer.causal, keep, added)


def candidate(mixer: Mixer, x: Tensor) -> Tensor:
    hidden = mixer.v_proj(x)
    return torch.where(hidden >= 0, hidden + 0.5, hidden.sigmoid())


def mingru(mixer: Mixer, x: Tensor) -> Tensor:
    z = (mixer.mingru_gate(x) + mixer.mingru_bias).sigmoid()
    return mixer.o_proj(gated(mixer, 1 - z, z * candidate(mixer, x)))


def minlstm(mixer: Mixer, x: Tensor) -> Tensor:
    f = (mixer.minlstm_forget(x) + mixer.minlstm_forget_bias).sigmoid()
    i = (mixer.minlstm_input(x) + mixer.minlstm_input_bias).sigmoid()
    return mixer.o_proj(gated(mixer, f / (f + i), i / (f + i) * candidate(mixer, x)))


def qrnn(mixer: Mixer, x: Tensor) -> Tensor:
    def loop(x: Tensor) -> Tensor:
        before = shifted(x)
        z, f, o = mixer.v_proj(x), mixer.qrnn_forget(x), mixer.qrnn_output(x)
        if mixer.option("taps") == 2:
            z = z + mixer.qrnn_value_before(before)
            f = f + mixer.qrnn_forget_before(before)
            o = o + mixer.qrnn_output_before(before)
        f, state, out = (f + mixer.qrnn_forget_bias).sigmoid(), 0.0, []
        for t in range(x.shape[1]):
            state = f[:, t] * state + (1 - f[:, t]) * z[:, t].tanh()
            out.append(o[:, t].sigmoid() * state)
        return torch.stack(out, dim=1)

    return mixer.o_proj(per_direction(loop, mixer.causal, x))


FORMULAS: dict[str, Callable[[Mixer, Tensor], Tensor]] = {
    "mamba": mamba,
    "rwkv_timemix": rwkv_timemix,
    "mingru": mingru,
    "minlstm": minlstm,
    "qrnn": qrnn,
}


@torch.no_grad()
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("tokens", [1, 2, TOKENS])
@pytest.mark.parametrize("name", FORMULAS)
def test_mixer_is_the_published_loop(name: str, tokens: int, causal: bool) -> None:
    mixer, x_BTD = make_mixer(name, causal=causal), make_input(tokens)
    require_equal(mixer(x_BTD), FORMULAS[name](mixer, x_BTD))


@torch.no_grad()
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("name", "options"),
    [("mamba", {"d_state": 3}), ("qrnn", {"taps": 1})],
)
def test_options(name: str, options: dict[str, int], causal: bool) -> None:
    mixer = make_mixer(name, causal=causal, **options)
    require_equal(mixer(make_input()), FORMULAS[name](mixer, make_input()))


@torch.no_grad()
@pytest.mark.parametrize("name", FORMULAS)
def test_any_split_hands_on_the_state(name: str) -> None:
    mixer, x_BTD = make_mixer(name), make_input()
    expected = mixer(x_BTD)
    for split in ([1] * TOKENS, [TOKENS - 1, 1], [5, 1, 20, 11]):
        state = mixer.init_state(2, TOKENS)
        parts = [mixer(part, state) for part in x_BTD.split(split, dim=1)]
        require_equal(torch.cat(parts, dim=1), expected)
        assert state.length == TOKENS


@pytest.mark.parametrize("name", FORMULAS)
def test_state_keeps_its_bytes_under_autocast(name: str) -> None:
    mixer = make_mixer(name).float()
    state = mixer.init_state(2, TOKENS)
    made = {key: (x.shape, x.dtype) for key, x in state.tensors().items()}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        mixer(make_input().bfloat16(), state)
        mixer(make_input(1).bfloat16(), state)
    after = {key: (x.shape, x.dtype) for key, x in state.tensors().items() if key != "conv_BTC"}
    assert after == {key: value for key, value in made.items() if key != "conv_BTC"}


@torch.no_grad()
def test_memories_start_at_many_lengths() -> None:
    for name in ("mingru", "minlstm", "qrnn"):
        mixer = MIXERS[name](MixerSpec(D_MODEL, name, 16, 16, 16, options=(("taps", 1),)))
        mixer.reset(torch.Generator().manual_seed(0), 1)
        impulse = torch.zeros(1, 400, D_MODEL)
        impulse[:, 0] = 1.0
        response = mixer(impulse) - mixer(torch.zeros_like(impulse))
        far, near = response[0, 300].norm().item(), response[0, 1].norm().item()
        assert 1e-3 < far / near < 1.0


@pytest.mark.parametrize(
    ("name", "option", "value"), [("qrnn", "taps", 3), ("mamba", "d_state", 0)]
)
def test_options_that_are_refused(name: str, option: str, value: int) -> None:
    with pytest.raises(UserError, match=option):
        MIXERS[name].check_options(name, {option: value})
