"""The checks of `check_operator` about shared weights, of which a smaller network has a part.

Shapes: B batch, T tokens, D d_model.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from searchspace.arch import Arch, LayerArch
from searchspace.family import Family
from searchspace.space import SearchSpace
from searchspace.specs import FFNSpec, MixerSpec
from searchspace.sub_blocks import param_axes
from searchspace.supernet import Supernet
from searchspace.testing.operator_checks import (
    D_MODEL,
    MAX_TOKENS,
    Spec,
    all_options,
    is_causal,
    make_block,
    make_input,
    require,
)


def check_nested(spec: Spec) -> None:
    """A leading part of the computation needs the leading part of every parameter.

    With only the first channels let in and out, or the first heads or hidden units let through to
    the result, gradients that reach the rest of a parameter must reach all of its leading slice
    too. So an axis that is laid out another way than its name says is found: cutting it would give
    a smaller network the weights of other heads.
    """
    shares = isinstance(spec, MixerSpec) and spec.kv_shared
    if spec.precision != "fp32" or shares or not list(make_block(spec).op.parameters()):
        return
    _check_cut(spec, {"d_model": Fraction(1, 2)})
    if isinstance(spec, MixerSpec):
        if spec.num_heads > 1:
            kept = Fraction(spec.num_heads // 2, spec.num_heads)
            kv_kept = kept if spec.num_kv_heads > 1 else Fraction(1)
            _check_cut(spec, {"num_heads": kept, "num_kv_heads": kv_kept})
        return
    inputs = {named[1] for named in param_axes(spec).values() if len(named) == 2}
    sizes = {"intermediate_size": spec.intermediate_size, **all_options(spec)}
    for dimension, size in sizes.items():
        if dimension in inputs and size > 1:
            _check_cut(spec, {dimension: Fraction(size // 2, size)})


def _check_cut(spec: Spec, kept: Mapping[str, Fraction]) -> None:
    block, x_BTD = make_block(spec), make_input(tokens=19)
    weight_BTD, last = make_input(tokens=19, seed=2), block.op.output_linear()
    if "d_model" in kept:
        first = int(D_MODEL * kept["d_model"])
        x_BTD[:, :, first:] = weight_BTD[:, :, first:] = 0.0
    elif isinstance(spec, FFNSpec):
        _cut_readers(spec, block, *kept.items())
    elif last is None:
        return
    else:
        with torch.no_grad():
            last.weight[:, int(last.weight.shape[1] * kept["num_heads"]) :] = 0.0
    (block.op(x_BTD) * weight_BTD).sum().backward()
    for name, param in block.op.named_parameters():
        for axis, named in enumerate(param_axes(spec)[f"op.{name}"]):
            share = functools.reduce(
                lambda product, factor: product * kept.get(factor, Fraction(1)),
                named.split("*"),
                Fraction(1),
            )
            if share < 1:
                _require_leading(name, param, axis, int(param.shape[axis] * share))


@torch.no_grad()
def _cut_readers(spec: FFNSpec, block: nn.Module, kept: tuple[str, Fraction]) -> None:
    """Let only the leading hidden units of a dimension through to the maps that read them."""
    dimension, share = kept
    params = dict(block.named_parameters())
    for name, named in param_axes(spec).items():
        if len(named) == 2 and named[1] == dimension:
            params[name][:, int(params[name].shape[1] * share) :] = 0.0


def _require_leading(name: str, param: Tensor, axis: int, size: int) -> None:
    assert param.grad is not None
    others = [other for other in range(param.ndim) if other != axis]
    reached = param.grad.abs().sum(others) > 0 if others else param.grad != 0
    require(
        bool(reached[:size].all()) or not bool(reached[size:].any()),
        f"axis {axis} of {name} is laid out so that a smaller network does not use its first part",
    )


def check_views(spec: Spec) -> None:
    """On shared weights the operator equals its extracted copy, which holds leading slices."""
    if isinstance(spec, MixerSpec):
        heads = min(spec.num_heads, 1)
        _check_supernet(replace(spec, num_heads=heads, num_kv_heads=heads))
    else:
        _check_supernet(replace(spec, intermediate_size=1))


@functools.lru_cache(maxsize=32)
@torch.no_grad()
def _check_supernet(spec: Spec) -> None:
    """Check views in a small supernet; the sizes in the spec do not count."""
    supernet = _small_supernet(spec)
    tokens_BT = torch.arange(2 * 19).reshape(2, 19) % supernet.space.vocab_size
    archs = _small_archs(supernet.space)
    views = [supernet.view(arch) for arch in archs]
    for arch, view in zip(archs, views, strict=True):
        extracted = supernet.extract(arch).eval()
        difference = (view(tokens_BT) - extracted(tokens_BT)).abs().max().item()
        require(difference <= 1e-5, f"view and extracted copy differ by {difference:.1e}")
        for name, value in extracted.named_parameters():
            leading = supernet.params[name][tuple(slice(0, n) for n in value.shape)]
            require(torch.equal(value, leading), f"{name} is not a leading slice")
    # As training does: what was computed from the weights before must not be kept.
    for param in supernet.params.values():
        param.mul_(1.1)
    for arch, view in zip(archs[:3:2], views[:3:2], strict=True):
        difference = (view(tokens_BT) - supernet.extract(arch)(tokens_BT)).abs().max().item()
        require(difference <= 1e-5, f"after a change of the weights a view is {difference:.1e} off")


def _small_supernet(spec: Spec) -> Supernet:
    is_mixer = isinstance(spec, MixerSpec)
    mixer = spec.mixer if isinstance(spec, MixerSpec) else "softmax"
    options = dict(spec.options) if isinstance(spec, MixerSpec) else {}
    mixers: dict[str, dict[str, tuple[Any, ...]]] = {
        mixer: {name: (value,) for name, value in options.items()}
    }
    ffn, ffn_options = "relu2", {}
    if isinstance(spec, FFNSpec):
        ffn, ffn_options = spec.ffn, dict(spec.options)
    positions = dict.fromkeys([spec.position if isinstance(spec, MixerSpec) else "rope", "nope"])
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
        position=tuple(positions),
        mixer_precision=(spec.precision if is_mixer else "fp32",),
        kv_shared=(False, True) if isinstance(spec, MixerSpec) and spec.kv_shared else (False,),
        ffn=(ffn,),
        ffn_options={ffn: {name: (value,) for name, value in ffn_options.items()}},
        ffn_precision=("fp32" if is_mixer else spec.precision,),
        norm=(spec.norm,),
        norm_placement=(spec.placement,),
        family=_small_family(is_causal(spec)),
    )
    return Supernet(space, torch.Generator().manual_seed(0))


def _small_family(causal: bool) -> Family:
    if causal:
        return Family(max_tokens=MAX_TOKENS)
    return Family("encoder", num_classes=3, embedding_position="learned", max_tokens=MAX_TOKENS)


def _small_archs(space: SearchSpace) -> list[Arch]:
    """Return the largest arch, the smallest, and one with a different layer in every slot."""
    layer = space.largest().layers[0]
    small = replace(layer, num_heads=3, num_kv_heads=1, intermediate_size=9)
    mixed = space.arch(16, (small, LayerArch(), layer))
    shared = [space.uniform(kv_shared=True)] if True in space.kv_shared else []
    return [space.largest(), space.smallest(), mixed, *shared]
