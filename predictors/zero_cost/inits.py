"""How a scored network's weights are drawn. To add one: a function here, and a line in `INITS`.

Every sub-block draws from a generator of its own, seeded by its place in the network: where two
archs have the same sub-block in the same place, it has the same weights (common random numbers).
Archs are compared, so chance that they share does not blur the order.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import cast

import torch

from searchspace.linear import Linear
from searchspace.sub_blocks import FFNBlock, MixerBlock, reset_sub_block
from searchspace.subnet import Subnet

NORMAL_STD = 0.02
"""``initializer_range`` of BERT, GPT-2 and ELECTRA."""

Init = Callable[[Subnet, int], None]
"""Draws every parameter of a network anew, from a seed."""


def fan_in(network: Subnet, seed: int) -> None:
    """Draw what training begins with here: 1 / sqrt(inputs), output projections smaller."""
    reset_sub_block(network.ends, _generator(seed, "ends"), network.arch.depth)
    for name, block in network.blocks.items():
        reset_sub_block(
            cast(MixerBlock | FFNBlock, block), _generator(seed, name), network.arch.depth
        )


def normal(network: Subnet, seed: int) -> None:
    """Draw every linear map of the layers and the head from a normal of std `NORMAL_STD`.

    It is the same whatever the width, so that a wider stream makes larger activations. The inputs'
    tables and maps, norms, gates' biases and convolutions are as in `fan_in`.

    Source: Devlin et al. 2019, the published code's `initializer_range`; Radford et al. 2019,
    "Language Models are Unsupervised Multitask Learners", has the same.
    """
    fan_in(network, seed)
    parts = {**dict(network.blocks.items()), "head": network.ends.head}
    with torch.no_grad():
        for name, part in parts.items():
            generator = _generator(seed, f"{name} normal")
            for module in part.modules():
                if isinstance(module, Linear):
                    module.weight.normal_(0.0, NORMAL_STD, generator=generator)


def _generator(seed: int, name: str) -> torch.Generator:
    # A seed has up to 63 bits; the name's checksum is mixed into the low ones.
    return torch.Generator().manual_seed(seed ^ zlib.crc32(name.encode()))


INITS: dict[str, Init] = {"fan_in": fan_in, "normal": normal}
"""Every way to draw weights by name."""
