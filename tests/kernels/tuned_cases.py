"""Calls of every operation whose launchers ask what to run with, small enough to be interpreted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nas_kernels.block_attention import Pattern, block_attention
from nas_kernels.causal_conv import causal_conv
from nas_kernels.cross_entropy import linear_cross_entropy
from nas_kernels.decode_attention import decode_attention
from nas_kernels.delta_rule import delta_rule, recurrent_delta_rule
from nas_kernels.dispatch import REFERENCE, TRITON
from nas_kernels.elastic_linear import elastic_linear, grouped_elastic_linear
from nas_kernels.int4_linear import dequantize_int4, int4_linear, quantize_int4
from nas_kernels.int8_linear import int8_linear, quantize_activations, quantize_weight
from nas_kernels.int8_weight_linear import dequantize_rows, int8_weight_linear, quantize_rows
from nas_kernels.linear_attention import linear_attention, recurrent_linear_attention
from nas_kernels.linear_scan import linear_scan
from nas_kernels.norms import add_layer_norm, rms_norm
from nas_kernels.selective_scan import selective_scan
from nas_kernels.ternary_linear import pack_ternary, quantize_ternary, ternary_linear
from tests.kernels.comparison import DEVICE, draw

BF16, FP32 = torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Case:
    """An operation whose launchers ask.

    Attributes:
        name: of the case.
        asked: the names under which they do, in the order of the first time.
        run: the operation with kernels.
        exact: the same in PyTorch.
        inputs: of both.
        dtype: of results.
    """

    name: str
    asked: tuple[str, ...]
    run: Callable[..., Any]
    exact: Callable[..., Any]
    inputs: tuple[Any, ...]
    dtype: torch.dtype = FP32


def both(
    name: str, asked: str, operation: Callable[..., Any], *inputs: Any, **options: Any
) -> Case:
    """Return a case of an operation with a gradient, which runs in PyTorch too."""
    run = partial(operation, **options, implementation=TRITON)
    exact = partial(operation, **options, implementation=REFERENCE)
    dtype = next(x.dtype for x in inputs if isinstance(x, Tensor))
    return Case(name, (asked, f"{asked} backward"), run, exact, inputs, dtype)


def elastic(name: str, rows: int, dtype: torch.dtype, gated: bool) -> Case:
    weights = [draw(40, 150, seed=seed, dtype=dtype) * 0.1 for seed in (1, 2)[: 1 + gated]]
    x, activation = draw(rows, 140, dtype=dtype), "swiglu" if gated else "silu"

    def run(implementation: str, x: Tensor, weight: Tensor, gate: Tensor | None = None) -> Tensor:
        return elastic_linear(x, weight, None, 33, activation, gate, None, implementation)

    asked = ("elastic_linear", "elastic_linear weight gradient", "elastic_linear input gradient")
    inputs = (x, *weights)
    return Case(name, asked, partial(run, TRITON), partial(run, REFERENCE), inputs, dtype)


def grouped() -> Case:
    def run(implementation: str, x: Tensor, narrow: Tensor, weight: Tensor) -> list[Tensor]:
        return grouped_elastic_linear(
            [x, narrow], weight, None, out_features=[20, 9], activation="none",
            gate_weight_NK=None, gate_bias_N=None, implementation=implementation,
        )  # fmt: skip

    asked = ("elastic_linear", "elastic_linear weight gradient", "elastic_linear input gradient")
    inputs = (draw(3, 50), draw(70, 32, seed=1), draw(40, 60, seed=2))
    name = "elastic_linear grouped"
    return Case(name, asked, partial(run, TRITON), partial(run, REFERENCE), inputs)


def packed(name: str, tokens: int, dtype: torch.dtype) -> Case:
    x, rows, columns = draw(tokens, 300, dtype=dtype), 40, 300
    values, scale = quantize_rows(draw(rows, columns, seed=1))
    exact = x.double() @ dequantize_rows(values, scale, torch.float64).T
    run = partial(int8_weight_linear, x, values, scale, implementation=TRITON)
    return Case(name, ("packed_linear",), run, lambda: exact, (), dtype)


def integers(name: str, tokens: int, ternary: bool) -> Case:
    columns = 2100 if tokens == 1 else 600
    weight, x = draw(40, columns, seed=1), quantize_activations(draw(tokens, columns))
    if ternary:
        codes, scale = quantize_ternary(weight)
        run = partial(ternary_linear, x, pack_ternary(codes), scale, implementation=TRITON)
    else:
        codes, scale = quantize_weight(weight)
        run = partial(int8_linear, x, codes, scale, implementation=TRITON)
    sums = x.values_MK.cpu().long() @ codes.cpu().long().T
    exact = sums.to(DEVICE).double() * x.scale_M1.double() * scale.double()
    return Case(name, ("packed_linear",), run, lambda: exact, ())


def int4(name: str, tokens: int, dtype: torch.dtype) -> Case:
    x, weight = draw(tokens, 500, dtype=dtype), quantize_int4(draw(40, 500, seed=1))
    exact = x.double() @ dequantize_int4(weight, 500, torch.float64).T
    run = partial(int4_linear, x, weight, implementation=TRITON)
    return Case(name, ("int4_linear",), run, lambda: exact, (), dtype)


def quantisation() -> Case:
    x, asked = draw(3, 5000), ("quantize_activations",)

    def run(implementation: str) -> tuple[Tensor, Tensor]:
        return quantize_activations(x, implementation=implementation)[:2]

    name = "quantize_activations"
    return Case(name, asked, lambda: [x.float() for x in run(TRITON)], partial(run, REFERENCE), ())


def decode(name: str, dtype: torch.dtype) -> Case:
    inputs = (draw(1, 4, 2, 20, dtype=dtype), *(draw(1, 2, 600, 20, seed=s) for s in (1, 2)))
    inputs = tuple(x.to(dtype) for x in inputs)

    def run(implementation: str, *inputs: Tensor) -> Tensor:
        with torch.no_grad():
            return decode_attention(*inputs, implementation=implementation)

    asked = ("decode_attention",)
    return Case(name, asked, partial(run, TRITON), partial(run, REFERENCE), inputs, dtype)


def attention(name: str, dtype: torch.dtype, mask: Tensor | None = None) -> Case:
    shapes = ((1, 2, 70, 20), (1, 1, 90, 20), (1, 1, 90, 20))
    inputs = [draw(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]
    pattern = Pattern() if mask is not None else Pattern(window=40)
    return both(name, "block_attention", block_attention, *inputs, pattern, block_mask_IJ=mask)


def linear(name: str, dtype: torch.dtype, decay: int) -> Case:
    shapes = ((1, 2, 40, 20), (1, 1, 40, 20), (1, 1, 40, 18))
    inputs = [draw(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]
    gate = -draw(1, 1, 40, 20 if decay == 2 else 1, seed=3).abs() / 4
    asked = ("linear_attention", "linear_attention backward")
    run = partial(linear_attention, implementation=TRITON)
    given = (*inputs, gate if decay else None, draw(1, 1, 20, 18, seed=4))
    return Case(name, asked, run, recurrent_linear_attention, given, dtype)


def delta(name: str, dtype: torch.dtype) -> Case:
    q, v = draw(1, 2, 40, 20), draw(1, 1, 40, 18, seed=2)
    k, beta = F.normalize(draw(1, 1, 40, 20, seed=1), dim=-1), draw(1, 1, 40, seed=3).sigmoid()
    inputs = [x.to(dtype) for x in (q, k, v, beta)]
    asked, run = ("delta_rule", "delta_rule backward"), partial(delta_rule, implementation=TRITON)
    given = (*inputs, draw(1, 1, 20, 18, seed=4))
    return Case(name, asked, run, recurrent_delta_rule, given, dtype)


def cases() -> list[Case]:
    """Return the cases, which draw what they need."""
    x, targets = draw(6, 20), torch.tensor([0, 3, 149, -100, 7, 90], device=DEVICE)
    tokens, scanned, state = draw(1, 40, 50), draw(1, 12, 9), draw(1, 3, 50, seed=4)
    # The interpreter scans number by number.
    delta_t, a = draw(1, 12, 9, seed=1).exp() / 8, -draw(9, 2, seed=2).exp()
    write, read = draw(1, 12, 2, seed=3), draw(1, 12, 2, seed=5)
    wide = draw(10, 2100)
    mask = torch.tensor([[True, False], [True, True]], device=DEVICE)
    return [
        both("norms", "norms", add_layer_norm, *(draw(40, 33, seed=s) for s in (0, 1)),
             *(draw(33, seed=s) for s in (2, 3))),
        both("norms wide", "norms", rms_norm, wide, draw(2100, seed=1)),
        Case("cross_entropy", ("cross_entropy",),
             partial(linear_cross_entropy, implementation=TRITON),
             partial(linear_cross_entropy, implementation=REFERENCE),
             (x, draw(150, 20, seed=1), targets)),
        elastic("elastic_linear one row", 1, FP32, True),
        elastic("elastic_linear few rows bf16", 20, BF16, True),
        elastic("elastic_linear", 70, FP32, False),
        elastic("elastic_linear bf16", 70, BF16, False),
        elastic("elastic_linear gated bf16", 70, BF16, True),
        grouped(),
        *(packed(f"int8 weights, {m} tokens", m, FP32) for m in (1, 5, 20)),
        *(packed(f"int8 weights, {m} tokens bf16", m, BF16) for m in (5, 20, 70)),
        *(integers(f"int8, {m} tokens", m, False) for m in (1, 70)),
        *(integers(f"ternary, {m} tokens", m, True) for m in (1, 5, 20)),
        *(int4(f"int4, {m} tokens", m, FP32) for m in (1, 5, 20)),
        int4("int4, 70 tokens bf16", 70, BF16),
        quantisation(),
        decode("decode_attention", FP32),
        decode("decode_attention bf16", BF16),
        attention("block_attention", FP32),
        attention("block_attention bf16", BF16),
        attention("block_attention masked bf16", BF16, mask),
        linear("linear_attention, decay per head", FP32, 1),
        linear("linear_attention bf16", BF16, 0),
        linear("linear_attention bf16, decay per feature", BF16, 2),
        delta("delta_rule", FP32),
        delta("delta_rule bf16", BF16),
        both("selective_scan", "selective_scan", selective_scan, scanned, delta_t, a, write, read,
             draw(1, 9, 2, seed=6)),
        both("linear_scan", "linear_scan", linear_scan, scanned.sigmoid(), delta_t,
             draw(1, 9, seed=1)),
        both("causal_conv", "causal_conv", causal_conv, tokens, draw(50, 4, seed=1), state,
             draw(50, seed=2)),
    ]  # fmt: skip
