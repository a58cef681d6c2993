"""Norms: rows read once and written once, also as leading features of wider rows.

Shapes: R rows of D features, out of rows of W >= D.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from nas_kernels import norms
from tests.benchmarks._kernel_cases.case import GRADIENT, OURS, Case, Contender, Inputs, Setting

FAMILY = "norms"
EPS = 1e-5
FORWARD = [
    (16384, 4096, 4096), (4096, 1024, 1024), (4096, 8192, 8192), (65536, 1024, 1024),
    (65536, 4096, 4096), (65536, 8192, 8192), (16384, 3072, 4096), (16384, 1000, 1024),
]  # fmt: skip
TRAINED = [(16384, 4096, 4096), (65536, 1024, 1024), (4096, 8192, 8192), (16384, 3072, 4096)]
QUICK = [(48, 64, 64), (48, 40, 64)]


def cases(setting: Setting) -> list[Case]:
    """Return RMSNorm on all shapes, the other kinds on some."""
    forward, trained = (QUICK, QUICK) if setting.quick else (FORWARD, TRAINED)
    found = [_case(setting, "rms_norm", shape, False) for shape in forward]
    found += [_case(setting, "rms_norm", shape, True) for shape in trained]
    for kind in ("add_rms_norm", "layer_norm", "add_layer_norm"):
        found += [_case(setting, kind, shape, False) for shape in forward[:1]]
        found += [_case(setting, kind, shape, True) for shape in trained[:1]]
    return found


def _case(setting: Setting, kind: str, shape: tuple[int, int, int], trained: bool) -> Case:
    rows, width, wide = shape
    added, centred = kind.startswith("add"), "layer" in kind
    names = ["x", *(["residual"] if added else []), "weight", *(["bias"] if centred else [])]

    def inputs() -> Inputs:
        given: Inputs = {
            name: setting.normal(rows, wide)[:, :width].detach() for name in names[: 1 + added]
        }
        given |= {name: setting.normal(width) for name in names[1 + added :]}
        if trained:
            given = {name: value.requires_grad_() for name, value in given.items()}
            given[GRADIENT] = setting.normal(rows, width)
        return given

    def ours(given: Inputs) -> Any:
        arguments = [given[name] for name in names]

        def call() -> tuple[Tensor, ...]:
            out = getattr(norms, kind)(*arguments, eps=EPS, implementation=setting.kernel)
            return (out[1], out[0]) if added else (out,)

        return call

    def composed(given: Inputs) -> tuple[Tensor, ...]:
        total = given["x"] + given["residual"] if added else given["x"]
        return (_torch_norm(total, given, centred), *([total] if added else []))

    def definition(*given: Tensor) -> tuple[Tensor, ...]:
        return composed(dict(zip(names, given, strict=True)))

    element = 2 * rows * width
    passes = 2 + 2 * added + 3 * trained
    sliced = f" of {wide}" if wide != width else ""
    mode = " train" if trained else ""
    return Case(
        family=FAMILY,
        name=f"{kind} {rows}x{width}{sliced}{mode}",
        inputs=inputs,
        reference=composed,
        contenders=(
            Contender(OURS, ours),
            Contender("torch", lambda given: lambda: composed(given)),
            setting.compiled(
                "torch.compile",
                definition,
                lambda fast, given: lambda: fast(*(given[name] for name in names)),
            ),
            _liger(setting, kind, names),
        ),
        min_bytes=element * passes,
        wanted=tuple(names) if trained else (),
        priority=0 if kind == "rms_norm" and rows == 16384 else 1 + (width != wide),
        targets=("memory",),
    )


def _torch_norm(x: Tensor, given: Inputs, centred: bool) -> Tensor:
    if centred:
        return F.layer_norm(x, x.shape[-1:], given["weight"], given["bias"], EPS)
    return F.rms_norm(x, x.shape[-1:], given["weight"], EPS)


def _liger(setting: Setting, kind: str, names: list[str]) -> Contender:
    missing = setting.needs("liger_kernel")
    if kind == "add_layer_norm":
        missing = missing or "Liger-Kernel has no such operation"

    def build(given: Inputs) -> Any:
        from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        arguments = [given[name] for name in names]
        if kind == "rms_norm":
            return lambda: (LigerRMSNormFunction.apply(*arguments, EPS, 0.0, "llama", False),)
        if kind == "layer_norm":
            return lambda: (LigerLayerNormFunction.apply(*arguments, EPS),)
        return lambda: LigerFusedAddRMSNormFunction.apply(*arguments, EPS, 0.0, "llama", False)

    return Contender("liger", build, missing)
