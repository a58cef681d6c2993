"""Cross-entropy of a linear map with many classes, beside what holds all logits.

Shapes: R rows of D features, V classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nas_kernels.cross_entropy import linear_cross_entropy, linear_cross_entropy_ref
from tests.benchmarks._kernel_cases.case import GRADIENT, OURS, Case, Contender, Inputs, Setting

FAMILY = "cross_entropy"
SHAPES = [(8192, 4096, 128256), (8192, 2048, 32000)]


def cases(setting: Setting) -> list[Case]:
    """Return the loss with its gradients, and alone."""
    shapes = [(40, 16, 48)] if setting.quick else SHAPES
    return [_case(setting, shape, trained) for trained in (True, False) for shape in shapes]


def _case(setting: Setting, shape: tuple[int, int, int], trained: bool) -> Case:
    rows, width, classes = shape

    def inputs() -> Inputs:
        given: Inputs = {"x": setting.normal(rows, width)}
        given["weight"] = setting.normal(classes, width, scale=width**-0.5)
        if trained:
            given = {name: value.requires_grad_() for name, value in given.items()}
            given[GRADIENT] = torch.ones((), device=setting.device)
        given["targets"] = torch.randint(classes, (rows,), device=setting.device)
        return given

    def arguments(given: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        return given["x"], given["weight"], given["targets"]

    def ours(given: Inputs) -> Any:
        return lambda: (linear_cross_entropy(*arguments(given), implementation=setting.kernel),)

    def plain(x: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor]:
        return (linear_cross_entropy_ref(x, weight, targets),)

    def liger(given: Inputs) -> Any:
        from liger_kernel.ops.fused_linear_cross_entropy import (
            LigerFusedLinearCrossEntropyFunction as Function,
        )

        return lambda: (Function.apply(*arguments(given))[0],)

    return Case(
        family=FAMILY,
        name=f"{rows}x{width}, {classes} classes{' train' if trained else ''}",
        inputs=inputs,
        reference=lambda given: plain(*arguments(given)),
        contenders=(
            Contender(OURS, ours),
            Contender("torch", lambda given: lambda: plain(*arguments(given))),
            setting.compiled(
                "torch.compile", plain, lambda fast, given: lambda: fast(*arguments(given))
            ),
            Contender("liger", liger, setting.needs("liger_kernel")),
        ),
        min_bytes=2.0 * width * (rows + classes) * (2 if trained else 1),
        flops=2.0 * rows * width * classes * (3 if trained else 1),
        wanted=("x", "weight") if trained else (),
        priority=1 if trained else 2,
    )
