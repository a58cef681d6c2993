"""The checks of `check_operator` that hold for mixers, FFNs and norms alike.

Shapes: B batch, T tokens, D d_model.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from searchspace.ffn import FFNS
from searchspace.mixers import MIXERS
from searchspace.mixers.base import SharedKV
from searchspace.packing import pack
from searchspace.specs import EndsSpec, FFNSpec, MixerSpec
from searchspace.sub_blocks import (
    FFNBlock,
    MixerBlock,
    build_sub_block,
    param_axes,
    reset_sub_block,
)

Spec = MixerSpec | FFNSpec
D_MODEL = 24
NUM_TOKENS = 71
"""Odd, more than a chunk of 64 or of 32, and no multiple of a small window."""
MAX_TOKENS = 96
"""For operators with parameters per position; more than `NUM_TOKENS`."""

FP32_RMS, ROUNDED_RMS, BF16_RMS = 1e-5, 1e-2, 5e-2
"""Largest root mean square of a difference, relative to the expected values. A rounding error of
1e-7 can move an int8 activation to the next step, and low precisions may use a bf16 kernel for one
shape and not for another, hence the wider bound."""


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
    return FP32_RMS if spec.precision == "fp32" else ROUNDED_RMS


def all_options(spec: Spec) -> dict[str, Any]:
    """Return the options of a sub-block's operator, defaults included."""
    operator = MIXERS[spec.mixer] if isinstance(spec, MixerSpec) else FFNS[spec.ffn]
    return {**operator.options, **dict(spec.options)}


def is_causal(spec: Spec) -> bool:
    """Whether a later token must not change an earlier one."""
    return spec.causal if isinstance(spec, MixerSpec) else True


def is_stateful(spec: Spec) -> bool:
    """Whether the operator has a state."""
    return spec.causal if isinstance(spec, MixerSpec) else FFNS[spec.ffn].stateful


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
    return block.eval()


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
        known |= {k: v for k, v in all_options(sized).items() if isinstance(v, int)}
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
        if not spec.num_heads:
            return replace(spec, d_model=40)
        kv_heads = 6 if MIXERS[spec.mixer].heads == "equal" else 3
        return replace(spec, d_model=40, num_heads=6, num_kv_heads=kv_heads, head_dim=10)
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
    require(not same or not blocks[0], "reset does not use the generator")


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
def check_isolation(spec: Spec) -> None:
    """What must not matter does not, however large it is: later tokens, other sequences.

    Later tokens in a causal form; all other tokens in an FFN or norm without a state.
    """
    block, x_BTD = make_block(spec), make_input()
    expected = block(x_BTD)
    for start in (1, 7, 33, NUM_TOKENS - 1) if is_causal(spec) else ():
        changed = x_BTD.clone()
        changed[:, start:] = 100 * make_input(seed=2)[:, start:]
        out_BTD = block(changed)
        require_close(
            out_BTD[:, :start], expected[:, :start], bound_of(spec), f"before token {start}"
        )
        if isinstance(spec, FFNSpec) and not is_stateful(spec):
            changed = x_BTD.clone()
            changed[:, start - 1] *= -100
            out_BTD = block(changed)
            require_close(
                out_BTD[:, start:], expected[:, start:], bound_of(spec), f"from token {start} on"
            )
    changed = x_BTD.clone()
    changed[1] *= -100
    require_close(block(changed)[0], expected[0], bound_of(spec), "the other sequence")


@torch.no_grad()
def check_order(spec: Spec) -> None:
    """A bidirectional mixer depends on the order of tokens exactly if it says so."""
    assert isinstance(spec, MixerSpec)
    block, x_BTD = make_block(spec), make_input()
    order_T = torch.randperm(NUM_TOKENS, generator=torch.Generator().manual_seed(5))
    moved, expected = block(x_BTD[:, order_T]), block(x_BTD)[:, order_T]
    difference = (moved - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    knows = MIXERS[spec.mixer].knows_order(all_options(spec)) or spec.position != "nope"
    if knows:
        require(difference.item() > 1e-4, "it says it knows the order of tokens, but does not")
    else:
        require_close(moved, expected, 10 * bound_of(spec), "tokens in another order")


@torch.no_grad()
def check_meta(spec: Spec) -> None:
    """The sub-block runs on the meta device, where costs are counted."""
    with torch.device("meta"):
        block = build_sub_block(spec).eval()
        x_BTD = torch.empty(2, 19, D_MODEL)
    require(block(x_BTD).shape == x_BTD.shape, "the shape on the meta device is another")


def check_gradients(spec: Spec) -> None:
    """Gradients reach every declared parameter and the input, and are finite."""
    block, x_BTD = make_block(spec).train(), make_input().requires_grad_()
    extra: tuple[Any, ...] = ()
    if isinstance(spec, MixerSpec) and spec.kv_shared:
        # Alone it would attend to zeros, and nothing would depend on anything.
        k_BGSK, v_BGSK = torch.randn(
            2, 2, spec.num_kv_heads, NUM_TOKENS, spec.head_dim,
            generator=torch.Generator().manual_seed(3),
        ).transpose(0, 1).unbind(1)  # fmt: skip
        extra = (None, SharedKV(k_BGSK, v_BGSK))
    (block(x_BTD, *extra) * make_input(seed=2)).sum().backward()
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
    """What is really stored and run is close to what training simulates; norms may be folded."""
    block, x_BTD = make_block(spec), make_input()
    expected = block(x_BTD)
    pack(block)
    require_close(block(x_BTD), expected, bound_of(spec), "packed")
    names = [n for n, p in block.op.named_parameters() if not p.dtype.is_floating_point]
    require(not names, f"packed weights are still parameters: {names}")
