"""Low-bit linear maps: int4, int8 and ternary weights against bf16 by cuBLAS.

Shapes: M tokens, N outputs, K inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nas_kernels import int4_linear as int4
from nas_kernels import int8_linear as int8
from nas_kernels import int8_weight_linear as int8_weight
from nas_kernels import ternary_linear as ternary
from tests.benchmarks._kernel_cases._torchao import int4_contender, int8_contender
from tests.benchmarks._kernel_cases.case import OURS, Case, Contender, Inputs, Setting

CUBLAS = "cuBLAS bf16"
QUANTISED = 5e-2
"""RMS ratio of a product with unquantised activations to one with int8 activations."""
Size = tuple[int, int]
SIZES: list[Size] = [(4096, 4096), (8192, 8192), (14336, 4096)]


def cases(setting: Setting) -> list[Case]:
    """Return int4 on all shapes, the others on some."""
    sizes = [(64, 64)] if setting.quick else SIZES
    rows = [1, 24] if setting.quick else [1, 16, 512]
    found = [_int4(setting, m, size, size) for size in sizes for m in rows]
    part = (48, 32) if setting.quick else (3072, 3072)
    found += [_int4(setting, m, part, sizes[0]) for m in rows[:1]]
    few = rows if setting.quick else [512, 1]
    found += [_int8(setting, m, sizes[-1]) for m in few]
    found += [_ternary(setting, m, sizes[-1]) for m in few]
    found += [_int8_weight(setting, m, sizes[-1]) for m in reversed(few)]
    return [*found, _quantise(setting, *((48, 64) if setting.quick else (16384, 4096)))]


def _cublas(bound: float | None = None) -> Contender:
    return Contender(CUBLAS, lambda given: lambda: (F.linear(given["x"], given["w"]),), bound=bound)


def _int4(setting: Setting, m: int, size: Size, maximal: Size) -> Case:
    n, k = size

    def inputs() -> Inputs:
        full = setting.normal(*maximal, scale=maximal[1] ** -0.5)
        whole = int4.quantize_int4(full)
        stored, groups = k // 2, k // int4.GROUP
        weight = (whole.packed_NP[:n, :stored], whole.scale_NG[:n, :groups],
                  whole.zero_NG[:n, :groups])  # fmt: skip
        given = dict(zip(("packed", "scale", "zero"), weight, strict=True))
        w = int4.dequantize_int4(int4.Int4Weight(*weight), k, torch.float32)
        return {**given, "x": setting.normal(m, k), "w": w.to(torch.bfloat16)}

    def weight_of(given: Inputs) -> int4.Int4Weight:
        return int4.Int4Weight(given["packed"], given["scale"], given["zero"])

    def ours(given: Inputs) -> Any:
        weight = weight_of(given)
        return lambda: (int4.int4_linear(given["x"], weight, implementation=setting.kernel),)

    sliced = "" if size == maximal else f" of {maximal[0]}x{maximal[1]}"
    return Case(
        family="int4_linear",
        name=f"{m}x{k} to {n}{sliced}",
        inputs=inputs,
        reference=lambda given: (int4.int4_linear_ref(given["x"], weight_of(given)),),
        contenders=(
            Contender(OURS, ours),
            _cublas(),
            _tinygemm(setting, weight_of),
            int4_contender(setting),
        ),
        min_bytes=n * k / 2 + n * k / int4.GROUP * 4 + 2 * m * (n + k),
        flops=2.0 * m * n * k,
        priority=0 if m == 1 else 1,
        targets=("int4", "memory") if m == 1 and not sliced else (),
    )


def _tinygemm(setting: Setting, weight_of: Any) -> Contender:
    """PyTorch's own kernel for CUDA, on the same codes in its own layout."""

    def build(given: Inputs) -> Any:
        weight = weight_of(given)
        packed = weight.packed_NP.contiguous()
        swapped = (packed << 4) | (packed >> 4)  # there the even column is in the high half
        tiles = torch.ops.aten._convert_weight_to_int4pack(swapped, 8)
        grids = torch.stack([weight.scale_NG, weight.zero_NG], dim=-1)
        grids_GN2 = grids.transpose(0, 1).contiguous()
        product = torch.ops.aten._weight_int4pack_mm
        return lambda: (product(given["x"], tiles, int4.GROUP, grids_GN2),)

    return Contender("torch int4pack", build, setting.gpu())


