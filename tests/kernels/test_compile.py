"""Every kernel compiles for GPUs that are not here, and fits on them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import nas_kernels
from tests.kernels.aot import Kernel, compiled, obstacle

REASON = obstacle()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

SHARED_BYTES = {90: 227 * 1024, 80: 163 * 1024}
"""Shared memory that a block may have."""
SPILLED_BYTES = {
    "block_attention.key_grad_kernel": 88,
    "decode_attention._part_kernel": 16,
    "delta_rule.input_gradients": 80,
    "delta_rule.pass_gradients": 320,
    "elastic_linear.forward_kernel": 24,
    "elastic_linear.grouped_forward_kernel": 88,
    "elastic_linear.grouped_input_gradient_kernel": 232,
    "elastic_linear.weight_gradient_kernel": 344,
    "linear_attention.key_gradients": 784,
    "linear_attention.pass_states": 688,
    "linear_attention.read_outputs": 24,
    "linear_attention.value_gradients": 200,
    "norms._backward_kernel": 80,
    "selective_scan.input_gradients": 16,
    "selective_scan.read_outputs": 8,
}
"""Of a thread, in the worst variant: measured with Triton 3.6.0 and 3.9.0 for 9.0, the larger."""
CANDIDATES_SPILL = 1024
"""Bytes that a candidate may spill: it is measured before it is taken, but has to be worth that."""
OTHER_COMPILERS = 64
"""Bytes that another version of Triton may spill besides."""
FAMILIES = (
    "norms,cross_entropy,causal_conv",
    "elastic_linear",
    "linear_attention",
    "delta_rule,scans",
    "low_bit",
    "attention",
)


def check_fits(kernels: list[Kernel], capability: int) -> None:
    assert kernels
    for kernel in kernels:
        assert kernel.shared_bytes <= SHARED_BYTES[capability], kernel
        if capability == 90:
            bound = SPILLED_BYTES.get(kernel.name, 0) + OTHER_COMPILERS
            assert kernel.spilled_bytes <= bound, kernel


def test_some_variants_compile() -> None:
    check_fits(compiled("all", 90, "fast"), 90)


@pytest.mark.slow
@pytest.mark.parametrize("families", FAMILIES)
def test_all_variants_compile(families: str) -> None:
    check_fits(compiled(families, 90, "slow"), 90)


@pytest.mark.slow
@pytest.mark.parametrize("families", [*FAMILIES[:3], "delta_rule", "scans", *FAMILIES[4:]])
def test_all_candidates_fit(families: str) -> None:
    kernels = compiled(families, 90, "candidates")
    assert len(kernels) > 20
    for kernel in kernels:
        assert kernel.shared_bytes <= SHARED_BYTES[90], kernel
        assert kernel.spilled_bytes <= CANDIDATES_SPILL, kernel


@pytest.mark.slow
def test_large_tiles_fit_older_gpus() -> None:
    check_fits(compiled("all", 80, "older"), 80)


@pytest.mark.slow
def test_no_kernel_is_left_out() -> None:
    launched = set()
    for path in Path(nas_kernels.__path__[0]).rglob("triton_kernel*.py"):
        defined = set(re.findall(r"@triton\.jit\ndef (\w+)\(", path.read_text()))
        beside = "".join(file.read_text() for file in path.parent.glob("*.py"))
        named = set(re.findall(r"(\w+)\[[^=\n]*\]\(", beside)) & defined
        named |= set(re.findall(r"launch_step\((\w+),", beside))
        launched |= {f"{path.parent.name}.{name}" for name in named}
    found = {kernel.name for kernel in compiled("all", 90, "fast")}
    for families in FAMILIES:
        found |= {kernel.name for kernel in compiled(families, 90, "slow")}
    assert len(launched) > 30
    assert launched == found
