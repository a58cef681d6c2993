"""Calls of every operation, forward and backward, in the variants that are compiled ahead of time.

Sizes decide which tile a launcher takes, whether rows are aligned, and little else: nothing is
computed. Imported only by `tests.kernels.aot`, which has prepared the dispatcher.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from nas_kernels import fp8_linear
from nas_kernels.block_attention import Pattern, block_attention
from nas_kernels.causal_conv import causal_conv
from nas_kernels.cross_entropy import linear_cross_entropy
from nas_kernels.decode_attention import decode_attention
from nas_kernels.delta_rule import delta_rule
from nas_kernels.delta_rule import step as delta_step
from nas_kernels.elastic_linear import GATED, elastic_linear, grouped_elastic_linear
from nas_kernels.int4_linear import Int4Weight, int4_linear
from nas_kernels.int8_linear import QuantizedActivations, int8_linear, quantize_activations
from nas_kernels.int8_weight_linear import int8_weight_linear
from nas_kernels.linear_attention import linear_attention
from nas_kernels.linear_attention import step as linear_step
from nas_kernels.linear_scan import linear_scan
from nas_kernels.norms import add_layer_norm, rms_norm
from nas_kernels.selective_scan import selective_scan
from nas_kernels.selective_scan import step as selective_step
from nas_kernels.ternary_linear import ternary_linear

BF16, FP16, FP32, INT8, UINT8 = (
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.int8,
    torch.uint8,
)


@dataclass(frozen=True)
class Case:
    """A call.

    Attributes:
        name: to find it by.
        run: does it.
        paces: ``"fast"`` for those that take seconds to compile, all together; else ``"slow"``.
            ``"older"`` for those that show what fits in the shared memory of older GPUs,
            ``"candidates"`` for those of which every choice is compiled.
    """

    name: str
    run: Callable[[], None]
    paces: tuple[str, ...] = ("slow",)


def _made(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def _leaf(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return _made(*shape, dtype=dtype).requires_grad_()


def _leaves(*shapes: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    return [_leaf(*shape, dtype=dtype) for shape in shapes]


def _back(outputs: Iterable[Tensor]) -> None:
    torch.stack([out.float().sum() for out in outputs]).sum().backward()


def _norms(dtype: torch.dtype, width: int, aligned: bool = True) -> None:
    x = _leaf(64, width + 8, dtype=dtype)[:, : width if aligned else width - 1]
    residual, weight, bias = _leaf(*x.shape, dtype=dtype), _leaf(width), _leaf(width)
    _back((rms_norm(x, weight), *add_layer_norm(x, residual, weight, bias)))


def _cross_entropy(dtype: torch.dtype, classes: int) -> None:
    x, weight = _leaves((64, 32), (classes, 32), dtype=dtype)
    linear_cross_entropy(x, weight, torch.zeros(64, dtype=torch.int64)).backward()


def _elastic(
    dtype: torch.dtype,
    activation: str,
    rows: int = 512,
    weights: torch.dtype | None = None,
    width: int = 768,
    groups: bool = True,
) -> None:
    x = _leaf(rows, 1024, dtype=dtype)[:, :width]
    weight, gate = _leaves((1024, 1024), (1024, 1024), dtype=weights or dtype)
    bias = _leaf(1024, dtype=weights or dtype)
    maps = (weight, bias)
    gate_weight = gate if activation in GATED else None
    if not groups:
        _back([elastic_linear(x, *maps, width, activation, gate_weight, None, "triton")])
        return
    half = _leaf(rows, 1024, dtype=dtype)[:, : width // 2]
    results = grouped_elastic_linear(
        [x, half],
        *maps,
        out_features=[width, width // 2],
        activation=activation,
        gate_weight_NK=gate_weight,
        implementation="triton",
    )
    _back(results)


def _linear_attention(
    dtype: torch.dtype, decay: int, width: int = 128, tokens: int = 200, heads: int = 2
) -> None:
    q, k, v = _leaves(
        (1, heads, tokens, width), (1, 1, tokens, width), (1, 1, tokens, width), dtype=dtype
    )
    state = _leaf(1, 1, width, width)
    gate = None if not decay else _leaf(1, 1, tokens, width if decay == 2 else 1)
    _back(linear_attention(q, k, v, gate, state))


def _linear_step(dtype: torch.dtype, decay: int, width: int = 128) -> None:
    q, k, v = (_made(2, heads, width, dtype=dtype) for heads in (4, 2, 2))
    gate = None if not decay else _made(2, 2, width if decay == 2 else 1)
    linear_step(q, k, v, gate, _made(2, 2, width, width))


def _delta_rule(dtype: torch.dtype, width: int = 128, tokens: int = 200) -> None:
    q, k, v, beta = _leaves(
        (1, 2, tokens, width), (1, 1, tokens, width), (1, 1, tokens, width), (1, 1, tokens),
        dtype=dtype,
    )  # fmt: skip
    _back(delta_rule(q, k, v, beta, _leaf(1, 1, width, width)))


def _delta_step(dtype: torch.dtype, width: int = 128) -> None:
    q, k, v = (_made(2, heads, width, dtype=dtype) for heads in (4, 2, 2))
    delta_step(q, k, v, _made(2, 2), _made(2, 2, width, width))


def _selective_scan(
    dtype: torch.dtype, channels: int = 256, states: int = 16, tokens: int = 200
) -> None:
    shapes = ((2, tokens, channels), (2, tokens, states), (2, tokens, states))
    x, write, read = _leaves(*shapes, dtype=dtype)
    delta, a, state = _leaves(shapes[0], (channels, states), (2, channels, states), dtype=FP32)
    _back(selective_scan(x, delta, a, write, read, state))


def _selective_step(dtype: torch.dtype, channels: int = 256, states: int = 16) -> None:
    x, write, read = (_made(2, width, dtype=dtype) for width in (channels, states, states))
    state = _made(2, channels, states)
    selective_step(x, _made(2, channels), _made(channels, states), write, read, state)


def _linear_scan(dtype: torch.dtype, channels: int = 256, tokens: int = 200) -> None:
    decay, x = _leaves((2, tokens, channels), (2, tokens, channels), dtype=dtype)
    _back(linear_scan(decay, x, _leaf(2, channels)))


def _causal_conv(
    dtype: torch.dtype, silu: bool = True, taps: int = 4, channels: int = 256, tokens: int = 200
) -> None:
    x, weight, bias = _leaf(2, tokens, channels, dtype=dtype), _leaf(channels, taps), None
    if silu:
        bias = _leaf(channels)
    _back(causal_conv(x, weight, _leaf(2, taps - 1, channels), bias, silu))


def _quantize_fp8(dtype: torch.dtype, columns: int) -> None:
    fp8_linear.quantize_activations(_made(4, columns, dtype=dtype), "triton")


def _quantize(dtype: torch.dtype, columns: int) -> None:
    quantize_activations(_made(4, columns, dtype=dtype))


def _int8(tokens: int, columns: int = 4096, rows: int = 4096, dtype: torch.dtype = BF16) -> None:
    int8_linear(_rounded(tokens, columns, dtype), _made(rows, columns, dtype=INT8), _made(rows))


def _ternary(tokens: int, columns: int = 4096, dtype: torch.dtype = BF16) -> None:
    packed = _made(4096, -(-columns // 4), dtype=UINT8)
    ternary_linear(_rounded(tokens, columns, dtype), packed, _made(1), _made(4096))


def _rounded(tokens: int, columns: int, dtype: torch.dtype) -> QuantizedActivations:
    values, shape = _made(tokens, columns, dtype=INT8), torch.Size((tokens, columns))
    return QuantizedActivations(values, _made(tokens, 1), shape, dtype)


def _int8_weight(tokens: int, dtype: torch.dtype = BF16, columns: int = 4096) -> None:
    weight, scale = _made(4096, columns, dtype=INT8), _made(4096, dtype=BF16)
    int8_weight_linear(_made(tokens, columns, dtype=dtype), weight, scale)


def _int4(tokens: int, dtype: torch.dtype = BF16, columns: int = 4096) -> None:
    grids = (4096, -(-columns // 32))
    packed = _made(4096, -(-columns // 2), dtype=UINT8)
    weight = Int4Weight(packed, _made(*grids, dtype=BF16), _made(*grids, dtype=BF16))
    int4_linear(_made(tokens, columns, dtype=dtype), weight)


def _decode(
    dtype: torch.dtype,
    heads: int = 32,
    width: int = 128,
    tokens: int = 1,
    window: int | None = None,
    slots: int = 8192,
) -> None:
    q, k, v = (_made(1, h, t, width, dtype=dtype) for h, t in ((heads, tokens), *((1, slots),) * 2))
    decode_attention(q, k, v, window=window, first_tokens=4)


def _block(dtype: torch.dtype, width: int, pattern: Pattern, tokens: int = 256) -> None:
    q, k, v = _leaves(*((1, heads, tokens, width) for heads in (4, 2, 2)), dtype=dtype)
    _back(block_attention(q, k, v, pattern))


def _slow(name: str, function: Callable[..., None], *args: object, **kwargs: object) -> Case:
    return Case(name, partial(function, *args, **kwargs))


def _fast(name: str, function: Callable[..., None], *args: object, **kwargs: object) -> Case:
    return Case(name, partial(function, *args, **kwargs), ("fast",))


def _both(name: str, function: Callable[..., None], *args: object, **kwargs: object) -> Case:
    return Case(name, partial(function, *args, **kwargs), ("slow", "older", "candidates"))


def _swept(name: str, function: Callable[..., None], *args: object, **kwargs: object) -> Case:
    return Case(name, partial(function, *args, **kwargs), ("slow", "candidates"))


WINDOW, LONGFORMER = Pattern(window=64), Pattern(False, 32, 2, 4)
SEGMENTS, FULL = Pattern(segment=48), Pattern(causal=False)
FAMILIES: dict[str, list[Case]] = {
    "norms": [
        _fast("bf16", _norms, BF16, 1024),
        _swept("bf16 4096", _norms, BF16, 4096),
        _slow("bf16 16384", _norms, BF16, 16384),
        _slow("fp16 odd", _norms, FP16, 100, aligned=False),
        _slow("fp32", _norms, FP32, 2048),
    ],
    "cross_entropy": [
        _fast("bf16", _cross_entropy, BF16, 5000),
        _slow("fp32 odd", _cross_entropy, FP32, 77),
        _swept("fp16", _cross_entropy, FP16, 5000),
    ],
    "elastic_linear": [
        _fast("bf16 one token", _elastic, BF16, "relu2", rows=1, groups=False),
        _both("bf16", _elastic, BF16, "swiglu", groups=False),
        _slow("bf16 grouped", _elastic, BF16, "geglu"),
        _both("bf16 64 rows", _elastic, BF16, "swiglu", rows=64, groups=False),
        _slow("bf16 odd", _elastic, BF16, "reglu", rows=333, width=767),
        _slow("fp16", _elastic, FP16, "gelu", groups=False),
        _swept("fp32", _elastic, FP32, "swiglu", groups=False),
        _swept("bf16 of fp32 weights", _elastic, BF16, "silu", weights=FP32, groups=False),
    ],
    "linear_attention": [
        _fast("bf16 step, decay per head", _linear_step, BF16, 1),
        _slow("fp32 step, decay per feature", _linear_step, FP32, 2),
        _slow("odd step", _linear_step, BF16, 0, width=5),
        _slow("bf16", _linear_attention, BF16, 0),
        _both("bf16, decay per head", _linear_attention, BF16, 1),
        _slow("bf16, decay per feature", _linear_attention, BF16, 2),
        _slow("fp32", _linear_attention, FP32, 0),
        _swept("fp32, decay per feature", _linear_attention, FP32, 2),
        _slow("fp16 odd", _linear_attention, FP16, 1, width=5, tokens=3),
    ],
    "delta_rule": [
        _fast("bf16 step", _delta_step, BF16),
        _slow("odd step", _delta_step, FP32, width=5),
        _swept("bf16", _delta_rule, BF16),
        _slow("bf16 256", _delta_rule, BF16, width=256),
        _slow("fp32", _delta_rule, FP32, width=64),
        _both("fp16 odd", _delta_rule, FP16, width=5, tokens=3),
    ],
    "scans": [
        _fast("bf16 step", _selective_step, BF16),
        _slow("odd step", _selective_step, FP32, channels=3, states=2),
        _both("bf16 selective", _selective_scan, BF16),
        _slow("fp32 selective, odd", _selective_scan, FP32, channels=3, states=2, tokens=5),
        _swept("bf16 linear", _linear_scan, BF16),
        _slow("fp32 linear, odd", _linear_scan, FP32, channels=3, tokens=5),
    ],
    "causal_conv": [
        _fast("bf16 plain", _causal_conv, BF16, silu=False),
        _swept("bf16", _causal_conv, BF16),
        _slow("fp32 eight taps", _causal_conv, FP32, taps=8),
        _slow("fp16 odd", _causal_conv, FP16, taps=3, channels=5, tokens=3),
        _slow("one tap", _causal_conv, FP32, taps=1, tokens=1),
    ],
    "low_bit": [
        _fast("rounding bf16", _quantize, BF16, 4096),
        _fast("rounding to fp8", _quantize_fp8, BF16, 4096),
        _fast("int4 one token", _int4, 1),
        _fast("int8 one token", _int8, 1),
        _swept("rounding long rows", _quantize, FP32, 20000),
        _swept("int8 16 tokens", _int8, 16),
        _both("int8 512 tokens", _int8, 512),
        _slow("int8 odd", _int8, 33, columns=77, rows=51, dtype=FP32),
        _swept("ternary one token", _ternary, 1),
        _slow("ternary 512 tokens", _ternary, 512),
        _slow("ternary odd", _ternary, 5, columns=77, dtype=FP16),
        _slow("int8 weights one token", _int8_weight, 1),
        _both("int8 weights 16 tokens", _int8_weight, 16),
        _swept("int8 weights 512 tokens", _int8_weight, 512),
        _swept("int8 weights fp32 odd", _int8_weight, 70, dtype=FP32, columns=77),
        _swept("int8 weights fp16", _int8_weight, 64, dtype=FP16),
        _swept("int4 16 tokens", _int4, 16),
        _both("int4 512 tokens", _int4, 512),
        _swept("int4 fp32 odd", _int4, 70, dtype=FP32, columns=77),
        _slow("int4 fp16", _int4, 64, dtype=FP16),
    ],
    "attention": [
        _fast("decode bf16", _decode, BF16),
        _swept("decode fp32", _decode, FP32),
        _swept("decode 256 wide", _decode, BF16, width=256),
        _both("decode fp32 256 wide", _decode, FP32, width=256, heads=1),
        _slow("decode windowed", _decode, FP16, width=64, window=512, slots=100),
        _slow("decode odd", _decode, BF16, heads=3, width=33, tokens=3),
        _slow("window bf16", _block, BF16, 64, WINDOW),
        _both("window bf16 128", _block, BF16, 128, WINDOW),
        _swept("window bf16 256", _block, BF16, 256, WINDOW),
        _slow("longformer fp16", _block, FP16, 64, LONGFORMER),
        _swept("segments fp32", _block, FP32, 64, SEGMENTS),
        _slow("bidirectional fp32 odd", _block, FP32, 100, FULL, tokens=33),
    ],
}
"""Cases of every family of operations."""
