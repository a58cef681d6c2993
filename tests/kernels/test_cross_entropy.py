from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from nas_kernels import cross_entropy
from nas_kernels.cross_entropy import linear_cross_entropy, linear_cross_entropy_ref
from nas_kernels.dispatch import triton_available
from tests.kernels.comparison import (
    DEVICE,
    assert_close,
    draw,
    far_apart,
    in_wider_rows,
    misaligned,
    rms_ratio,
)

triton_only = pytest.mark.skipif(not triton_available(), reason="triton is not installed")
IMPLEMENTATIONS = ["reference", pytest.param("triton", marks=triton_only)]
CLASSES, WIDTH = 150, 20  # three of the blocks that are interpreted


def make_targets(*shape: int, classes: int = CLASSES, ignore: int = -100) -> Tensor:
    targets = torch.randint(classes, shape, generator=torch.Generator().manual_seed(5))
    targets.view(-1)[1::3] = ignore
    return targets.to(DEVICE)


def compare(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    bounds: tuple[float, float] = (3e-6, 5e-6),
    *,
    implementation: str,
    chunk_rows: int | None = None,
    **options: Any,
) -> None:
    """Compare the loss and every gradient with the definition in float64."""
    given = [t.requires_grad_() for t in (x, weight, bias) if t is not None]
    exact = [t.detach().double().requires_grad_() for t in given]
    loss = linear_cross_entropy(
        x, weight, targets, bias, implementation=implementation, chunk_rows=chunk_rows, **options
    )
    right = linear_cross_entropy_ref(
        exact[0], exact[1], targets, exact[2] if bias is not None else None, **options
    )
    assert_close(loss, right, bounds[0])
    # A factor, as gradient scaling has it.
    gradients = torch.autograd.grad(loss * 3.0, given)
    for tensor, found, expected in zip(
        given, gradients, torch.autograd.grad(right * 3.0, exact), strict=True
    ):
        assert found.dtype == tensor.dtype
        assert_close(found, expected, bounds[1])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("chunk_rows", [None, 1, 4, 7])
