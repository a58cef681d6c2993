"""Linear maps by a part of a larger weight, against cuBLAS on that part copied out.

Shapes: M rows; n of N outputs, k of K inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from nas_kernels.elastic_linear import elastic_linear, elastic_linear_ref, grouped_elastic_linear
from tests.benchmarks._kernel_cases.case import GRADIENT, OURS, Case, Contender, Inputs, Setting

FAMILY = "elastic_linear"
CUBLAS = "cuBLAS, contiguous"
Size = tuple[int, int, int, int]
SIZES: list[Size] = [(3072, 3072, 4096, 4096), (6144, 6144, 8192, 8192), (7168, 4096, 14336, 4096)]
"""n, k, N, K: two square weights, and half of the FFN of a Llama of 8 billion parameters."""
GROUP = [14336, 7168, 3584, 1792]


def cases(setting: Setting) -> list[Case]:
    """Return plain maps, fused FFNs, and a group of networks."""
    sizes: list[Size] = [(24, 32, 40, 48)] if setting.quick else SIZES
    rows = [1, 24] if setting.quick else [512, 16, 1, 4096]
    found = [_map(setting, m, size, "none", False) for size in sizes for m in rows]
    found += [_map(setting, m, sizes[-1], "swiglu", False) for m in rows]
    found += [_map(setting, m, sizes[-1], "gelu", False) for m in rows[:1]]
    found += [_map(setting, rows[-1], sizes[-1], kind, True) for kind in ("swiglu", "none")]
    return [*found, _group(setting)]


def _map(setting: Setting, m: int, size: Size, activation: str, trained: bool) -> Case:
    n, k, rows, columns = size
    gated = activation in ("swiglu", "geglu")

    def inputs() -> Inputs:
        given: Inputs = {"x": setting.normal(m, k)}
        given["w"] = setting.normal(rows, columns, scale=columns**-0.5)
        if gated:
            given["v"] = setting.normal(rows, columns, scale=columns**-0.5)
        for name in ("w", "v")[: 1 + gated]:
            given[f"{name}_part"] = given[name][:n, :k].clone()
        if trained:
            given = {name: value.requires_grad_() for name, value in given.items()}
            given[GRADIENT] = setting.normal(m, n)
        return given

    def ours(implementation: str) -> Callable[[Inputs], Any]:
        def build(given: Inputs) -> Any:
            gate = given["v"] if gated else None
            return lambda: (
                elastic_linear(
                    given["x"], given["w"], None, n, activation, gate,
                    implementation=implementation,
                ),
            )  # fmt: skip

        return build

    def plain(x: Tensor, w: Tensor, v: Tensor | None) -> tuple[Tensor]:
        return (elastic_linear_ref(x, w, None, n, activation, v),)

    def apart(given: Inputs) -> tuple[Tensor, Tensor, Tensor | None]:
        return given["x"], given["w_part"], given.get("v_part")

    def reference(given: Inputs) -> tuple[Tensor]:
        return plain(given["x"], given["w"], given.get("v"))

    wanted = ("x", "w", "v")[: 2 + gated] if trained else ()
    parts = tuple({"w": "w_part", "v": "v_part"}.get(name, name) for name in wanted)
    weights, factor = 1 + gated, 3 if trained else 1
    contenders = [
        Contender(OURS, ours("auto" if activation == "none" else setting.kernel)),
        Contender(CUBLAS, lambda given: lambda: plain(*apart(given)), wanted=parts),
        Contender("cuBLAS, view", lambda given: lambda: reference(given)),
    ]
    if activation == "none":
        contenders.insert(1, Contender("kernel", ours(setting.kernel)))
    else:
        compiled = setting.compiled(
            "torch.compile", plain, lambda fast, given: lambda: fast(*apart(given)), wanted=parts
        )
        contenders.append(compiled)
    memory = 2 * (m * k + weights * n * k + m * n)
    mode = " train" if trained else ""
    return Case(
        family=FAMILY,
        name=f"{activation} {m}x{k} to {n} of {rows}x{columns}{mode}",
        inputs=inputs,
        reference=reference,
        contenders=tuple(contenders),
        min_bytes=memory * factor,
        flops=2.0 * m * n * k * weights * factor,
        wanted=wanted,
        priority=2 if trained else 0 if m == 512 else 1,
        targets=("elastic",),
    )


def _group(setting: Setting) -> Case:
    """Four nested networks of one sandwich step, in one launch."""
    m, k, widths = (512, 4096, GROUP) if not setting.quick else (20, 32, [48, 24, 16])

    def inputs() -> Inputs:
        given: Inputs = {f"x{i}": setting.normal(m, k) for i in range(len(widths))}
        for name in ("w", "v"):
            given[name] = setting.normal(widths[0], k, scale=k**-0.5)
        return given

    def ours(given: Inputs) -> Any:
        xs = [given[f"x{i}"] for i in range(len(widths))]
        return lambda: grouped_elastic_linear(
            xs, given["w"], out_features=widths, activation="swiglu", gate_weight_NK=given["v"],
            implementation=setting.kernel,
        )  # fmt: skip

    def one_by_one(given: Inputs) -> list[Tensor]:
        def one(i: int, n: int) -> Tensor:
            x, w, v = given[f"x{i}"], given["w"][:n], given["v"][:n]
            return F.silu(F.linear(x, v)) * F.linear(x, w)

        return [one(i, n) for i, n in enumerate(widths)]

    return Case(
        family=FAMILY,
        name=f"swiglu, {len(widths)} networks of {m}x{k} to {max(widths)} at most",
        inputs=inputs,
        reference=one_by_one,
        contenders=(
            Contender(OURS, ours),
            Contender("cuBLAS, one by one", lambda given: lambda: one_by_one(given)),
        ),
        min_bytes=2.0 * (len(widths) * m * k + 2 * widths[0] * k + m * sum(widths)),
        flops=4.0 * m * k * sum(widths),
        priority=1,
    )
