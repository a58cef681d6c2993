"""LayerNorm networks as RMSNorm networks, exactly.

Shapes: D d_model, N outputs and K inputs of a linear map.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from searchspace.ends import Ends
from searchspace.errors import UserError
from searchspace.linear import Linear
from searchspace.norms import LayerNorm, RMSNorm
from searchspace.rewrites.merging import merge_before, replacement
from searchspace.sub_blocks import FFNBlock, MixerBlock

if TYPE_CHECKING:
    from searchspace.subnet import Subnet

NAME = "layernorm_to_rmsnorm"


@torch.no_grad()
def layernorm_to_rmsnorm(subnet: Subnet) -> None:
    """Turn a pre-norm LayerNorm network into an RMSNorm network that computes the same, in place.

    Everything that is added to the residual stream (embeddings, positions, class token, results of
    operators) gets zero mean over the features; of a vector with zero mean, layer norm is RMS norm
    with the same scale. Shifts of layer norms go into the biases of the maps that read them. Works
    on a meta device too.

    Args:
        subnet: with layer norms only, all in front, and fp32 weights; not a view of a supernet.

    Raises:
        UserError: where the network cannot be rewritten; it is unchanged then.

    Source: Jiang et al. 2023, "Pre-RMSNorm and Pre-CRMSNorm Transformers", section on Pre-LN
    to Pre-RMSNorm.
    """
    _check(subnet)
    ends = subnet.ends
    if ends.embedding_proj is not None:
        _centre_result(ends.embedding_proj)
    else:
        _centre_embedding(ends)
    for _, block in _blocks(subnet):
        block.norm = _without_centring(block.norm, block.op.input_linears())
        _centre_result(cast(Linear, block.op.output_linear()))
    ends.norm = _without_centring(ends.norm, ends.norm_readers())


def _centre_embedding(ends: Ends) -> None:
    """Give everything that is embedded zero mean over the features."""
    for name in ("embedding", "positions", "class_token"):
        if hasattr(ends, name):
            old = getattr(ends, name)
            setattr(ends, name, replacement(old, _centred(old, dim=1)))
    if hasattr(ends, "patch_proj"):
        _centre_result(ends.patch_proj)


def _blocks(subnet: Subnet) -> list[tuple[str, MixerBlock | FFNBlock]]:
    return [(name, cast(MixerBlock | FFNBlock, b)) for name, b in subnet.blocks.items()]


def _centred(values: Tensor, dim: int) -> Tensor:
    return values - values.mean(dim=dim, keepdim=True)


def _centre_result(linear: Linear) -> None:
    """Make the result of a linear map one of zero mean over the features."""
    linear.weight = replacement(linear.weight, _centred(linear.weight, dim=0))
    if linear.bias is not None:
        linear.bias = replacement(linear.bias, _centred(linear.bias, dim=0))


def _without_centring(norm: nn.Module, linears: list[Linear]) -> RMSNorm:
    """Return the RMS norm in place of a layer norm, whose shift goes into the maps behind it."""
    assert isinstance(norm, LayerNorm)
    for linear in dict.fromkeys(linears):
        merge_before(linear, None, norm.bias)
    rms = RMSNorm(norm.weight.shape[0])
    rms.weight, rms.eps = norm.weight, norm.eps
    return rms


def _check(subnet: Subnet) -> None:
    """Raise unless every condition holds."""
    for name, block in _blocks(subnet):
        kind = block.spec.mixer if isinstance(block, MixerBlock) else block.spec.ffn
        if block.spec.placement != "pre":
            raise _refusal(f"{name} has placement={block.spec.placement!r}, not 'pre'")
        if not isinstance(block.norm, LayerNorm):
            raise _refusal(f"{name} has norm={block.spec.norm!r}, not 'layernorm'")
        if not block.op.input_linears():
            raise _refusal(f"in {name}, {kind!r} reads its input by more than linear maps")
        if block.op.output_linear() is None:
            raise _refusal(f"in {name}, {kind!r} does not end in a linear map")
    if not isinstance(subnet.ends.norm, LayerNorm):
        raise _refusal(f"the final norm is {subnet.ends.family.final_norm!r}, not 'layernorm'")
    family = subnet.ends.family
    if not subnet.ends.norm_readers():
        raise _refusal("tied_head=true leaves no map of its own behind the final norm")
    if family.embedding_norm != "none" and subnet.ends.embedding_proj is None:
        raise _refusal(f"nothing linear follows embedding_norm={family.embedding_norm!r}")
    for name, module in subnet.named_modules():
        if isinstance(module, Linear) and module.precision != "fp32":
            raise _refusal(f"{name} has precision={module.precision!r}, not 'fp32'")


def _refusal(reason: str) -> UserError:
    return UserError(
        f"{NAME} is not exact here: {reason}; leave the rewrite out or choose another arch"
    )
