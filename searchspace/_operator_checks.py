"""The checks of `check_operator` that hold for mixers, FFNs and norms alike.

Shapes: B batch, T tokens, D d_model.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from searchspace.arch import Arch, LayerArch
from searchspace.mixers import MIXERS
from searchspace.space import SearchSpace
from searchspace.specs import EndsSpec, FFNSpec, MixerSpec
from searchspace.sub_blocks import (
    FFNBlock,
    MixerBlock,
    build_sub_block,
    pack,
    param_axes,
    reset_sub_block,
)
from searchspace.supernet import Supernet

Spec = MixerSpec | FFNSpec
D_MODEL = 24
NUM_TOKENS = 71
"""Odd, more than a chunk of 64 or of 32, and no multiple of a small window."""

FP32_RMS, INT8_RMS, BF16_RMS = 1e-5, 5e-3, 5e-2
"""Largest root mean square of a difference, relative to the expected values. A rounding error of
1e-7 can move an int8 activation to the next step, hence the wider bound."""


def require(condition: bool, message: str) -> None:
    """Raise an AssertionError unless the condition holds (also under ``python -O``)."""
    if not condition:
        raise AssertionError(message)


def require_close(actual: Tensor, expected: Tensor, bound: float, what: str) -> None:
    """Raise unless the RMS of the difference is within `bound` of the RMS of what is expected."""
    require(actual.shape == expected.shape, f"{what}: {actual.shape} against {expected.shape}")
    scale = expected.detach().float().square().mean().sqrt().clamp_min(1e-6)
    error = ((actual - expected).detach().float().square().mean().sqrt() / scale).item()
    require(error <= bound, f"{what}: relative RMS difference {error:.2e}, allowed {bound:.0e}")


def bound_of(spec: Spec) -> float:
    """Return the allowed difference between two ways to compute the same."""
    return INT8_RMS if spec.precision == "int8" else FP32_RMS


def make_block(spec: Spec, seed: int = 0) -> MixerBlock | FFNBlock:
    """Build a sub-block at random weights; norms and other ones-or-zeros are made uneven."""
    block = build_sub_block(spec)
    assert not isinstance(spec, EndsSpec) and isinstance(block, MixerBlock | FFNBlock)
    generator = torch.Generator().manual_seed(seed)
    reset_sub_block(block, generator, depth=1)
    with torch.no_grad():
        for parameter in block.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return block


def make_input(batch: int = 2, tokens: int = NUM_TOKENS, seed: int = 1) -> Tensor:
    """Return random activations (B, T, D)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, tokens, D_MODEL, generator=generator)


def check_axes(spec: Spec) -> None:
    """Declared axes name every parameter and multiply out to its shape, at two sizes."""
    fixed: dict[str, int] = {}
    for sized in (spec, _resized(spec)):
        shapes = {name: p.shape for name, p in build_sub_block(sized).named_parameters()}
        axes = param_axes(sized)
        odd = sorted(set(shapes) ^ set(axes))
        require(not odd, f"axes and parameters differ in {', '.join(odd)}")
        known = {k: v for k, v in vars(sized).items() if isinstance(v, int)}
        for name, shape in shapes.items():
            require(
                len(shape) == len(axes[name]), f"{name} has {len(shape)} axes, not {axes[name]}"
            )
            for axis, size in zip(axes[name], shape, strict=True):
                if axis not in known and axis.isidentifier():
                    # A dimension of the operator's own, such as the rank of a gate: constant.
                    fixed.setdefault(axis, size)
                expected = axis_size(axis, {**fixed, **known})
                require(size == expected, f"{name}: {axis} is {expected}, the axis has {size}")


def axis_size(axis: str, sizes: dict[str, int]) -> int:
    """Return the size of a named dimension such as ``"num_heads*head_dim"``."""
    factors = [sizes.get(factor, 0) for factor in axis.split("*")]
    require(all(factors), f"axis {axis!r} has a factor that is no dimension of the spec")
    return math.prod(factors)


def _resized(spec: Spec) -> Spec:
    if isinstance(spec, MixerSpec):
        return replace(spec, d_model=40, num_heads=6, num_kv_heads=3, head_dim=10)
    return replace(spec, d_model=40, intermediate_size=11)


def check_reset(spec: Spec) -> None:
    """Reset sets every parameter of the operator, from nothing but the generator."""
    blocks = []
    for seed in (3, 3, 4):
        block = make_block(spec)
        with torch.no_grad():
            for parameter in block.op.parameters():
                parameter.fill_(math.nan)
        block.op.reset(torch.Generator().manual_seed(seed), 2)
        blocks.append(dict(block.op.named_parameters()))
    for name, value in blocks[0].items():
        require(bool(torch.isfinite(value).all()), f"reset leaves {name} as it was")
        require(torch.equal(value, blocks[1][name]), f"reset of {name} is not reproducible")
    same = all(torch.equal(value, blocks[2][name]) for name, value in blocks[0].items())
    require(not same, "reset does not use the generator")


def check_shapes(spec: Spec) -> None:
    """Output shape and dtype are the input's, also for one token or sequence; input is kept."""
    block = make_block(spec)
    for batch, tokens in ((2, NUM_TOKENS), (1, 1), (3, 2)):
        x_BTD = make_input(batch, tokens)
        before = x_BTD.clone()
        with torch.no_grad():
            out_BTD = block(x_BTD)
        require(out_BTD.shape == x_BTD.shape, f"{x_BTD.shape} becomes {out_BTD.shape}")
        require(out_BTD.dtype == x_BTD.dtype, f"{x_BTD.dtype} becomes {out_BTD.dtype}")
        require(bool(torch.isfinite(out_BTD).all()), "the output is not finite")
        require(torch.equal(x_BTD, before), "the input is changed in place")


