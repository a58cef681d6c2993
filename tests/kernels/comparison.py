"""How results of kernels are compared: root mean square ratio to float64."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""Where kernels are tested: on a GPU, or in the interpreter."""
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
"""RMS ratio that an output of this dtype may differ by from float64 on the same inputs.

Triton's interpreter cuts off bits where a GPU rounds: one number may be off by 2^-7 in bf16.
"""


def rms_ratio(actual: Tensor, expected: Tensor) -> float:
    """Return the root mean square of the difference over that of `expected`.

    Of zeros and of empty tensors it is that of the difference alone: 0 where they agree. NaN in
    `actual` gives NaN, which fails every comparison with a bound.
    """
    difference, right = (actual.double() - expected.double()), expected.double()
    if difference.numel() == 0:
        return 0.0
    size = right.square().mean().sqrt().item()
    return difference.square().mean().sqrt().item() / (size or 1.0)


def assert_close(actual: Tensor, expected: Tensor, bound: float | None = None) -> None:
    """Compare shape and values; the bound is that of `actual`'s dtype unless given."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    bound = TOLERANCE[actual.dtype] if bound is None else bound
    ratio = rms_ratio(actual, expected)
    assert ratio <= bound, f"RMS ratio {ratio:.2e} is above {bound:.0e}"


def wide(inputs: Sequence[Any]) -> list[Any]:
    """Return the same values in float64, without a history; what is no tensor stays as it is."""
    return [x.detach().double() if _floating(x) else x for x in inputs]


def gradients(results: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the gradients of a random sum of all results; zeros where there is none."""
    pairs = enumerate(results)
    loss = sum((x * draw(*x.shape, seed=100 + i).to(x)).sum() for i, x in pairs if x.requires_grad)
    return torch.autograd.grad(loss, inputs, materialize_grads=True)


def compare_with_float64(
    run: Callable[..., Any], exact: Callable[..., Any], inputs: Sequence[Any], bound: float | None
) -> None:
    """Compare results and the gradients of all floating inputs with those of `exact` in float64.

    Args:
        run: returns a tensor or several.
        exact: the same from wider inputs.
        inputs: those that are no floating tensors are handed on as they are.
        bound: RMS ratio; twice as much for gradients. That of the dtype where it is None.
    """
    leaves = [x.detach().requires_grad_() if _floating(x) else x for x in inputs]
    twins = [x.requires_grad_() if _floating(x) else x for x in wide(inputs)]
    results, right = (
        (found,) if isinstance(found, Tensor) else tuple(found)
        for found in (run(*leaves), exact(*twins))
    )  # fmt: skip
    for result, expected in zip(results, right, strict=True):
        assert_close(result, expected, bound)
    if not any(result.requires_grad for result in results):
        return
    tensors, exact_ones = ([x for x in found if _floating(x)] for found in (leaves, twins))
    for x, grad, expected in zip(
        tensors, gradients(results, tensors), gradients(right, exact_ones), strict=True
    ):
        assert grad.dtype == x.dtype
        assert_close(grad, expected, 2 * (TOLERANCE[x.dtype] if bound is None else bound))


def _floating(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return normal numbers, on `DEVICE`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def misaligned(tensor: Tensor) -> Tensor:
    """Return the same values in memory that starts one element after an allocation."""
    flat = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
    out = flat[1:].view(tensor.shape)
    out.copy_(tensor)
    return out


def in_wider_rows(tensor: Tensor, extra: int = 3) -> Tensor:
    """Return the same values as the leading columns of rows that go on with NaN."""
    wide = tensor.new_full((*tensor.shape[:-1], tensor.shape[-1] + extra), float("nan"))
    wide[..., : tensor.shape[-1]] = tensor
    return wide[..., : tensor.shape[-1]]


def far_apart(
    x: Tensor, axis: int = -2, apart: int = 2**31 + 5, dtype: torch.dtype = torch.float16
) -> Tensor:
    """Return the same values, those along an axis further apart than 32 bits count bytes.

    Args:
        x: one that is small.
        axis: of those that are moved apart.
        apart: elements.
        dtype: of the result.
    """
    near = x.select(axis, 0)
    strides = list(torch.zeros(near.shape).stride())
    strides.insert(axis % x.ndim, apart)
    size = (x.shape[axis] - 1) * apart + near.numel()
    if DEVICE.type == "cuda":
        memory = torch.zeros(size, dtype=dtype, device=DEVICE)
    else:
        # Pages that nothing touches take no memory.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        untouched = mmap.mmap(-1, size * dtype.itemsize, flags=flags)
        memory = torch.frombuffer(untouched, dtype=dtype)
    return memory.as_strided(x.shape, strides).copy_(x)
