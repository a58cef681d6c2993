"""Folding norms that are affine maps at inference, so that they cost nothing there.

Shapes: D d_model.
"""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import nn

from searchspace.ends import Ends
from searchspace.linear import Linear
from searchspace.norms import Affine, Norm
from searchspace.rewrites.merging import can_merge, merge_after, merge_before
from searchspace.sub_blocks import ResidualBlock


@torch.no_grad()
def fold_norms(module: nn.Module) -> None:
    """Replace every foldable norm of a network or sub-block, in place, for inference.

    Its scale and shift go into the maps that read it, or into the map whose result it reads
    (`norm_out`); then an `nn.Identity` stands in its place. Where there are none, or they are
    quantised, it becomes an `Affine`; so do norms behind the residual addition. What this does
    depends on structure only, never on values, and it works on a meta device. Folding again changes
    nothing.

    Args:
        module: a `Subnet`, a `MixerBlock`, an `FFNBlock` or `Ends`; not a view of a supernet
            that is still trained.

    Raises:
        UserError: for a norm that still needs training (see `PRepBN.affine`).

    Source: Guo et al. 2024, "SLAB", section on progressive re-parameterized batch norm; Yang et al.
    2022, "Unified Normalization", section on the unified framework.
    """
    for child in list(module.modules()):
        if isinstance(child, Ends):
            embedding_proj = child.embedding_proj
            _fold_before(
                child, "embedding_norm", [] if embedding_proj is None else [embedding_proj]
            )
            _fold_before(child, "norm", child.norm_readers())
        elif isinstance(child, ResidualBlock):
            _fold_block(child)


def _fold_block(block: ResidualBlock) -> None:
    if block.spec.placement == "post":
        _fold_before(block, "norm", [])
        return
    _fold_before(block, "norm", block.op.input_linears())
    norm_out = getattr(block, "norm_out", None)
    if is_foldable(norm_out):
        last = block.op.output_linear()
        if last is not None and can_merge([last]):
            merge_after(last, *norm_out.affine())
            block.norm_out = nn.Identity()
        else:
            block.norm_out = Affine(*norm_out.affine())


def _fold_before(block: ResidualBlock | Ends, name: str, linears: list[Linear]) -> None:
    """Fold the block's norm of that name into the maps that are all that reads it."""
    norm = getattr(block, name)
    if not is_foldable(norm):
        return
    scale_D, shift_D = norm.affine()
    if not can_merge(linears):
        setattr(block, name, Affine(scale_D, shift_D))
        return
    for linear in dict.fromkeys(linears):
        merge_before(linear, scale_D, shift_D)
    setattr(block, name, nn.Identity())


def is_foldable(norm: object) -> TypeGuard[Norm]:
    """Whether a module is a norm that `fold_norms` replaces."""
    return isinstance(norm, Norm) and norm.foldable
