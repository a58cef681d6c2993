from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from searchspace.errors import UserError
from searchspace.norms import (
    NORMS,
    Affine,
    BatchStatisticNorm,
    CRMSNorm,
    Norm,
    PRepBN,
    UnifiedNorm,
    recalibrated,
)
from searchspace.norms.unified_norm import MOMENTUM, WINDOW

D_MODEL = 7
EPS = 1e-5


def make_x(seed: int = 0, tokens: int = 11, d_model: int = D_MODEL) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, tokens, d_model, generator=generator, dtype=torch.float64)
    # Channels of different mean and size.
    return x * torch.linspace(0.3, 4, d_model) + torch.linspace(-1, 2, d_model)


def uneven(norm: Norm, seed: int = 9) -> Any:
    """Give parameters and statistics values that are not 1 or 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in [*norm.parameters(), *norm.buffers()]:
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
    return norm


def relative(actual: Tensor, expected: Tensor) -> float:
    difference = (actual.double() - expected.double()).square().mean().sqrt()
    return (difference / expected.double().square().mean().sqrt()).item()


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt() * weight + bias


class TestEveryNorm:
    @pytest.mark.parametrize("name", NORMS)
    def test_declares_its_tensors(self, name: str) -> None:
        for d_model in (5, 8):
            norm = NORMS[name](d_model)
            sizes = {"d_model": d_model, "window": WINDOW, "one": 1}
            for tensors, axes in (
                (dict(norm.named_parameters()), norm.axes),
                (dict(norm.named_buffers()), norm.buffer_axes),
            ):
                shapes = {key: tuple(value.shape) for key, value in tensors.items()}
                assert shapes == {k: tuple(sizes[a] for a in v) for k, v in axes.items()}

    @pytest.mark.parametrize("name", NORMS)
    def test_reset_is_construction(self, name: str) -> None:
        norm = uneven(NORMS[name](D_MODEL))
        pointers = {key: value.data_ptr() for key, value in norm.state_dict().items()}
        norm.reset()
        for key, value in NORMS[name](D_MODEL).state_dict().items():
            assert torch.equal(norm.state_dict()[key], value)
            assert norm.state_dict()[key].data_ptr() == pointers[key]

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("name", NORMS)
    def test_half_precision_and_other_ranks(self, name: str, training: bool) -> None:
        norm = NORMS[name](D_MODEL).train(training)
        x = make_x().float()
        expected = norm(x)
        norm.reset()
        # 3 significant digits in, 3 out: statistics may not add to that.
        assert relative(norm(x.bfloat16()), expected) < 1e-2
        norm.reset()
        with torch.autocast("cpu", torch.bfloat16):
            out = norm(x)
        assert out.dtype == torch.float32
        assert relative(out, expected) < 1e-5
        norm.reset()
        assert relative(norm(x.flatten(0, 1)), expected.flatten(0, 1)) < 1e-5

    @pytest.mark.parametrize("name", NORMS)
    def test_meta_device(self, name: str) -> None:
        with torch.device("meta"):
            norm = NORMS[name](D_MODEL)
            x = torch.empty(2, 5, D_MODEL, requires_grad=True)
            norm.reset()
            norm(x).sum().backward()
            out = norm.eval()(x)
        assert out.shape == x.shape and out.is_meta and x.grad is not None

    @pytest.mark.parametrize("name", [n for n, c in NORMS.items() if c.foldable])
    def test_inference_is_the_affine_map(self, name: str) -> None:
        norm = uneven(NORMS[name](D_MODEL).double()).eval()
        before = {key: value.clone() for key, value in norm.state_dict().items()}
        x = make_x()
        scale, shift = norm.affine()
        expected = torch.stack([x[..., i] * scale[i] + shift[i] for i in range(D_MODEL)], -1)
        torch.testing.assert_close(norm(x), expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(Affine(scale, shift)(x), expected, rtol=1e-12, atol=1e-12)
        for key, value in norm.state_dict().items():
            assert torch.equal(value, before[key])
        norm(x).square().sum().backward()
        assert all(p.grad is not None and bool((p.grad != 0).any()) for p in norm.parameters())

    @pytest.mark.parametrize("name", [n for n, c in NORMS.items() if not c.foldable])
    def test_others_refuse(self, name: str) -> None:
        with pytest.raises(NotImplementedError, match="no affine map"):
            NORMS[name](D_MODEL).affine()

    @pytest.mark.parametrize("name", [n for n, c in NORMS.items() if c.foldable])
    def test_slices_of_shared_buffers_are_updated_in_place(self, name: str) -> None:
        width = 4
        shared, narrow, alone = NORMS[name](D_MODEL), NORMS[name](width), NORMS[name](width)
        for key, buffer in shared.named_buffers():
            narrow._buffers[key] = buffer[..., :width]
        for seed in range(WINDOW + 2):
            x = make_x(seed)[..., :width].float()
            for norm in (narrow, alone):
                norm(x).square().sum().backward()
        initial = dict(NORMS[name](D_MODEL).named_buffers())
        moved = dict(alone.named_buffers())
        for key, buffer in shared.named_buffers():
            assert torch.equal(buffer[..., :width], moved[key])
            assert not torch.equal(buffer[..., :width], initial[key][..., :width])
            assert torch.equal(buffer[..., width:], initial[key][..., width:])

    @pytest.mark.parametrize("name", [n for n, c in NORMS.items() if c.foldable])
    def test_inference_compiles_into_one_graph(self, name: str) -> None:
        norm = uneven(NORMS[name](D_MODEL)).eval()
        x = make_x().float()
        compiled = torch.compile(norm, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), norm(x))


def test_crmsnorm_is_rmsnorm_of_the_whole_vector() -> None:
    norm = uneven(CRMSNorm(D_MODEL).double())
    x = make_x()
    whole = torch.cat([x, -x.sum(-1, keepdim=True)], dim=-1)
    rms = nn.RMSNorm(D_MODEL + 1, eps=EPS, elementwise_affine=False)
    torch.testing.assert_close(norm(x), rms(whole)[..., :-1] * norm.weight, rtol=1e-12, atol=1e-12)


class TestPRepBN:
    def reference(self, norm: PRepBN, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        out = torch.empty_like(x)
        for i in range(x.shape[-1]):
            batch = (x[..., i] - mean[i]) / (var[i] + EPS).sqrt() * norm.weight[i] + norm.bias[i]
            out[..., i] = batch + norm.eta[0] * x[..., i]
        return norm.blend * layer_norm(x, norm.weight, norm.bias) + (1 - norm.blend) * out

    @pytest.mark.parametrize("blend", [0.0, 0.3, 1.0])
    def test_training_against_loops(self, blend: float) -> None:
        norm = uneven(PRepBN(D_MODEL).double())
        norm.blend = blend
        mean, var = norm.running_mean.clone(), norm.running_var.clone()
        leaf, again = make_x().requires_grad_(), make_x().requires_grad_()
        rows = again.reshape(-1, D_MODEL)
        expected = self.reference(norm, again, rows.mean(0), rows.var(0, correction=0))
        out = norm(leaf)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
        inputs = [*norm.parameters()]
        upstream = make_x(5)
        actual = torch.autograd.grad((out * upstream).sum(), [leaf, *inputs])
        wanted = torch.autograd.grad((expected * upstream).sum(), [again, *inputs])
        for one, other in zip(actual, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
        rows = rows.detach()
        torch.testing.assert_close(norm.running_mean, 0.9 * mean + 0.1 * rows.mean(0))
        torch.testing.assert_close(norm.running_var, 0.9 * var + 0.1 * rows.var(0))

    @pytest.mark.parametrize("blend", [0.0, 0.3, 1.0])
    def test_inference(self, blend: float) -> None:
        norm = uneven(PRepBN(D_MODEL).double()).eval()
        norm.blend = blend
        expected = self.reference(norm, make_x(), norm.running_mean, norm.running_var)
        torch.testing.assert_close(norm(make_x()), expected, rtol=1e-12, atol=1e-12)

    def test_no_affine_map_before_the_end_of_annealing(self) -> None:
        norm = PRepBN(D_MODEL)
        norm.blend = 0.25
        with pytest.raises(UserError, match=r"blend=0\.25 .* until its blend is 0"):
            norm.affine()


class SlowUnifiedNorm:
    """Unified norm channel by channel, with windows as lists."""

    def __init__(self, d_model: int) -> None:
        self.running = [1.0] * d_model
        self.running_slope = [0.0] * d_model
        self.squares = [[0.0] * WINDOW for _ in range(d_model)]
        self.slopes = [[0.0] * WINDOW for _ in range(d_model)]
        self.num_outliers = 0

    def step(
        self, x: Tensor, weight: Tensor, bias: Tensor, upstream: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the output and the gradient of the input."""
        out, grad = torch.empty_like(x), torch.empty_like(x)
        for i in range(x.shape[-1]):
            out[..., i], grad[..., i] = self.channel(
                i, x[..., i], weight[i].item(), bias[i].item(), upstream[..., i]
            )
        return out, grad

    def channel(
        self, i: int, x: Tensor, weight: float, bias: float, upstream: Tensor
    ) -> tuple[Tensor, Tensor]:
        square = (x**2).mean().item()
        before = [math.sqrt(value) for value in self.squares[i]]
        centre = sum(before) / WINDOW
        spread = sum((value - centre) ** 2 for value in before) / (WINDOW - 1)
        window = [*self.squares[i][1:], square]
        used, smoothed, outlier = square, False, False
        if all(value > 0 for value in window):
            geometric = math.prod(window) ** (1 / WINDOW)
            outlier = sum(window) / WINDOW - geometric > WINDOW * spread
            smoothed = not outlier
            used = geometric if smoothed else square
        self.num_outliers += outlier
        window[-1] = self.running[i] if outlier else square
        self.squares[i] = window
        self.running[i] += MOMENTUM * (used - self.running[i])

        z = x / math.sqrt(used + EPS)
        slope = (upstream * weight * z).mean().item()
        self.slopes[i] = [*self.slopes[i][1:], self.running_slope[i] if outlier else slope]
        mean = sum(self.slopes[i]) / WINDOW if smoothed else slope
        self.running_slope[i] += MOMENTUM * (mean - self.running_slope[i])
        change = self.running_slope[i] if smoothed else slope
        return weight * z + bias, (upstream * weight - change * z) / math.sqrt(used + EPS)


