from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from searchspace.errors import UserError
from searchspace.ffn import FFNS
from searchspace.linear import Linear, project
from searchspace.mixers import MIXERS
from searchspace.mixers.base import ProjectedMixer
from searchspace.norms import NORMS
from searchspace.specs import FFNSpec, MixerSpec
from searchspace.testing import check_operator

TOKENS, D_MODEL, HEAD_DIM = 23, 24, 8


EVERY_CHECK = {
    f"check_{name}"
    for name in (
        "axes", "reset", "shapes", "isolation", "gradients", "bf16", "packed", "views", "nested",
        "meta", "export",
    )
}  # fmt: skip
STATE_CHECKS = {"check_steps", "check_state_size", "check_rewind"}


@pytest.mark.parametrize("name", [*MIXERS, *FFNS, *NORMS])
def test_every_operator_conforms(name: str) -> None:
    done = {result.check for result in check_operator(name)}
    expected = set(EVERY_CHECK)
    if name in MIXERS:
        directions = MIXERS[name].directions
        expected |= STATE_CHECKS if "causal" in directions else set()
        expected |= {"check_order"} if "bidirectional" in directions else set()
    elif name in NORMS or FFNS[name].stateful:
        expected |= STATE_CHECKS  # a norm is also checked in front of mixers
    assert done == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", [*MIXERS, *FFNS])
def test_every_operator_exports_to_onnx(name: str) -> None:
    for module in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(module)
    assert "check_onnx" in {result.check for result in check_operator(name, onnx=True)}


def test_unknown_operator() -> None:
    with pytest.raises(UserError, match="did you mean 'softmax'"):
        check_operator("sotfmax")


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


def gelu_tanh(h: Tensor) -> Tensor:
    return h / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))


def gelu_erf(h: Tensor) -> Tensor:
    return h / 2 * (1 + torch.erf(h / math.sqrt(2)))


def silu(h: Tensor) -> Tensor:
    return h / (1 + torch.exp(-h))


def positive(h: Tensor) -> Tensor:
    return torch.where(h > 0, h, 0.0)


def polyrelu(h: Tensor, a: Tensor) -> Tensor:
    return a[0] + sum(a[i] * positive(h) ** i for i in (1, 2, 3))


def polynorm(h: Tensor, a: Tensor) -> Tensor:
    normed = [h**i / ((h**i).square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() for i in (1, 2, 3)]
    return a[0] + sum(a[i + 1] * normed[i] for i in range(3))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": positive,
    "relu2": lambda h: positive(h) ** 2,
    "gelu": gelu_tanh,
    "gelu_stack": gelu_erf,
    "silu": silu,
    "swiglu": silu,
    "geglu": gelu_tanh,
    "reglu": positive,
}
POLYNOMIALS = {"polyrelu": polyrelu, "polynorm": polynorm}


@pytest.mark.parametrize("name", [name for name in FFNS if not FFNS[name].stateful])
def test_ffns_against_their_formulas(name: str) -> None:
    x = make_x()
    ffn = FFNS[name](FFNSpec(D_MODEL, name, 10)).double()
    ffn.reset(torch.Generator().manual_seed(0), depth=3)
    hidden = x @ ffn.up_proj.weight.T
    if name in POLYNOMIALS:
        coefficients = ffn.get_parameter(f"{name}_coefficients")
        with torch.no_grad():
            coefficients.copy_(torch.tensor([0.3, -1.2, 0.7, 0.4]))
        hidden = POLYNOMIALS[name](hidden, coefficients)
    elif name.endswith("glu"):
        gate = x @ ffn.get_parameter("gate_proj.weight").T
        hidden = ACTIVATIONS[name](gate) * hidden
    else:
        hidden = ACTIVATIONS[name](hidden)
    torch.testing.assert_close(ffn(x), hidden @ ffn.down_proj.weight.T)


def test_stateful_ffns_are_those_with_tests_of_their_own() -> None:
    assert [name for name in FFNS if FFNS[name].stateful] == ["rwkv_channelmix"]


@pytest.mark.parametrize("name", ["layernorm", "rmsnorm"])
def test_norms_against_their_formulas(name: str) -> None:
    x = 3 * make_x() + 1
    norm = NORMS[name](D_MODEL).double()
    with torch.no_grad():
        norm.get_parameter("weight").copy_(torch.arange(D_MODEL))
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
