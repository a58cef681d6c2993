"""Linear maps by the leading part of a larger weight, with activation and gate in the same pass.

A network of a supernet uses the first n outputs and the first k inputs of a maximal weight. It is
read where it lies, by its row stride; the gradient is that of the maximal weight, zero elsewhere.

Shapes: M rows, k <= K inputs, n <= N outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nas_kernels.dispatch import AUTO, use_triton, wants_gradient
from nas_kernels.elastic_linear.ref import GATED, PLAIN, elastic_linear_ref
from nas_kernels.launching import tf32_allowed
from nas_kernels.precision import product_dtype

__all__ = [
    "GATED",
    "PLAIN",
    "elastic_linear",
    "elastic_linear_ref",
    "grouped_elastic_linear",
    "why_not",
]

INNER = {"swiglu": "silu", "geglu": "gelu", "reglu": "relu"}
"""What a gate is activated by."""


def elastic_linear(
    x: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None = None,
    out_features: int | None = None,
    activation: str = "none",
    gate_weight_NK: Tensor | None = None,
    gate_bias_N: Tensor | None = None,
    implementation: str = AUTO,
) -> Tensor:
    """Return `a(x W[:n, :k]^T + b[:n])`, or `a(x V[:n, :k]^T + c[:n]) * (x W[:n, :k]^T + b[:n])`.

    Products are taken in autocast's dtype where that is on, else in the widest that is given, and
    added up in fp32; a wider weight is rounded as it is read. That is also the dtype of the result.
    In fp32 they are exact unless `torch.set_float32_matmul_precision` allows TF32.

    Args:
        x: (..., k), any rows with one stride; others are copied.
        weight_NK: W, maximal or a view of it, with unit stride along K.
        bias_N: b.
        out_features: n; all N rows of the weight where it is None.
        activation: a; ``"none"``, ``"gelu"`` (tanh form), ``"relu"``, ``"relu2"`` or ``"silu"``,
            and with a gate ``"swiglu"``, ``"geglu"`` or ``"reglu"``.
        gate_weight_NK: V, of the shape of W.
        gate_bias_N: c.
        implementation: ``"auto"``, ``"reference"`` or ``"triton"``. ``"auto"`` leaves to cuBLAS a
            map without activation, as it takes strided views as they are, and fp32 where TF32 is
            not allowed: there tensor cores, which the kernel is made for, have no part in it.

    Raises:
        ValueError: when sizes or the activation do not fit.

    Source: Devvrit et al. 2023, "MatFormer", section 3.1 (nested widths); Shazeer 2020, "GLU
    Variants Improve Transformer", equations 5-6.
    """
    given = (weight_NK, bias_N, gate_weight_NK, gate_bias_N)
    n = weight_NK.shape[0] if out_features is None else out_features
    return _run([x], (n,), activation, *given, implementation)[0]


def grouped_elastic_linear(
    xs: Sequence[Tensor],
    weight_NK: Tensor,
    bias_N: Tensor | None = None,
    *,
    out_features: Sequence[int],
    activation: str = "none",
    gate_weight_NK: Tensor | None = None,
    gate_bias_N: Tensor | None = None,
    implementation: str = AUTO,
) -> list[Tensor]:
    """Compute `elastic_linear` for several networks that share the weight, in one launch.

    Args:
        xs: the input of every network, (..., k) with its own k; all of one dtype.
        weight_NK: shared, as are all that follow; see `elastic_linear`.
        bias_N: see there.
        out_features: n of every network.
        activation: see there.
        gate_weight_NK: see there.
        gate_bias_N: see there.
        implementation: see there.

    Returns:
        (..., n) of every network.

    Raises:
        ValueError: when sizes or the activation do not fit.
    """
    given = (weight_NK, bias_N, gate_weight_NK, gate_bias_N)
    return _run(list(xs), tuple(out_features), activation, *given, implementation)


def _run(
    xs: list[Tensor],
    out_features: tuple[int, ...],
    activation: str,
    weight: Tensor,
    bias: Tensor | None,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    implementation: str,
) -> list[Tensor]:
    _check(xs, out_features, activation, weight, bias, gate_weight, gate_bias)
    if not xs:
        return []
    dtype, plain = product_dtype(xs[0], weight), activation == "none" and len(xs) == 1
    tensors = (*xs, weight, bias, gate_weight, gate_bias)
    if not use_triton(
        "elastic_linear",
        *tensors,
        implementation=implementation,
        prefer_reference=why_not(xs[0], weight, plain),
    ):
        return [
            elastic_linear_ref(x, weight, bias, n, activation, gate_weight, gate_bias)
            for x, n in zip(xs, out_features, strict=True)
        ]
    from nas_kernels.elastic_linear.function import ElasticLinear, Settings

    keep, inner = wants_gradient(*tensors), INNER.get(activation, activation)
    settings = Settings(out_features, inner, dtype, keep)
    return list(ElasticLinear.apply(settings, weight, gate_weight, bias, gate_bias, *xs))


def why_not(x: Tensor, weight_NK: Tensor, plain: bool = False) -> str | None:
    """Return why `use_triton` should prefer PyTorch for a map; None where nothing says so.

    Args:
        x: its input.
        weight_NK: its weight.
        plain: without activation, and alone.
    """
    dtype = product_dtype(x, weight_NK)
    if dtype == torch.float32 and not tf32_allowed():
        return "cuBLAS multiplies fp32 where TF32 is not allowed"
    if plain and dtype == x.dtype == weight_NK.dtype:
        return "cuBLAS multiplies strided views as they are"
    return None


def _check(
    xs: list[Tensor],
    out_features: tuple[int, ...],
    activation: str,
    weight: Tensor,
    bias: Tensor | None,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
) -> None:
    """Raise where the arguments do not fit together."""
    allowed = PLAIN if gate_weight is None else GATED
    if activation not in allowed:
        kind = "without a gate" if gate_weight is None else "with a gate"
        choices = ", ".join(allowed)
        raise ValueError(f"activation={activation!r} is unknown {kind}; choose one of {choices}")
    if gate_weight is not None and gate_weight.shape != weight.shape:
        raise ValueError(
            f"gate_weight has shape {tuple(gate_weight.shape)}, but weight has "
            f"{tuple(weight.shape)}; give the same"
        )
    if gate_weight is None and gate_bias is not None:
        raise ValueError("gate_bias was given without gate_weight; give both or none")
    for name, vector in (("bias", bias), ("gate_bias", gate_bias)):
        if vector is not None and vector.shape != weight.shape[:1]:
            raise ValueError(
                f"{name} has shape {tuple(vector.shape)}; give {(weight.shape[0],)}, one for each "
                "row of the weight"
            )
    if len(xs) != len(out_features):
        raise ValueError(f"{len(xs)} inputs and {len(out_features)} out_features; give as many")
    for x, n in zip(xs, out_features, strict=True):
        if x.shape[-1] > weight.shape[1] or not 0 <= n <= weight.shape[0]:
            raise ValueError(
                f"{x.shape[-1]} inputs and {n} outputs are no part of a weight of shape "
                f"{tuple(weight.shape)}"
            )
        if x.dtype != xs[0].dtype:
            raise ValueError(f"inputs are of {xs[0].dtype} and of {x.dtype}; give one dtype")
