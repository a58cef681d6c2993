from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nas_kernels import fp8_linear as op
from nas_kernels.dispatch import TRITON, triton_available
from nas_kernels.fp8_linear import (
    FP8,
    Fp8Activations,
    fake_quantize_activations,
    fake_quantize_weight,
    fp8_linear,
    fp8_linear_ref,
    has_kernel,
    quantize_activations,
    quantize_weight,
    ref,
)
from tests.kernels.comparison import DEVICE, draw, in_wider_rows, misaligned, rms_ratio

BF16_RMS = 4e-3
SIZES = [(1, 16, 32), (3, 48, 16), (65, 64, 160)]


def grid() -> Tensor:
    """Return all finite values of e4m3fn, from the definition: sign, 4 bits, 3 bits."""
    values = []
    for exponent in range(16):
        for mantissa in range(8):
            if (exponent, mantissa) == (15, 7):
                continue  # NaN
            power = 2.0 ** max(exponent - 7, -6)
            values.append(power * ((exponent > 0) + mantissa / 8))
    return torch.tensor([*(-v for v in values), *values], dtype=torch.float64)


def nearest(x: Tensor) -> Tensor:
    """Round to the grid; half-way cases may go either way."""
    levels = grid()
    return levels[(x.double()[..., None] - levels).abs().argmin(-1)]


@pytest.mark.parametrize("shape", [(3, 5), (1, 1), (48, 96)])
def test_weight_values_row_by_row(shape: tuple[int, int]) -> None:
    weight = draw(*shape).cpu()
    weight[0] *= 1e-4
    values, scale = quantize_weight(weight)
    assert values.dtype == FP8 and scale.dtype == torch.float32 and scale.shape == shape[:1]
    for row in range(shape[0]):
        assert scale[row].item() == pytest.approx(weight[row].abs().max().item() / 448)
        assert values[row].float().abs().max() == 448
    given = weight.double() / scale.double()[:, None]
    assert ((nearest(given) - given).abs() >= (values.double() - given).abs() - 1e-4).all()


@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 6), (1, 1, 1)])
def test_activations_have_a_scale_per_token(shape: tuple[int, ...]) -> None:
    x = draw(*shape)
    x[..., 0, :] *= 1000
    quantized = quantize_activations(x)
    assert (quantized.shape, quantized.dtype) == (x.shape, x.dtype)
    restored = (quantized.values_MK.float() * quantized.scale_M1).view(shape)
    # Half of the last of 3 bits, or of the smallest step of the row.
    bound = torch.maximum(x.abs() / 16, x.abs().amax(dim=-1, keepdim=True) / 448 * 2**-10)
    assert ((restored - x).abs() <= bound * 1.001).all()
    assert torch.equal(fake_quantize_activations(x), restored)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 1, 4), (7, 33, 5), (5, 96, 48)])