def _int8(setting: Setting, m: int, size: Size) -> Case:
    n, k = size

    def inputs() -> Inputs:
        values, scale = int8.quantize_weight(setting.normal(n, k, scale=k**-0.5).float())
        w = (values * scale[:, None]).to(torch.bfloat16)
        return {"x": setting.normal(m, k), "values": values, "scale": scale, "w": w}

    def build(implementation: str) -> Any:
        def call(x: Tensor, values: Tensor, scale: Tensor) -> tuple[Tensor]:
            quantised = int8.quantize_activations(x, implementation=implementation)
            return (int8.int8_linear(quantised, values, scale, None, implementation),)

        return call

    def arguments(given: Inputs) -> tuple[Tensor, ...]:
        return given["x"], given["values"], given["scale"]

    def reference(given: Inputs) -> tuple[Tensor]:
        return (int8.int8_linear_ref(int8.quantize_activations(given["x"]), *arguments(given)[1:]),)

    return Case(
        family="int8_linear",
        name=f"{m}x{k} to {n}, with quantisation",
        inputs=inputs,
        reference=reference,
        contenders=(
            Contender(OURS, lambda given: lambda: build(setting.kernel)(*arguments(given))),
            _cublas(QUANTISED),
            Contender(
                "torch (_int_mm from 17 rows on)",
                lambda given: lambda: build("reference")(*arguments(given)),
            ),
            setting.compiled(
                "torch.compile", build("reference"),
                lambda fast, given: lambda: fast(*arguments(given)),
            ),
            int8_contender(setting, QUANTISED),
        ),
        min_bytes=n * k + 2 * m * (n + k),
        flops=2.0 * m * n * k,
        unit="int8",
        targets=("memory",) if m == 1 else (),
    )  # fmt: skip


def _ternary(setting: Setting, m: int, size: Size) -> Case:
    n, k = size

    def inputs() -> Inputs:
        codes, scale = ternary.quantize_ternary(setting.normal(n, k).float())
        w = (codes * scale).to(torch.bfloat16)
        return {
            "x": setting.normal(m, k), "packed": ternary.pack_ternary(codes), "scale": scale,
            "w": w,
        }  # fmt: skip

    def ours(given: Inputs) -> Any:
        def call() -> tuple[Tensor]:
            x = int8.quantize_activations(given["x"], implementation=setting.kernel)
            packed, scale = given["packed"], given["scale"]
            return (ternary.ternary_linear(x, packed, scale, None, setting.kernel),)

        return call

    def reference(given: Inputs) -> tuple[Tensor]:
        x = int8.quantize_activations(given["x"])
        return (ternary.ternary_linear_ref(x, given["packed"], given["scale"]),)

    return Case(
        family="ternary_linear",
        name=f"{m}x{k} to {n}, with quantisation",
        inputs=inputs,
        reference=reference,
        contenders=(Contender(OURS, ours), _cublas(QUANTISED)),
        min_bytes=n * k / 4 + 2 * m * (n + k),
        flops=2.0 * m * n * k,
        unit="int8",
        targets=("memory",) if m == 1 else (),
    )


def _int8_weight(setting: Setting, m: int, size: Size) -> Case:
    n, k = size

    def inputs() -> Inputs:
        values, scale = int8_weight.quantize_rows(setting.normal(n, k, scale=k**-0.5))
        w = (values * scale[:, None].float()).to(torch.bfloat16)
        return {"x": setting.normal(m, k), "values": values, "scale": scale, "w": w}

    def arguments(given: Inputs) -> tuple[Tensor, ...]:
        return given["x"], given["values"], given["scale"]

    def ours(given: Inputs) -> Any:
        return lambda: (
            int8_weight.int8_weight_linear(*arguments(given), implementation=setting.kernel),
        )

    return Case(
        family="int8_weight_linear",
        name=f"{m}x{k} to {n}",
        inputs=inputs,
        reference=lambda given: (int8_weight.int8_weight_linear_ref(*arguments(given)),),
        contenders=(
            Contender(OURS, ours),
            _cublas(),
            Contender(
                "torch int8pack",
                lambda given: lambda: (torch._weight_int8pack_mm(*arguments(given)),),
                setting.gpu(),
            ),
        ),
        min_bytes=n * k + 2 * m * (n + k),
        flops=2.0 * m * n * k,
        priority=2,
        targets=("memory",) if m == 1 else (),
    )


def _quantise(setting: Setting, rows: int, width: int) -> Case:
    def parts(x: Tensor, implementation: str) -> tuple[Tensor, Tensor]:
        quantised = int8.quantize_activations(x, implementation=implementation)
        return quantised.values_MK, quantised.scale_M1

    def plain(x: Tensor) -> tuple[Tensor, Tensor]:
        return parts(x, "reference")

    return Case(
        family="int8_linear",
        name=f"quantise {rows}x{width}",
        inputs=lambda: {"x": setting.normal(rows, width)},
        reference=lambda given: tuple(part.double() for part in plain(given["x"])),
        contenders=(
            Contender(OURS, lambda given: lambda: parts(given["x"], setting.kernel)),
            Contender("torch", lambda given: lambda: plain(given["x"])),
            setting.compiled("torch.compile", plain, lambda fast, given: lambda: fast(given["x"])),
        ),
        min_bytes=3.0 * rows * width,
        targets=("memory",),
    )
