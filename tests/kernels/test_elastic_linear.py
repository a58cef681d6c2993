from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from nas_kernels.dispatch import num_multiprocessors, triton_available
from nas_kernels.elastic_linear import (
    GATED,
    PLAIN,
    elastic_linear,
    elastic_linear_ref,
    grouped_elastic_linear,
)
from nas_kernels.elastic_linear.blocks import num_parts, weight_tiles
from tests.kernels.comparison import (
    DEVICE,
    assert_close,
    compare_with_float64,
    draw,
    far_apart,
    in_wider_rows,
    misaligned,
)

triton_only = pytest.mark.skipif(not triton_available(), reason="triton is not installed")
IMPLEMENTATIONS = ["reference", pytest.param("triton", marks=triton_only)]
MAXIMAL = (70, 50)


def maximal(gated: bool, dtype: torch.dtype = torch.float32) -> list[Tensor | None]:
    """Return weight, bias, gate weight and gate bias; the weights lie in still wider rows."""
    given: list[Tensor | None] = []
    for seed in (2, 4) if gated else (2,):
        weight = in_wider_rows(misaligned(draw(*MAXIMAL, seed=seed, dtype=dtype) * 0.2))
        given += [weight, draw(MAXIMAL[0], seed=seed + 1, dtype=dtype)]
    return [None if t is None else t.requires_grad_() for t in given + [None] * (4 - len(given))]