def test_the_reference_is_exact(sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    rows, k, n = sizes
    x, (values, scale) = (
        quantize_activations(draw(rows, k, dtype=dtype)),
        quantize_weight(draw(n, k)),
    )
    exact = x.values_MK.double() @ values.double().T * x.scale_M1.double() * scale.double()
    for out in (fp8_linear_ref(x, values, scale), fp8_linear(x, values, scale)):
        assert out.dtype == dtype and out.shape == (rows, n)
        assert rms_ratio(out, exact) < {torch.float64: 1e-14, torch.float32: 1e-6}.get(
            dtype, BF16_RMS
        )


def test_training_rounds_as_it_is_stored() -> None:
    weight = draw(16, 48).requires_grad_()
    values, scale = quantize_weight(weight)
    fake = fake_quantize_weight(weight)
    torch.testing.assert_close(fake, values.float() * scale[:, None], rtol=1e-6, atol=0)
    (fake * 3.0).sum().backward()
    assert weight.grad is not None and (weight.grad == 3.0).all()
    x = draw(4, 48).requires_grad_()
    fake_quantize_activations(x).sum().backward()
    assert x.grad is not None and (x.grad == 1.0).all()


def test_zeros_and_empty_inputs() -> None:
    values, scale = quantize_weight(torch.zeros(4, 16, device=DEVICE))
    assert (values.float() == 0).all() and (scale > 0).all()
    assert (fp8_linear(quantize_activations(draw(3, 16)), values, scale) == 0).all()
    values, scale = quantize_weight(draw(16, 16))
    assert (
        fp8_linear(quantize_activations(torch.zeros(3, 16, device=DEVICE)), values, scale) == 0
    ).all()
    assert fp8_linear(quantize_activations(draw(0, 16)), values, scale).shape == (0, 16)
    assert fp8_linear(quantize_activations(draw(2, 0, 16)), values, scale).shape == (2, 0, 16)


def test_what_is_no_number_stays_none() -> None:
    x = draw(2, 16)
    x[0, 3] = float("nan")
    out = fp8_linear(quantize_activations(x), *quantize_weight(draw(16, 16)))
    assert out[0].isnan().all() and out[1].isfinite().all()


def test_tokens_do_not_depend_on_others() -> None:
    x, weight = draw(5, 32), quantize_weight(draw(16, 32))
    alone = fp8_linear(quantize_activations(x[:1]), *weight)
    x[1:] *= 1e4
    assert rms_ratio(fp8_linear(quantize_activations(x), *weight)[:1], alone) < 1e-6


@pytest.mark.parametrize("columns", [7, 32])
def test_views_need_no_copy(columns: int) -> None:
    x, (values, scale) = draw(3, 40)[:, :columns], quantize_weight(draw(24, 40))
    expected = fp8_linear_ref(quantize_activations(x), values[:16, :columns].clone(), scale[:16])
    out = fp8_linear(quantize_activations(x), values[:16, :columns], scale[:16])
    assert rms_ratio(out, expected) < BF16_RMS


class TestTheDevicesProduct:
    """`torch._scaled_mm`, which the CPU has too; there it is only what a GPU would be given."""

    @pytest.fixture
    def calls(self, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
        if DEVICE.type == "cuda" and not has_kernel(DEVICE, 16, 16):
            pytest.skip("this GPU does not multiply fp8")
        calls: list[dict[str, object]] = []
        real = torch._scaled_mm

        def scaled_mm(left: Tensor, right: Tensor, **options: Tensor) -> Tensor:
            calls.append(options)
            assert left.is_contiguous() and right.t().is_contiguous()
            assert options["scale_a"].shape == (len(left), 1)
            assert options["scale_b"].shape == (1, right.shape[1])
            assert options["scale_a"].is_contiguous() and options["scale_b"].is_contiguous()
            return real(left, right, **options)

        monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
        monkeypatch.setattr(op, "has_kernel", lambda device, n, k: n % 16 == 0 and k % 16 == 0)
        return calls

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("sizes", SIZES)
    def test_it_is_the_reference_in_bf16(
        self, sizes: tuple[int, int, int], dtype: torch.dtype, calls: list[dict[str, object]]
    ) -> None:
        rows, k, n = sizes
        x, weight = (
            quantize_activations(draw(rows, k, dtype=dtype)[None]),
            quantize_weight(draw(n, k)),
        )
        out = fp8_linear(x, *weight)
        assert len(calls) == 1 and out.dtype == dtype and out.shape == (1, rows, n)
        assert rms_ratio(out, fp8_linear_ref(x, *weight)) < BF16_RMS

    def test_what_it_does_not_take_runs_otherwise(self, calls: list[dict[str, object]]) -> None:
        def run(x: Fp8Activations, values: Tensor, scale: Tensor) -> None:
            assert rms_ratio(fp8_linear(x, values, scale), fp8_linear_ref(x, values, scale)) < 1e-6

        values, scale = quantize_weight(draw(32, 48))
        run(quantize_activations(draw(3, 48, dtype=torch.float64)), values, scale)
        run(quantize_activations(draw(0, 48)), values, scale)
        run(quantize_activations(draw(3, 32)), values[:, :32], scale)
        run(quantize_activations(draw(3, 48)), values.float(), scale)
        memory = torch.zeros(values.numel() + 1, dtype=FP8, device=DEVICE)
        memory[1:] = values.flatten()
        run(quantize_activations(draw(3, 48)), memory[1:].view(32, 48), scale)
        run(quantize_activations(draw(3, 40)), *quantize_weight(draw(32, 40)))
        assert not calls


@pytest.mark.parametrize(
    ("device", "capability", "sizes", "has"),
    [
        ("cuda", (9, 0), (16, 32), True),
        ("cuda", (8, 9), (16, 32), True),
        ("cuda", (8, 0), (16, 32), False),
        ("cuda", (9, 0), (17, 32), False),
        ("cuda", (9, 0), (16, 8), False),
        ("cuda", (9, 0), (0, 16), False),
        ("cpu", (9, 0), (16, 32), False),
    ],
)
def test_who_multiplies_fp8(
    device: str,
    capability: tuple[int, int],
    sizes: tuple[int, int],
    has: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(op, "_capability", lambda device: capability)
    assert has_kernel(torch.device(device), *sizes) == has


def bits(values: Tensor) -> Tensor:
    return values.view(torch.uint8).int().cpu()


@pytest.mark.skipif(not triton_available(), reason="triton is not installed")
class TestTheKernel:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 2, 33), (2, 128), (0, 5)])
    def test_values_are_those_of_the_reference(
        self, shape: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        x = draw(*shape, dtype=dtype)
        if len(x):
            x[0] *= 1e-3
        found, expected = quantize_activations(x, TRITON), ref.quantize_activations(x)
        assert torch.equal(bits(found.values_MK), bits(expected.values_MK))
        assert torch.equal(found.scale_M1, expected.scale_M1)
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)

    def test_every_number_and_half_way_case(self) -> None:
        """448 comes first, so the scale is 1 and the numbers are rounded as they are."""
        levels = grid().sort().values
        between = (levels[1:] + levels[:-1]) / 2
        near = torch.cat([between * (1 + sign * 2.0**-22) for sign in (-1, 1)])
        x = torch.cat([torch.tensor([448.0]), levels, between, near]).float()[None].to(DEVICE)
        found, expected = quantize_activations(x, TRITON), ref.quantize_activations(x)
        assert found.scale_M1.item() == 1.0
        assert torch.equal(found.values_MK.float(), expected.values_MK.float())

    def test_longer_rows_than_a_program_holds(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from nas_kernels.fp8_linear import triton_kernel

        monkeypatch.setattr(triton_kernel, "WIDEST", 16)
        x = draw(2, 45)
        found, expected = quantize_activations(x, TRITON), ref.quantize_activations(x)
        assert torch.equal(bits(found.values_MK), bits(expected.values_MK))

    def test_views(self) -> None:
        for x in (misaligned(draw(3, 20)), in_wider_rows(draw(3, 20)), draw(20, 3).t()):
            found, expected = quantize_activations(x, TRITON), ref.quantize_activations(x)
            assert torch.equal(bits(found.values_MK), bits(expected.values_MK))

    @pytest.mark.filterwarnings("ignore:invalid value encountered in divide")
    def test_zeros_and_what_is_no_number(self) -> None:
        x = torch.zeros(3, 16, device=DEVICE)
        x[1, 3], x[2, 4] = float("nan"), float("inf")
        found = quantize_activations(x, TRITON)
        values = found.values_MK.float()
        assert (values[0] == 0).all() and found.scale_M1[0] > 0
        assert found.scale_M1[1].isnan() and found.scale_M1[2].isinf()
        out = fp8_linear(found, *quantize_weight(draw(16, 16)))
        assert (out[0] == 0).all() and out[1].isnan().all() and not out[2].isfinite().any()

    def test_what_it_does_not_take(self) -> None:
        with pytest.raises(RuntimeError, match="no gradient"):
            quantize_activations(draw(2, 4).requires_grad_(), TRITON)
        with pytest.raises(RuntimeError, match="without columns"):
            quantize_activations(draw(2, 0), TRITON)
        with pytest.raises(RuntimeError, match="float64"):
            quantize_activations(draw(2, 4, dtype=torch.float64), TRITON)
