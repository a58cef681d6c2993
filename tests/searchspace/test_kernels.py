"""Operators compute the same with kernels, in Triton's interpreter, as without."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nas_kernels import dispatch
from nas_kernels.dispatch import reference_only
from searchspace.ffn import FFNS
from searchspace.mixers import MIXERS
from searchspace.norms import NORMS
from searchspace.packing import pack
from searchspace.testing import operator_specs
from searchspace.testing.operator_checks import (
    D_MODEL,
    Spec,
    bound_of,
    is_stateful,
    make_block,
    require_close,
)

pytestmark = pytest.mark.skipif(
    not dispatch.triton_available() or torch.cuda.is_available(),
    reason="needs triton, and its interpreter",
)
OPERATORS = [*MIXERS, *FFNS, *NORMS]
TOKENS, STEPS = 19, 2
EXPECTED = {
    "block_attention",
    "causal_conv",
    "decode_attention",
    "delta_rule",
    "elastic_linear",
    "int4_linear",
    "int8_linear",
    "int8_weight_linear",
    "linear_attention",
    "linear_scan",
    "norms",
    "quantize_activations",
    "quantize_fp8",
    "selective_scan",
    "ternary_linear",
}
"""Operations that operators have kernels of."""
GRADIENT_RMS, NOISE = 1e-4, 1e-2


@pytest.fixture(autouse=True)
def wished(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NAS_KERNELS", "triton")
    monkeypatch.setattr(dispatch, "_logged", set())


def with_kernels() -> set[str]:
    """Return the operations that ran as kernels."""
    return {operation for operation, what, _ in dispatch._logged if what != "PyTorch"}


def trained(spec: Spec) -> list[Tensor]:
    """Return the result and the gradients of the input and of all parameters."""
    block, generator = make_block(spec), torch.Generator().manual_seed(3)
    x = torch.randn(1, TOKENS, D_MODEL, generator=generator).requires_grad_()
    out = block(x)
    weights = torch.randn(out.shape, generator=generator)
    wanted = [x, *block.parameters()]
    return [out, *torch.autograd.grad((out * weights).sum(), wanted, materialize_grads=True)]


def run(spec: Spec) -> list[Tensor]:
    """Return results of what is stored: of one pass, and of a prefill and steps."""
    block, generator = make_block(spec), torch.Generator().manual_seed(4)
    pack(block)
    x = torch.randn(1, TOKENS, D_MODEL, generator=generator)
    with torch.inference_mode():
        outs = [block(x)]
        if is_stateful(spec):
            state = block.init_state(1, TOKENS)
            cut = TOKENS - STEPS
            parts = [x[:, :cut], *x[:, cut:].split(1, dim=1)]
            outs += [block(part, state) for part in parts]
    return outs


def rms(x: Tensor) -> float:
    return x.detach().double().square().mean().sqrt().item()


def forms(name: str) -> list[Spec]:
    """Return the sub-blocks of an operator; precisions matter to the linear maps that all share."""
    every = name in ("softmax", "swiglu")
    return [spec for spec in operator_specs(name) if every or spec.precision == "fp32"]


def compare(spec: Spec) -> None:
    with reference_only():
        expected = trained(spec), run(spec)
    actual = trained(spec), run(spec)
    rounded = bound_of(spec)
    require_close(actual[0][0], expected[0][0], rounded, "the result")
    # Where a gradient should be zero, such as that of a bias of all keys, there is only noise.
    noise = NOISE * max(rms(right) for right in expected[0][1:])
    for found, right in zip(actual[0][1:], expected[0][1:], strict=True):
        assert rms(found - right) <= max(rounded, GRADIENT_RMS) * (rms(right) + noise), "a gradient"
    for found, right in zip(actual[1], expected[1], strict=True):
        require_close(found, right, rounded, "a result of what is stored")


def is_quick(name: str) -> bool:
    return name in ("softmax", "gla", "sliding_window", "mamba", "swiglu", "relu2", "layernorm")


@pytest.mark.parametrize("name", [name for name in OPERATORS if is_quick(name)])
def test_a_form_of_some_operators(name: str) -> None:
    compare(forms(name)[0])
    assert with_kernels() & EXPECTED


@pytest.mark.slow
def test_every_form_of_every_operator() -> None:
    for name in OPERATORS:
        for spec in forms(name):
            try:
                compare(spec)
            except AssertionError as error:
                raise AssertionError(f"{spec.key}: {error}") from error
    assert with_kernels() == EXPECTED
