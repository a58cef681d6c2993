"""How unequal layers fit into a Llama, whose layers are all alike.

Shapes: D d_model, H query heads, G key/value heads, K head width, F hidden units of an FFN; h query
heads of a layer before padding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from searchspace.linear import Linear
from searchspace.sub_blocks import FFNBlock, MixerBlock

Layer = tuple[MixerBlock | None, FFNBlock | None]
EMPTY_WIDTH = 32
"""Width of heads or FFNs in a network that has none."""


def paired(blocks: Sequence[MixerBlock | FFNBlock]) -> list[Layer]:
    """Return sub-blocks as layers of attention and then an FFN, as few as there can be."""
    layers: list[Layer] = []
    for block in blocks:
        if isinstance(block, MixerBlock):
            layers.append((block, None))
        elif layers and layers[-1][1] is None:
            layers[-1] = (layers[-1][0], block)
        else:
            layers.append((None, block))
    return layers


@dataclass(frozen=True)
class Heads:
    """Equal numbers of heads that the attention of every layer fits into.

    A group is a key/value head and the query heads that read it.

    Args:
        groups: G.
        per_group: H / G.
    """

    groups: int
    per_group: int

    @staticmethod
    def for_layers(layers: Sequence[tuple[int, int]], d_model: int) -> Heads | None:
        """Return the fewest heads that do; None where there are none.

        Args:
            layers: query heads and key/value heads of every layer.
            d_model: of which transformers wants H to be a divisor, whatever K is.
        """
        choices = []
        for per_group in range(1, d_model + 1):
            least = max((g * math.ceil(h // g / per_group) for h, g in layers), default=1)
            fitting = range(least, d_model // per_group + 1)
            choices += [Heads(n, per_group) for n in fitting if d_model % (n * per_group) == 0][:1]
        return min(choices, key=lambda heads: heads.queries + heads.groups, default=None)

    @staticmethod
    def of(mixers: Sequence[MixerBlock], d_model: int) -> Heads | None:
        """Return `for_layers` of attention sub-blocks."""
        specs = [mixer.spec for mixer in mixers]
        return Heads.for_layers([(s.num_heads, s.num_kv_heads) for s in specs], d_model)

    @property
    def queries(self) -> int:
        """H."""
        return self.groups * self.per_group

    def places(self, num_heads: int, num_kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return where the heads of a layer go.

        A key/value head with more query heads than a group has room for is there several times.

        Returns:
            For every query head its place among H (h,), and for every group that is used its place
            among G and the key/value head that is copied there.
        """
        own = num_heads // num_kv_heads
        copies = math.ceil(own / self.per_group)
        head_h = torch.arange(num_heads)
        group_h = head_h // own * copies + head_h % own // self.per_group
        group_places = torch.arange(num_kv_heads * copies)
        query_places = group_h * self.per_group + head_h % own % self.per_group
        return query_places, group_places, group_places // copies


def attention_tensors(
    block: MixerBlock | None, heads: Heads, d_model: int, width: int
) -> dict[str, Tensor]:
    """Return the padded projections; those of no block give zero.

    Args:
        block: a layer's attention.
        heads: that it is padded to.
        d_model: D.
        width: K.
    """
    sizes = {"q": heads.queries, "k": heads.groups, "v": heads.groups}
    tensors = {f"{part}_proj.weight": torch.zeros(n, width, d_model) for part, n in sizes.items()}
    tensors |= {f"{part}_proj.bias": torch.zeros(n, width) for part, n in sizes.items()}
    o_weight_DHK = torch.zeros(d_model, heads.queries, width)
    o_bias_D = torch.zeros(d_model)
    if block is not None:
        spec, op = block.spec, block.op
        queries, groups, source = heads.places(spec.num_heads, spec.num_kv_heads)
        every = torch.arange(spec.num_heads)
        for part, places, copied in (
            ("q", queries, every),
            ("k", groups, source),
            ("v", groups, source),
        ):
            linear: Linear = getattr(op, f"{part}_proj")
            weight_hKD = linear.weight.detach().unflatten(0, (-1, width))
            tensors[f"{part}_proj.weight"][places] = weight_hKD[copied]
            if linear.bias is not None:
                tensors[f"{part}_proj.bias"][places] = linear.bias.detach().view(-1, width)[copied]
        o_proj = cast(Linear, op.o_proj)
        o_weight_DHK[:, queries] = o_proj.weight.detach().unflatten(1, (-1, width))
        if o_proj.bias is not None:
            o_bias_D = o_proj.bias.detach().clone()
    flat = {name: tensor.flatten(0, 1) for name, tensor in tensors.items()}
    return {**flat, "o_proj.weight": o_weight_DHK.flatten(1), "o_proj.bias": o_bias_D}


def ffn_tensors(block: FFNBlock | None, d_model: int, width: int) -> dict[str, Tensor]:
    """Return the padded maps; those of no block give zero.

    Args:
        block: a layer's gated FFN.
        d_model: D.
        width: F.
    """
    tensors: dict[str, Tensor] = {}
    for name in ("gate_proj", "up_proj", "down_proj"):
        shape = (d_model, width) if name == "down_proj" else (width, d_model)
        weight, bias = torch.zeros(shape), torch.zeros(shape[0])
        if block is not None:
            linear = getattr(block.op, name)
            rows, columns = linear.weight.shape
            weight[:rows, :columns] = linear.weight.detach()
            if linear.bias is not None:
                bias[:rows] = linear.bias.detach()
        tensors |= {f"{name}.weight": weight, f"{name}.bias": bias}
    return tensors
