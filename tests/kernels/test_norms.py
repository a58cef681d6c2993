from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nas_kernels.dispatch import triton_available
from nas_kernels.norms import (
    WIDEST,
    add_layer_norm,
    add_rms_norm,
    layer_norm,
    layer_norm_ref,
    rms_norm,
    rms_norm_ref,
)
from tests.kernels.comparison import assert_close, draw, far_apart, in_wider_rows, misaligned

triton_only = pytest.mark.skipif(not triton_available(), reason="triton is not installed")
IMPLEMENTATIONS = ["reference", pytest.param("triton", marks=triton_only)]
SHAPES = [(1, 1), (1, 7), (5, 16), (37, 100), (2, 3, 130), (3, 2100)]
DTYPES = [torch.float32, torch.bfloat16]


def eps_of(x: Tensor) -> float:
    """Return eps; one feature has no gradient but through it, and large values hide even that."""
    return 10.0 if x.shape[-1] == 1 else 1e-5


def run(kind: str, given: list[Tensor], implementation: str) -> tuple[Tensor, ...]:
    """Call one of the four with x, residual, weight and bias."""
    x, residual, weight, bias = given
    eps = eps_of(x)
    if kind == "rms":
        return (rms_norm(x, weight, eps, implementation),)
    if kind == "layer":
        return (layer_norm(x, weight, bias, eps, implementation),)
    if kind == "add_rms":
        return add_rms_norm(x, residual, weight, eps, implementation)
    return add_layer_norm(x, residual, weight, bias, eps, implementation)


def exact(kind: str, given: list[Tensor], total: Tensor | None) -> tuple[Tensor, ...]:
    """Return the definition's results; what was rounded in between is rounded here too."""
    x, residual, weight, bias = given
    added = x + residual if total is not None else x
    if total is not None:
        added = added + (total.double() - added).detach()
    normed = (
        rms_norm_ref(added, weight, eps_of(x))
        if "rms" in kind
        else layer_norm_ref(added, weight, bias, eps_of(x))
    )
    return (normed,) if total is None else (added, normed)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["rms", "layer", "add_rms", "add_layer"])
def test_results_and_gradients(
    kind: str, shape: tuple[int, ...], dtype: torch.dtype, implementation: str
) -> None:
    width = shape[-1]
    given = [
        # Leading features of wider rows, and a start that no vector load could use.
        in_wider_rows(misaligned(draw(*shape, dtype=dtype))),
        draw(*shape, seed=1, dtype=dtype),
        # One that serves wider rows too, and one that does not.
        draw(width + 5, seed=2) + 1,
        misaligned(draw(width, seed=3)),
    ]
    given = [tensor.requires_grad_() for tensor in given]
    results = run(kind, given, implementation)
    total = results[0] if kind.startswith("add") else None
    wide = [tensor.detach().double().requires_grad_() for tensor in given]
    expected = exact(kind, wide, None if total is None else total.detach())
    for actual, right in zip(results, expected, strict=True):
        assert actual.dtype == dtype
        assert_close(actual, right)
    weights = [draw(*shape, seed=9 + i).to(dtype) for i in range(len(results))]
    loss = sum((r * w).sum() for r, w in zip(results, weights, strict=True))
    right_loss = sum((r * w.double()).sum() for r, w in zip(expected, weights, strict=True))
    used = [i for i, name in enumerate(("", "add", "", "layer")) if name in kind]
    gradients = torch.autograd.grad(loss, [given[i] for i in used])
    for i, actual, right in zip(
        used, gradients, torch.autograd.grad(right_loss, [wide[i] for i in used]), strict=True
    ):
        assert (actual.dtype, actual.shape) == (given[i].dtype, given[i].shape)
        assert_close(actual, right, 1e-2 if dtype == torch.bfloat16 else None)
    assert gradients[used.index(2)][width:].count_nonzero() == 0


@triton_only
@pytest.mark.parametrize("part", [0, 1])
def test_a_result_that_nothing_uses_has_no_gradient(part: int) -> None:
    given = [draw(4, 20, seed=i).requires_grad_() for i in range(2)]
    weight = draw(20, seed=3).requires_grad_()

    def gradients(implementation: str) -> tuple[Tensor, ...]:
        out = add_rms_norm(*given, weight, implementation=implementation)[part]
        return torch.autograd.grad(
            (out * draw(4, 20, seed=5)).sum(), [*given, weight], materialize_grads=True
        )

    for actual, right in zip(gradients("triton"), gradients("reference"), strict=True):
        assert_close(actual, right)


@triton_only
def test_gradients_that_nobody_wants_are_not_computed() -> None:
    x, weight = draw(4, 20), draw(20, seed=1)
    assert not rms_norm(x, weight, implementation="triton").requires_grad
    out = rms_norm(x.requires_grad_(), weight, implementation="triton")
    out.sum().backward()  # a gradient of strides zero
    (right,) = torch.autograd.grad(rms_norm_ref(x.double(), weight.double()).sum(), x)
    assert_close(x.grad, right)


@triton_only
def test_gradients_are_the_same_every_time() -> None:
    x, weight = draw(67, 40), draw(40, seed=1).requires_grad_()

    def gradient() -> Tensor:
        out = rms_norm(x, weight, implementation="triton")
        return torch.autograd.grad((out * draw(67, 40, seed=2)).sum(), weight)[0]

    assert torch.equal(gradient(), gradient())


@triton_only
def test_rows_that_are_no_view_are_copied() -> None:
    x, weight = draw(30, 7).T, draw(30, seed=1)
    assert_close(layer_norm(x, weight, implementation="triton"), layer_norm_ref(x, weight))
    x = draw(3, 4, 30).transpose(0, 1)
    assert_close(rms_norm(x, weight, implementation="triton"), rms_norm_ref(x, weight))


@triton_only
def test_rows_may_be_further_apart_than_32_bits_count() -> None:
    x = far_apart(draw(2, 8))
    weight = draw(8, seed=1)
    assert_close(rms_norm(x, weight, implementation="triton"), rms_norm_ref(x, weight), 1e-3)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nothing_stays_nothing(implementation: str) -> None:
    x, weight = draw(2, 0, 6).requires_grad_(), draw(6).requires_grad_()
    total, normed = add_rms_norm(x, x, weight, implementation=implementation)
    assert total.shape == normed.shape == (2, 0, 6)
    normed.sum().backward()
    assert weight.grad is not None
    assert weight.grad.count_nonzero() == 0


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_large_and_constant_rows(implementation: str) -> None:
    x, weight = torch.full_like(draw(2, 24), 3e18), torch.ones_like(draw(24))
    x[1] = 0
    bias = draw(24)
    assert_close(layer_norm(x, weight, bias, 1e-5, implementation), bias.expand(2, 24))
    assert_close(rms_norm(x[1:], weight, 1e-5, implementation), torch.zeros_like(x[1:]))


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"weight has shape \(3,\), but rows have 4 features"):
        rms_norm(draw(2, 4), draw(3))
    with pytest.raises(ValueError, match=r"bias has shape \(1, 4\)"):
        layer_norm(draw(2, 4), draw(4), draw(1, 4))
    with pytest.raises(ValueError, match=r"residual has shape \(4,\), but x has \(2, 4\)"):
        add_rms_norm(draw(2, 4), draw(4), draw(4))


@triton_only
def test_what_no_program_can_hold_is_left_to_pytorch() -> None:
    with pytest.raises(RuntimeError, match=f"above {WIDEST}"):
        rms_norm(draw(1, WIDEST + 1), draw(WIDEST + 1), implementation="triton")
