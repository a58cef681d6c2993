"""Matrix products of an NVIDIA GPU, in every precision that it multiplies.

Letters: M rows, K inner and N outer width of a product.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hw_profiles.backends.base import Call
from nas_kernels.dispatch import TRITON, use_triton
from nas_kernels.fp8_linear import fp8_linear, has_kernel, quantize_activations, quantize_weight
from nas_kernels.int4_linear import int4_linear, quantize_int4
from nas_kernels.int8_weight_linear import int8_weight_linear, quantize_rows

SIZE = 4096
"""Side of square products: large enough for full speed."""
FEW_ROWS = 32
"""Rows with weights that are unpacked on the way: such kernels are made for few."""
FLOATING = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Product = tuple[Call, float]


def cuda_products(device: torch.device, size: int = SIZE) -> dict[str, Product]:
    """Return a product and its FLOPs by precision; what the GPU has none for is left out.

    Factors are random: GPUs clock higher on ones and zeros.

    Args:
        device: the GPU.
        size: side of the square products.
    """
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, size, size, generator=generator).to(device)
    products = {name: _floating(left.to(t), right.to(t)) for name, t in FLOATING.items()}
    flops = 2.0 * size**3
    found: dict[str, Product] = {name: (call, flops) for name, call in products.items()}
    found["int8"] = (_int8(left, right), flops)
    if has_kernel(device, size, size):
        found["fp8"] = (_fp8(left.bfloat16(), right), flops)
    return found | _few_rows(left[:FEW_ROWS].bfloat16(), right)


def _floating(left: Tensor, right: Tensor) -> Call:
    out = torch.empty_like(left)
    return lambda: torch.mm(left, right.t(), out=out)


def _int8(left: Tensor, right: Tensor) -> Call:
    values, weights = ((32 * x).clamp(-127, 127).to(torch.int8) for x in (left, right))
    sums = torch.empty(left.shape, dtype=torch.int32, device=left.device)
    return lambda: torch._int_mm(values, weights.t(), out=sums)


def _fp8(left: Tensor, right: Tensor) -> Call:
    x, (values_NK, scale_N) = quantize_activations(left), quantize_weight(right)
    return lambda: fp8_linear(x, values_NK, scale_N)


def _few_rows(x_MK: Tensor, weight_NK: Tensor) -> dict[str, Product]:
    """Return the products of our own kernels that PyTorch has nothing for on a GPU."""
    int4, int8 = quantize_int4(weight_NK), quantize_rows(weight_NK)
    calls: dict[str, Callable[[], Tensor]] = {
        "int4": lambda: int4_linear(x_MK, int4, implementation=TRITON),
        "int8_weight": lambda: int8_weight_linear(x_MK, *int8, implementation=TRITON),
    }
    flops = 2.0 * len(x_MK) * weight_NK.numel()
    return {
        name: (call, flops)
        for name, call in calls.items()
        if use_triton(f"{name}_linear", x_MK, weight_NK)
    }