def compare(
    run: Callable[..., list[Tensor]],
    xs: list[Tensor],
    out_features: list[int],
    activation: str,
    weights: list[Tensor | None],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Compare results and every gradient with the definition in float64."""
    num = len(xs)

    def ours(*given: Any) -> list[Tensor]:
        results = run(list(given[:num]), out_features, *given[num:])
        assert all(result.dtype == dtype for result in results)
        return results

    def exact(*given: Any) -> list[Tensor]:
        weight, bias, gate_weight, gate_bias = given[num:]
        return [
            elastic_linear_ref(x, weight, bias, n, activation, gate_weight, gate_bias)
            for x, n in zip(given[:num], out_features, strict=True)
        ]

    bound = 1e-2 if dtype == torch.bfloat16 else None
    compare_with_float64(ours, exact, [*xs, *weights], bound)


def alone(activation: str, implementation: str) -> Callable[..., list[Tensor]]:
    def run(xs: list[Tensor], out_features: list[int], *weights: Tensor | None) -> list[Tensor]:
        w, b, v, c = weights
        return [
            elastic_linear(x, w, b, n, activation, v, c, implementation)
            for x, n in zip(xs, out_features, strict=True)
        ]

    return run


def grouped(activation: str, implementation: str) -> Callable[..., list[Tensor]]:
    def run(xs: list[Tensor], out_features: list[int], *weights: Tensor | None) -> list[Tensor]:
        w, b, v, c = weights
        return grouped_elastic_linear(
            xs, w, b, out_features=out_features, activation=activation, gate_weight_NK=v,
            gate_bias_N=c, implementation=implementation,
        )  # fmt: skip

    return run


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("activation", [*PLAIN, *GATED])
def test_every_activation(activation: str, implementation: str) -> None:
    # Far from zero too, where polynomials and exponentials overflow.
    x = in_wider_rows(misaligned(draw(5, 7, 37) * 4)).requires_grad_()
    weights = maximal(activation in GATED)
    compare(alone(activation, implementation), [x], [45], activation, weights)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 50, 70), (33, 32, 64), (3, 49, 2), (2, 1, 69)])
@pytest.mark.parametrize("activation", ["none", "swiglu"])
def test_every_size(activation: str, sizes: tuple[int, int, int], implementation: str) -> None:
    rows, k, n = sizes
    x = draw(rows, k).requires_grad_()
    compare(alone(activation, implementation), [x], [n], activation, maximal(activation in GATED))


@triton_only
@pytest.mark.parametrize("activation", ["none", "silu", "geglu"])
def test_bf16(activation: str) -> None:
    x = draw(9, 40, dtype=torch.bfloat16).requires_grad_()
    weights = maximal(activation in GATED, torch.bfloat16)
    run = alone(activation, "triton")
    compare(run, [x], [33], activation, weights, torch.bfloat16)


@triton_only
def test_autocast_reads_wide_weights_as_they_are() -> None:
    x = draw(9, 40).requires_grad_()
    weights = maximal(True)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        compare(alone("swiglu", "triton"), [x], [33], "swiglu", weights, torch.bfloat16)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("activation", ["none", "relu2", "swiglu"])
def test_networks_of_a_group(activation: str, implementation: str) -> None:
    xs = [
        draw(4, 10, 50).requires_grad_(),
        in_wider_rows(draw(17, 16, seed=1)).requires_grad_(),
        misaligned(draw(1, 33, seed=2)).requires_grad_(),
    ]
    weights = maximal(activation in GATED)
    compare(grouped(activation, implementation), xs, [70, 16, 33], activation, weights)


@triton_only
@pytest.mark.parametrize("activation", ["relu", "reglu"])
def test_many_rows_of_a_small_weight_are_split(activation: str) -> None:
    given = [draw(20, 12, seed=seed).requires_grad_() for seed in (1, 2)]
    weights = [given[0], None, given[1] if activation in GATED else None, None]
    xs = [draw(270, 12).requires_grad_(), draw(5, 7, seed=3).requires_grad_()]
    blocks = weight_tiles(torch.float32, False, torch.float32)[0]
    assert num_parts(1, 270, blocks, num_multiprocessors(DEVICE)) >= 2
    compare(alone(activation, "triton"), xs[:1], [20], activation, weights)
    compare(grouped(activation, "triton"), xs, [17, 20], activation, weights)


@triton_only
def test_aligned_groups() -> None:
    xs = [draw(16, 48).requires_grad_(), draw(16, 32, seed=1).requires_grad_()]
    compare(grouped("gelu", "triton"), xs, [64, 32], "gelu", maximal(False))


@triton_only
def test_a_network_that_nothing_uses_has_no_gradient() -> None:
    xs = [draw(3, 20).requires_grad_(), draw(3, 30, seed=1).requires_grad_()]
    weight, *_ = maximal(False)
    assert weight is not None
    results = grouped_elastic_linear(
        xs, weight, out_features=[40, 50], activation="silu", implementation="triton"
    )
    gradients = torch.autograd.grad(results[1].sum(), [*xs, weight], allow_unused=True)
    assert gradients[0] is None
    exact = [xs[1].double(), weight.double()]
    right = torch.autograd.grad(
        elastic_linear_ref(*exact, out_features=50, activation="silu").sum(), [xs[1], weight]
    )
    for actual, expected in zip(gradients[1:], right, strict=True):
        assert_close(actual, expected, 5e-6)


@triton_only
def test_without_gradients_nothing_is_kept() -> None:
    weights = maximal(True)
    x = draw(3, 20)
    with torch.no_grad():
        w, b, v, c = weights
        out = elastic_linear(x, w, b, 30, "reglu", v, c, "triton")
    assert not out.requires_grad
    assert_close(out, elastic_linear_ref(x, w, b, 30, "reglu", v, c))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nothing_stays_nothing(implementation: str) -> None:
    weight = draw(6, 5).requires_grad_()
    x = draw(2, 0, 4).requires_grad_()
    out = elastic_linear(
        x, weight, out_features=3, activation="silu", implementation=implementation
    )
    assert out.shape == (2, 0, 3)
    out.sum().backward()
    assert weight.grad is not None
    assert weight.grad.count_nonzero() == 0
    both = grouped_elastic_linear(
        [x, draw(2, 5)], weight, out_features=[0, 6], implementation=implementation
    )
    assert_close(both[1], draw(2, 5).double() @ weight.double().T)
    assert grouped_elastic_linear([], weight, out_features=[], implementation=implementation) == []


@triton_only
def test_rows_may_be_further_apart_than_32_bits_count() -> None:
    far = far_apart(draw(2, 8))
    near, w = far.clone(), draw(2, 8, seed=1).half()
    for x, weight in ((far, w), (w, far)):
        twins = (near, w) if x is far else (w, near)
        right = elastic_linear_ref(*(t.double() for t in twins), activation="silu")
        out = elastic_linear(x, weight, activation="silu", implementation="triton")
        assert_close(out, right, 2e-3)


@triton_only
def test_nan_is_not_hidden() -> None:
    x, weight = draw(2, 4), draw(3, 4, seed=1)
    x[1, 2] = float("nan")
    for activation in PLAIN:
        out = elastic_linear(x, weight, activation=activation, implementation="triton")
        assert out[1].isnan().all()
        assert out[0].isfinite().all()


def test_what_does_not_fit_is_refused() -> None:
    x, weight = draw(2, 4), draw(3, 4)
    with pytest.raises(ValueError, match="activation='swiglu' is unknown without a gate"):
        elastic_linear(x, weight, activation="swiglu")
    with pytest.raises(ValueError, match="activation='silu' is unknown with a gate"):
        elastic_linear(x, weight, activation="silu", gate_weight_NK=weight)
    with pytest.raises(ValueError, match="4 inputs and 5 outputs are no part of a weight"):
        elastic_linear(x, weight, out_features=5)
    with pytest.raises(ValueError, match=r"bias has shape \(2,\); give \(3,\)"):
        elastic_linear(x, weight, draw(2))
    with pytest.raises(ValueError, match="gate_bias was given without gate_weight"):
        elastic_linear(x, weight, gate_bias_N=draw(3))
    with pytest.raises(ValueError, match="1 inputs and 2 out_features"):
        grouped_elastic_linear([x], weight, out_features=[1, 2])
