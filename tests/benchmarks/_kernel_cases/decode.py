"""One new token's attention to a long cache.

Shapes: B sequences, H query heads, G key/value heads, S positions of D features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from nas_kernels.decode_attention import decode_attention
from tests.benchmarks._kernel_cases._flex import flex_contender
from tests.benchmarks._kernel_cases.case import OURS, Case, Contender, Inputs, Setting

FAMILY = "decode_attention"
Shape = tuple[int, int, int, int]
SHAPES: list[Shape] = [
    (1, 32, 1, 65536), (1, 32, 8, 65536), (1, 32, 8, 8192), (64, 32, 8, 8192), (1, 32, 8, 131072),
    (1, 32, 1, 8192), (1, 32, 1, 131072), (16, 32, 8, 8192), (16, 32, 8, 32768), (64, 32, 1, 8192),
    (4, 32, 32, 8192),
]  # fmt: skip
"""B, H, G, S; the first decides a target of its own."""
LENGTHS = [(1, 32, 8, 65536, 4096)]
"""And a window."""
WIDTH = 128
BACKENDS = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
}
"""Asked for by name; `sdpa` alone is what PyTorch chooses."""


def cases(setting: Setting) -> list[Case]:
    """Return the whole cache on all shapes, and a window of it."""
    shapes = [(2, 4, 1, 96), (1, 4, 2, 80)] if setting.quick else SHAPES
    found = [_whole(setting, shape, i == 0) for i, shape in enumerate(shapes)]
    windows = [(1, 4, 2, 96, 32)] if setting.quick else LENGTHS
    return found + [_window(setting, sizes[:4], sizes[4]) for sizes in windows]


def _inputs(setting: Setting, shape: Shape, width: int) -> Inputs:
    batch, heads, groups, slots = shape
    length = torch.full((batch,), slots, dtype=torch.int32, device=setting.device)
    return {
        "q": setting.normal(batch, heads, 1, width),
        "k": setting.normal(batch, groups, slots, width),
        "v": setting.normal(batch, groups, slots, width),
        "length": length,
    }


def _ours(setting: Setting, window: int | None) -> Contender:
    def build(given: Inputs) -> Any:
        q, k, v, length = (given[name] for name in ("q", "k", "v", "length"))
        return lambda: (
            decode_attention(q, k, v, length, window=window, implementation=setting.kernel),
        )

    return Contender(OURS, build)


def _reference(given: Inputs, window: int | None) -> tuple[Tensor]:
    start = 0 if window is None else max(given["k"].shape[2] - window, 0)
    q, k, v = given["q"], given["k"][:, :, start:], given["v"][:, :, start:]
    heads, groups = q.shape[1], k.shape[1]
    rows = q.reshape(q.shape[0], groups, heads // groups, q.shape[3])
    weights = (rows @ k.transpose(-1, -2) * q.shape[3] ** -0.5).softmax(dim=-1)
    return ((weights @ v).reshape(q.shape),)


def _sdpa(given: Inputs) -> tuple[Tensor]:
    q, k, v = given["q"], given["k"], given["v"]
    return (F.scaled_dot_product_attention(q, k, v, enable_gqa=True),)


def _asked_for(setting: Setting, name: str, backend: SDPBackend) -> Contender:
    """One of SDPA's kernels, with heads of the cache repeated by stride where there is one."""

    def build(given: Inputs) -> Any:
        q, k, v = given["q"], given["k"], given["v"]
        gqa = k.shape[1] != q.shape[1]
        if gqa and k.shape[1] == 1:
            k, v = (x.expand(-1, q.shape[1], -1, -1) for x in (k, v))
            gqa = False

        def call() -> tuple[Tensor]:
            with sdpa_kernel(backend):
                return (F.scaled_dot_product_attention(q, k, v, enable_gqa=gqa),)

        return call

    return Contender(name, build, setting.gpu())


def _whole(setting: Setting, shape: Shape, special: bool) -> Case:
    batch, heads, groups, slots = shape
    width = 16 if setting.quick else WIDTH
    single = batch == 1 and groups == 1
    return Case(
        family=FAMILY,
        name=f"batch {batch} context {slots} heads {heads}/{groups}",
        inputs=lambda: _inputs(setting, shape, width),
        reference=lambda given: _reference(given, None),
        contenders=(
            _ours(setting, None),
            Contender("sdpa", lambda given: lambda: _sdpa(given)),
            *(_asked_for(setting, name, backend) for name, backend in BACKENDS.items()),
            flex_contender(setting, "flex", None, enable_gqa=True),
        ),
        min_bytes=4.0 * batch * groups * slots * width,
        flops=4.0 * batch * heads * slots * width,
        priority=0 if special else 1,
        targets=("decode", "memory", *(["decode 64k"] if special and single else [])),
    )


def _window(setting: Setting, shape: Shape, window: int) -> Case:
    batch, heads, groups, slots = shape
    width = 16 if setting.quick else WIDTH

    def sliced(given: Inputs) -> tuple[Tensor]:
        parts = {name: given[name][:, :, slots - window :] for name in ("k", "v")}
        return _sdpa({**given, **parts})

    return Case(
        family=FAMILY,
        name=f"batch {batch} context {slots} heads {heads}/{groups} window {window}",
        inputs=lambda: _inputs(setting, shape, width),
        reference=lambda given: _reference(given, window),
        contenders=(
            _ours(setting, window),
            Contender("sdpa on a slice", lambda given: lambda: sliced(given)),
        ),
        min_bytes=4.0 * batch * groups * window * width,
        flops=4.0 * batch * heads * window * width,
        priority=2,
    )