def test_every_chunk(chunk_rows: int | None, reduction: str, implementation: str) -> None:
    compare(
        draw(2, 5, WIDTH),
        draw(CLASSES, WIDTH, seed=1),
        make_targets(2, 5),
        draw(CLASSES, seed=2),
        implementation=implementation,
        chunk_rows=chunk_rows,
        reduction=reduction,
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("classes", [1, 2, 63, 64, 65, 128])
def test_every_number_of_classes(classes: int, implementation: str) -> None:
    # With one class all gradients are zero.
    compare(
        draw(3, 7),
        draw(classes, 7, seed=1),
        torch.full((3,), classes - 1, device=DEVICE),
        implementation=implementation,
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_part_of_a_maximal_weight(implementation: str) -> None:
    x = in_wider_rows(misaligned(draw(6, WIDTH)))
    weight = in_wider_rows(misaligned(draw(CLASSES, WIDTH + 8, seed=1)))
    targets = make_targets(6, classes=90, ignore=-1)
    bias = draw(CLASSES, seed=2)
    compare(
        x, weight, targets, bias, implementation=implementation, num_classes=90, ignore_index=-1
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bf16_and_autocast(implementation: str) -> None:
    # Of float64's gradients of the same rounded inputs, at logits rounded to bf16.
    bounds = (5e-3, 2e-2)
    x, weight = draw(9, WIDTH, dtype=torch.bfloat16), draw(CLASSES, WIDTH, seed=1)
    half = weight.bfloat16()
    options: dict[str, Any] = {"implementation": implementation, "chunk_rows": 4}
    compare(x.clone(), half, make_targets(9), None, bounds, **options)
    compare(x.clone(), half.float(), make_targets(9), None, (3e-6, 5e-3), **options)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        compare(x.float(), half.float(), make_targets(9), None, bounds, **options)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_large_logits(implementation: str) -> None:
    x, weight = draw(4, WIDTH) * 1e3, draw(CLASSES, WIDTH, seed=1) * 1e3
    targets = make_targets(4)
    compare(x, weight, targets, implementation=implementation)
    bias = torch.full((CLASSES,), -torch.inf, device=DEVICE)
    bias[: CLASSES // 2] = 0  # the last of all blocks has no finite logit
    targets = targets % (CLASSES // 2)
    loss = linear_cross_entropy(
        draw(4, WIDTH), weight, targets, bias, implementation=implementation
    )
    exact = [t.double() for t in (draw(4, WIDTH), weight, bias)]
    assert_close(loss, linear_cross_entropy_ref(exact[0], exact[1], targets, exact[2]))


class Largest(TorchFunctionMode):
    """Remembers the largest tensor that any function returned."""

    numel = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        # Triton's interpreter looks at storages as bytes.
        if isinstance(out, Tensor) and out.is_floating_point():
            self.numel = max(self.numel, out.numel())
        return out


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_tensor_is_larger_than_a_chunk_of_logits(implementation: str) -> None:
    rows, classes, width, chunk = 12, 304, 4, 5
    x, weight = draw(rows, width).requires_grad_(), draw(classes, width, seed=1).requires_grad_()
    targets = make_targets(rows, classes=classes)
    with Largest() as largest:
        loss = linear_cross_entropy(
            x, weight, targets, chunk_rows=chunk, implementation=implementation
        )
        loss.backward()
    assert largest.numel == chunk * classes
    with Largest() as largest:
        linear_cross_entropy_ref(x, weight, targets)
    assert largest.numel == rows * classes


def test_the_usual_chunk_is_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 4 * 160 * 3)
    x, weight = draw(10, 2), draw(160, 2)
    with torch.no_grad(), Largest() as largest:
        linear_cross_entropy(x, weight, make_targets(10))
    assert largest.numel == 3 * 160


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_only_what_is_wanted_is_computed(implementation: str) -> None:
    x, weight, targets = draw(4, 5), draw(30, 5), make_targets(4, classes=30)
    assert not linear_cross_entropy(x, weight, targets, implementation=implementation).requires_grad
    for wanted in (x, weight):
        x.requires_grad_(wanted is x), weight.requires_grad_(wanted is weight)
        (found,) = torch.autograd.grad(
            linear_cross_entropy(x, weight, targets, implementation=implementation), wanted
        )
        right = linear_cross_entropy_ref(x, weight, targets)
        assert_close(found, torch.autograd.grad(right, wanted)[0].double(), 5e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_of_which_none_counts(implementation: str) -> None:
    x, weight = draw(4, 5).requires_grad_(), draw(30, 5)
    targets = torch.full((4,), -100, device=DEVICE)
    loss = linear_cross_entropy(x, weight, targets, implementation=implementation)
    assert loss.isnan()  # as PyTorch has it
    (dx,) = torch.autograd.grad(loss, x)
    assert dx.count_nonzero() == 0
    loss = linear_cross_entropy(x, weight, targets, reduction="sum", implementation=implementation)
    assert loss == 0
    loss = linear_cross_entropy(
        x[:0], weight, targets[:0], reduction="sum", implementation=implementation
    )
    assert loss == 0
    assert torch.autograd.grad(loss, x)[0].count_nonzero() == 0


@triton_only
def test_a_target_that_is_no_class_gives_nan() -> None:
    for target in (-1, 30, 2**40):
        targets = torch.tensor([0, target], device=DEVICE)
        assert linear_cross_entropy(
            draw(2, 5), draw(30, 5), targets, implementation="triton"
        ).isnan()


@triton_only
def test_logits_may_be_further_apart_than_32_bits_count() -> None:
    from nas_kernels.cross_entropy.triton_kernel import cross_entropy_

    logits, targets = far_apart(draw(2, 40)), torch.tensor([3, 4], device=DEVICE)
    right = torch.nn.functional.cross_entropy(logits.double(), targets, reduction="none")
    expected = logits.double().softmax(dim=1)
    expected[[0, 1], [3, 4]] -= 1
    losses = torch.empty(2, device=DEVICE)
    cross_entropy_(logits, 40, targets, losses, -100, True)
    assert_close(losses, right)
    assert rms_ratio(logits, expected) < 1e-3


def test_gradients_of_the_definition_in_float64() -> None:
    x, weight = draw(3, 4, dtype=torch.float64), draw(7, 4, seed=1, dtype=torch.float64)
    compare(x, weight, make_targets(3, classes=7), None, (1e-12, 1e-12), implementation="reference")


def test_what_does_not_fit_is_refused() -> None:
    x, weight, targets = draw(3, 4), draw(7, 4), make_targets(3, classes=7)
    with pytest.raises(ValueError, match=r"targets have shape \(2,\), but x has \(3, 4\)"):
        linear_cross_entropy(x, weight, targets[:2])
    with pytest.raises(ValueError, match=r"targets are torch.int32; give torch.int64"):
        linear_cross_entropy(x, weight, targets.int())
    with pytest.raises(ValueError, match="4 inputs and 8 classes are no part of a weight"):
        linear_cross_entropy(x, weight, targets, num_classes=8)
    with pytest.raises(ValueError, match=r"bias has shape \(4,\); give \(7,\)"):
        linear_cross_entropy(x, weight, targets, draw(4))
    with pytest.raises(ValueError, match="reduction='none' is unknown; choose mean or sum"):
        linear_cross_entropy(x, weight, targets, reduction="none")
    with pytest.raises(ValueError, match="chunk_rows=0 is not positive"):
        linear_cross_entropy(x, weight, targets, chunk_rows=0)


def test_columns_beyond_the_classes_are_not_read_by_bf16_products() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 16, generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(50, 16, generator=generator).bfloat16().requires_grad_()
    targets = torch.randint(50, (40,), generator=generator)
    linear_cross_entropy(x, weight, targets).backward()
    for tensor in (x, weight):
        assert tensor.grad is not None and tensor.grad.isfinite().all()