class TestUnifiedNorm:
    def test_training_against_loops(self) -> None:
        norm = UnifiedNorm(D_MODEL).double()
        with torch.no_grad():
            norm.weight.copy_(torch.linspace(0.5, 1.5, D_MODEL))
            norm.bias.copy_(torch.linspace(-1, 1, D_MODEL))
        slow = SlowUnifiedNorm(D_MODEL)
        for seed in range(14):
            # Batch 9 is far out in every channel.
            x = (make_x(seed) * (30 if seed == 9 else 1)).requires_grad_()
            upstream = make_x(100 + seed)
            norm.zero_grad()
            out = norm(x)
            out.backward(upstream)
            with torch.no_grad():
                expected, grad = slow.step(x, norm.weight, norm.bias, upstream)
            assert norm.weight.grad is not None and norm.bias.grad is not None
            torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(x.grad, grad, rtol=1e-10, atol=1e-10)
            z = (expected - norm.bias) / norm.weight
            torch.testing.assert_close(norm.weight.grad, (upstream * z).sum((0, 1)))
            torch.testing.assert_close(norm.bias.grad, upstream.sum((0, 1)))
        assert slow.num_outliers >= D_MODEL
        for actual, wanted in (
            (norm.running_square, slow.running),
            (norm.running_slope, slow.running_slope),
            (norm.squares.T, slow.squares),
            (norm.slopes.T, slow.slopes),
        ):
            torch.testing.assert_close(actual, torch.tensor(wanted, dtype=torch.float64))

    def test_gradient_is_exact_while_the_window_fills(self) -> None:
        norm, x = UnifiedNorm(D_MODEL).double(), make_x().requires_grad_()
        upstream = make_x(1)
        (actual,) = torch.autograd.grad((norm(x) * upstream).sum(), x)
        own = x / (x.square().mean((0, 1)) + EPS).sqrt()
        (expected,) = torch.autograd.grad((own * upstream).sum(), x)
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)

    def test_a_far_batch_leaves_the_window_alone(self) -> None:
        norm = UnifiedNorm(D_MODEL).double()
        with torch.no_grad():
            for seed in range(8):
                norm(make_x(seed))
            running = norm.running_square.clone()
            out = norm(100 * make_x(8))
        torch.testing.assert_close(norm.squares[-1], running)
        # Its own statistic was used.
        torch.testing.assert_close(out.square().mean((0, 1)), torch.ones(D_MODEL).double())

    def test_a_channel_of_zeros_stays_finite(self) -> None:
        norm = UnifiedNorm(2)
        for seed in range(6):
            x = make_x(seed, d_model=2).float() * torch.tensor([1.0, 0.0])
            out = norm(x)
            out.square().sum().backward()
            assert bool(torch.isfinite(out).all())
        assert all(bool(torch.isfinite(value).all()) for value in norm.state_dict().values())