@torch.no_grad()
def check_causal(spec: Spec) -> None:
    """A later token, however large, changes nothing earlier; another sequence changes nothing."""
    block, x_BTD = make_block(spec), make_input()
    expected = block(x_BTD)
    for start in (1, 7, 33, NUM_TOKENS - 1):
        changed = x_BTD.clone()
        changed[:, start:] = 100 * make_input(seed=2)[:, start:]
        out_BTD = block(changed)
        require_close(
            out_BTD[:, :start], expected[:, :start], bound_of(spec), f"before token {start}"
        )
        if isinstance(spec, FFNSpec):
            changed = x_BTD.clone()
            changed[:, start - 1] *= -100
            out_BTD = block(changed)
            require_close(
                out_BTD[:, start:], expected[:, start:], bound_of(spec), f"from token {start} on"
            )
    changed = x_BTD.clone()
    changed[1] *= -100
    require_close(block(changed)[0], expected[0], bound_of(spec), "the other sequence")


def check_gradients(spec: Spec) -> None:
    """Gradients reach every declared parameter and the input, and are finite."""
    block, x_BTD = make_block(spec), make_input().requires_grad_()
    (block(x_BTD) * make_input(seed=2)).sum().backward()
    for name, value in [("the input", x_BTD), *block.named_parameters()]:
        require(value.grad is not None, f"no gradient reaches {name}")
        assert value.grad is not None
        require(bool(torch.isfinite(value.grad).all()), f"the gradient of {name} is not finite")
        require(bool((value.grad != 0).any()), f"the gradient of {name} is zero")


def check_bf16(spec: Spec) -> None:
    """Under bfloat16 autocast the result is close and its gradients are finite."""
    block, x_BTD = make_block(spec), make_input()
    with torch.no_grad():
        expected = block(x_BTD)
    with torch.autocast("cpu", torch.bfloat16):
        out_BTD = block(x_BTD)
    require_close(out_BTD.float(), expected, BF16_RMS, "bfloat16 autocast")
    out_BTD.float().square().mean().backward()
    for name, value in block.named_parameters():
        finite = value.grad is not None and bool(torch.isfinite(value.grad).all())
        require(finite, f"the gradient of {name} under bfloat16 autocast is not finite")


@torch.no_grad()
def check_packed(spec: Spec) -> None:
    """The form that really runs in int8 is close to the simulated one."""
    block, x_BTD = make_block(spec), make_input()
    expected = block(x_BTD)
    pack(block)
    require_close(block(x_BTD), expected, bound_of(spec), "packed")
    names = [name for name, p in block.op.named_parameters() if p.dtype == torch.int8]
    require(not names, f"packed weights are still parameters: {names}")


def check_views(spec: Spec) -> None:
    """On shared weights the operator equals its extracted copy, which holds leading slices."""
    if isinstance(spec, MixerSpec):
        _check_supernet(replace(spec, num_heads=1, num_kv_heads=1))
    else:
        _check_supernet(replace(spec, intermediate_size=1))


@functools.lru_cache(maxsize=32)
@torch.no_grad()
def _check_supernet(spec: Spec) -> None:
    """Check views in a small supernet; the sizes in the spec do not count."""
    supernet = _small_supernet(spec)
    tokens_BT = torch.arange(2 * 19).reshape(2, 19) % supernet.space.vocab_size
    for arch in _small_archs(supernet.space):
        view, extracted = supernet.view(arch), supernet.extract(arch)
        difference = (view(tokens_BT) - extracted(tokens_BT)).abs().max().item()
        require(difference <= 1e-5, f"view and extracted copy differ by {difference:.1e}")
        for name, value in extracted.named_parameters():
            leading = supernet.params[name][tuple(slice(0, n) for n in value.shape)]
            require(torch.equal(value, leading), f"{name} is not a leading slice")


def _small_supernet(spec: Spec) -> Supernet:
    mixer = spec.mixer if isinstance(spec, MixerSpec) else "softmax"
    options = dict(spec.options) if isinstance(spec, MixerSpec) else {}
    mixers: dict[str, dict[str, tuple[Any, ...]]] = {
        mixer: {name: (value,) for name, value in options.items()}
    }
    # Softmax last, so that the operator shares its projections with another one.
    space = SearchSpace(
        name="check",
        vocab_size=13,
        d_model=(D_MODEL, 16),
        head_dim=8,
        num_layers=3,
        mixers=mixers if mixer == "softmax" else {**mixers, "softmax": {}},
        heads=((4, 4), (4, 2), (3, 1), (1, 1)),
        intermediate_size=(24, 9),
        position=MIXERS[mixer].positions,
        mixer_precision=(spec.precision if isinstance(spec, MixerSpec) else "fp32",),
        ffn=(spec.ffn if isinstance(spec, FFNSpec) else "relu2",),
        ffn_precision=(spec.precision if isinstance(spec, FFNSpec) else "fp32",),
        norm=(spec.norm,),
    )
    return Supernet(space, torch.Generator().manual_seed(0))


def _small_archs(space: SearchSpace) -> list[Arch]:
    """Return the largest arch, the smallest, and one with a different layer in every slot."""
    layer = space.largest().layers[0]
    small = replace(layer, num_heads=3, num_kv_heads=1, intermediate_size=9)
    mixed = Arch(16, space.head_dim, space.vocab_size, (small, LayerArch(), layer))
    return [space.largest(), space.smallest(), mixed]
