"""Recurrences channel by channel, and the convolution before them.

Shapes: B sequences, T tokens, C channels, S numbers of state per channel, W taps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nas_kernels.causal_conv import causal_conv, causal_conv_reference
from nas_kernels.linear_scan import linear_scan
from nas_kernels.selective_scan import selective_scan
from tests.benchmarks._kernel_cases.case import GRADIENT, OURS, Case, Contender, Inputs, Setting

TAPS, STATES = 4, 16
SCAN = ("x", "delta", "a", "write", "read")


def cases(setting: Setting) -> list[Case]:
    """Return each operation forward and with backward."""
    shape = (2, 40, 24) if setting.quick else (4, 4096, 2048)
    makers = (_conv, _selective, _linear)
    return [make(setting, shape, trained) for trained in (False, True) for make in makers]


def _prepared(given: Inputs, gradient: Tensor, trained: bool) -> Inputs:
    if not trained:
        return given
    return {name: x.requires_grad_() for name, x in given.items()} | {GRADIENT: gradient}


def _conv(setting: Setting, shape: tuple[int, int, int], trained: bool) -> Case:
    batch, tokens, channels = shape
    names = ("x", "weight", "bias")

    def inputs() -> Inputs:
        given: Inputs = {"x": setting.normal(*shape), "bias": setting.normal(channels)}
        given["weight"] = setting.normal(channels, TAPS, scale=0.5)
        return _prepared(given, setting.normal(*shape), trained)

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor]:
        return causal_conv_reference(x, weight, None, bias, True)[:1]

    def ours(given: Inputs) -> Any:
        x, weight, bias = (given[name] for name in names)
        return lambda: causal_conv(x, weight, None, bias, True, implementation=setting.kernel)[:1]

    def vendor(given: Inputs) -> tuple[Tensor]:
        kernel = given["weight"].flip(1)[:, None]
        x = F.pad(given["x"].transpose(1, 2), (TAPS - 1, 0))
        out = F.conv1d(x, kernel, given["bias"], groups=channels)
        return (F.silu(out.transpose(1, 2)),)

    def package(given: Inputs) -> Any:
        from causal_conv1d import causal_conv1d_fn

        def call() -> tuple[Tensor]:
            weight = given["weight"].flip(1)
            out = causal_conv1d_fn(
                given["x"].transpose(1, 2), weight, given["bias"], activation="silu"
            )
            return (out.transpose(1, 2),)

        return call

    return Case(
        family="causal_conv",
        name=f"{batch}x{tokens}x{channels}, {TAPS} taps, silu{' train' if trained else ''}",
        inputs=inputs,
        reference=lambda given: plain(*(given[name] for name in names)),
        contenders=(
            Contender(OURS, ours),
            setting.compiled(
                "torch.compile", plain,
                lambda fast, given: lambda: fast(*(given[name] for name in names)),
            ),
            Contender("cuDNN", lambda given: lambda: vendor(given)),
            Contender("torch", lambda given: lambda: plain(*(given[name] for name in names))),
            Contender("causal_conv1d", package, setting.needs("causal_conv1d")),
        ),
        min_bytes=2.0 * batch * tokens * channels * (5 if trained else 2),
        wanted=names if trained else (),
        targets=("memory",),
    )  # fmt: skip


def _linear(setting: Setting, shape: tuple[int, int, int], trained: bool) -> Case:
    batch, tokens, channels = shape
    names = ("decay", "added")

    def inputs() -> Inputs:
        decay = torch.sigmoid(setting.normal(*shape, dtype=torch.float32) + 2).bfloat16()
        given: Inputs = {"decay": decay, "added": setting.normal(*shape)}
        return _prepared(given, setting.normal(*shape, dtype=torch.float32), trained)

    def run(given: Inputs, implementation: str) -> tuple[Tensor]:
        return linear_scan(*(given[name] for name in names), implementation=implementation)[:1]

    return Case(
        family="linear_scan",
        name=f"{batch}x{tokens}x{channels}{' train' if trained else ''}",
        inputs=inputs,
        reference=lambda given: run(given, "reference"),
        contenders=(
            Contender(OURS, lambda given: lambda: run(given, setting.kernel)),
            Contender("torch, chunked", lambda given: lambda: run(given, "reference")),
        ),
        min_bytes=batch * tokens * channels * (22.0 if trained else 8.0),
        wanted=names if trained else (),
        priority=2,
        targets=("memory",),
    )


def _selective(setting: Setting, shape: tuple[int, int, int], trained: bool) -> Case:
    batch, tokens, channels = shape = (2, *shape[1:])  # the reference holds every state
    states = 4 if setting.quick else STATES

    def inputs() -> Inputs:
        delta = F.softplus(setting.normal(*shape, dtype=torch.float32) - 3).bfloat16()
        rates = -torch.arange(1.0, states + 1, device=setting.device)
        given: Inputs = {"x": setting.normal(*shape), "delta": delta}
        given["a"] = rates.expand(channels, states).contiguous()
        given |= {name: setting.normal(batch, tokens, states) for name in ("write", "read")}
        return _prepared(given, setting.normal(*shape, dtype=torch.float32), trained)

    def run(given: Inputs, implementation: str) -> tuple[Tensor]:
        return selective_scan(*(given[name] for name in SCAN), implementation=implementation)[:1]

    def package(given: Inputs) -> Any:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

        def call() -> tuple[Tensor]:
            x, delta, write, read = (
                given[name].transpose(1, 2) for name in ("x", "delta", "write", "read")
            )
            return (selective_scan_fn(x, delta, given["a"], write, read).transpose(1, 2),)

        return call

    return Case(
        family="selective_scan",
        name=f"{batch}x{tokens}x{channels}, {states} states{' train' if trained else ''}",
        inputs=inputs,
        reference=lambda given: run(given, "reference"),
        contenders=(
            Contender(OURS, lambda given: lambda: run(given, setting.kernel)),
            Contender("torch, chunked", lambda given: lambda: run(given, "reference")),
            Contender("mamba_ssm", package, setting.needs("mamba_ssm")),
        ),
        min_bytes=batch * tokens * channels * (20.0 if trained else 8.0),
        flops=batch * tokens * channels * states * (24.0 if trained else 7.0),
        wanted=SCAN if trained else (),
    )