class TestRecalibrated:
    def test_prepbn_takes_the_moments_of_all_tokens(self) -> None:
        norm = uneven(PRepBN(D_MODEL).double()).eval()
        buffer = norm.running_mean
        batches = [make_x(seed, tokens) + 50 for seed, tokens in enumerate((5, 11, 2))]
        with recalibrated(norm):
            for batch in batches:
                out = norm(batch)
                assert not out.requires_grad
        rows = torch.cat([batch.flatten(0, 1) for batch in batches])
        torch.testing.assert_close(norm.running_mean, rows.mean(0), rtol=1e-12, atol=0)
        torch.testing.assert_close(norm.running_var, rows.var(0), rtol=1e-10, atol=0)
        assert norm.running_mean is buffer and not norm.training

    def test_unified_norm_takes_the_geometric_mean_of_all_batches(self) -> None:
        norm = uneven(UnifiedNorm(D_MODEL).double()).eval()
        squares = norm.squares.clone()
        batches = [make_x(seed) * (seed + 1) for seed in range(3)]
        with recalibrated(norm):
            for batch in batches:
                norm(batch)
        each = [batch.square().mean((0, 1)) for batch in batches]
        expected = (each[0] * each[1] * each[2]) ** (1 / 3)
        torch.testing.assert_close(norm.running_square, expected, rtol=1e-12, atol=0)
        assert torch.equal(norm.squares, squares)

    def test_later_norms_see_normalised_inputs(self) -> None:
        first, second = PRepBN(D_MODEL).double(), PRepBN(D_MODEL).double()
        with torch.no_grad():
            first.eta.zero_()
        chain = nn.Sequential(first, second).eval()
        with recalibrated(chain):
            chain(make_x() + 100)
        zero, one = torch.zeros(D_MODEL).double(), torch.ones(D_MODEL).double()
        torch.testing.assert_close(second.running_mean, zero)
        torch.testing.assert_close(second.running_var, one, rtol=0.05, atol=0)
        out = chain(make_x() + 100)
        torch.testing.assert_close(out.mean((0, 1)), zero)

    @pytest.mark.parametrize("name", [n for n, c in NORMS.items() if c.foldable])
    def test_buffers_stay_after_an_error_or_without_a_pass(self, name: str) -> None:
        norm = uneven(NORMS[name](D_MODEL)).eval()
        before = {key: value.clone() for key, value in norm.state_dict().items()}
        with pytest.raises(RuntimeError, match="stop"), recalibrated(norm):
            norm(make_x().float())
            raise RuntimeError("stop")
        with recalibrated(norm):
            pass
        for key, value in norm.state_dict().items():
            assert torch.equal(value, before[key])
        assert isinstance(norm, BatchStatisticNorm) and not norm.calibrating
