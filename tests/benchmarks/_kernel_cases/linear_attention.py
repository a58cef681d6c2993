"""Chunked linear attention without decay, with one per head or per feature, and the delta rule.

Tensors lie in memory as a projection writes them, (B, T, H, D): everyone gets views of that.

Shapes: B sequences, T tokens, H heads of D features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nas_kernels.delta_rule import delta_rule
from nas_kernels.delta_rule.chunked import delta_rule as chunked_delta_rule
from nas_kernels.linear_attention import linear_attention
from nas_kernels.linear_attention.chunked import linear_attention as chunked_linear_attention
from tests.benchmarks._kernel_cases.case import GRADIENT, OURS, Case, Contender, Inputs, Setting

FAMILY = "linear_attention"
SHAPES = [(8, 2048, 16), (2, 8192, 16), (1, 16384, 16)]
WIDTH = 128
CHUNK = 64
"""Tokens within which products are counted as quadratic."""


def cases(setting: Setting) -> list[Case]:
    """Return all kinds on all shapes, forward and with backward."""
    shapes = [(2, 70, 2)] if setting.quick else SHAPES
    return [
        _case(setting, kind, shape, trained)
        for shape in shapes
        for trained in (False, True)
        for kind in ("gla", "deltanet", "linear", "retention")
    ]


def _case(setting: Setting, kind: str, shape: tuple[int, int, int], trained: bool) -> Case:
    batch, tokens, heads = shape
    width = 16 if setting.quick else WIDTH
    extra = {"gla": ("gate",), "retention": ("gate",), "deltanet": ("beta",)}.get(kind, ())
    names = ("q", "k", "v", *extra)

    def inputs() -> Inputs:
        given = _inputs(setting, kind, batch, tokens, heads, width)
        if trained:
            given = {name: value.requires_grad_() for name, value in given.items()}
            given[GRADIENT] = setting.normal(batch, tokens, heads, width).transpose(1, 2)
        return given

    def ours(given: Inputs) -> Any:
        operation = delta_rule if kind == "deltanet" else linear_attention
        return lambda: operation(*_in_heads(given, names), implementation=setting.kernel)[:1]

    def chunked(given: Inputs) -> tuple[Tensor]:
        operation = chunked_delta_rule if kind == "deltanet" else chunked_linear_attention
        return operation(*_in_heads(given, names))[:1]

    def softmax(given: Inputs) -> Any:
        q, k, v = _in_heads(given, names[:3])
        return lambda: (F.scaled_dot_product_attention(q, k, v, is_causal=True),)

    element = batch * tokens * heads
    # Queries, keys and values are bf16, and a gate per feature or one number for each head.
    read = 6 * width + {"gla": 4 * width, "retention": 4, "deltanet": 2}.get(kind, 0)
    passes = 3 * read + 4 * width if trained else read + 2 * width
    each = 2 * width * (2 * width + CHUNK) + (4 * CHUNK * width if kind == "deltanet" else 0)
    mode = " train" if trained else ""
    long = tokens >= 2048
    return Case(
        family=FAMILY,
        name=f"{kind}, batch {batch} tokens {tokens} heads {heads}x{width}{mode}",
        inputs=inputs,
        reference=chunked,
        contenders=(
            Contender(OURS, ours),
            Contender("fla", _fla(kind), setting.needs("fla")),
            Contender("torch, chunked", lambda given: lambda: chunked(given)),
            Contender("softmax (sdpa)", softmax, same=False, wanted=names[:3] if trained else ()),
        ),
        min_bytes=float(element * passes),
        flops=float(element * each * (3 if trained else 1)),
        wanted=names if trained else (),
        priority=0 if tokens != 8192 and kind in ("gla", "deltanet") else 1,
        targets=("fla",) if long else (),
    )


def _inputs(setting: Setting, kind: str, batch: int, tokens: int, heads: int, width: int) -> Inputs:
    shape = (batch, tokens, heads, width)
    given: Inputs = {name: setting.normal(*shape) for name in ("q", "k", "v")}
    given["q"] = given["q"] * width**-0.5
    if kind == "deltanet":
        given["k"] = F.normalize(given["k"].float(), dim=-1).bfloat16()
        given["beta"] = torch.sigmoid(setting.normal(*shape[:3]))
    elif kind == "gla":
        given["gate"] = F.logsigmoid(setting.normal(*shape, dtype=torch.float32)) / 16
    elif kind == "retention":
        rates = torch.log1p(-(2.0 ** -torch.linspace(5, 8, heads, device=setting.device)))
        given["gate"] = rates.expand(batch, tokens, heads)[..., None].contiguous()
    return given


def _in_heads(given: Inputs, names: tuple[str, ...]) -> list[Tensor]:
    return [given[name].transpose(1, 2) for name in names]


def _fla(kind: str) -> Callable[[Inputs], Any]:
    """Return flash-linear-attention's kernel of a kind, whose tensors are (B, T, H, D)."""

    def build(given: Inputs) -> Any:
        from fla.ops.delta_rule import chunk_delta_rule
        from fla.ops.gla import chunk_gla
        from fla.ops.simple_gla import chunk_simple_gla

        q, k, v = given["q"], given["k"], given["v"]

        def call() -> tuple[Tensor]:
            if kind == "gla":
                out, _ = chunk_gla(q, k, v, given["gate"], scale=1.0)
            elif kind == "deltanet":
                out, _ = chunk_delta_rule(q, k, v, given["beta"], scale=1.0)
            else:
                gate = given["gate"][..., 0] if kind == "retention" else None
                out, _ = chunk_simple_gla(q, k, v, gate, scale=1.0)
            return (out.transpose(1, 2),)

        return call

    return build
