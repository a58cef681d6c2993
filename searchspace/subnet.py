"""`Subnet`: the plain network of an `Arch`, which is exported, profiled and scored.

Shapes: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from searchspace.arch import Arch
from searchspace.checkpoint import load_subnet, pack_empty, save_subnet
from searchspace.linear import Linear
from searchspace.specs import MixerSpec
from searchspace.sub_blocks import (
    Ends,
    FFNBlock,
    MixerBlock,
    build_sub_block,
    pack,
    reset_sub_block,
)


def block_name(slot: int, spec: object) -> str:
    """Return the attribute name of a slot's sub-block, such as ``"layer3_mixer"``."""
    return f"layer{slot}_{'mixer' if isinstance(spec, MixerSpec) else 'ffn'}"


class Subnet(nn.Module):
    """The network of an arch, at its final size; knows nothing of supernets.

    Parameters are uninitialised after construction: `reset` them, load them, or get the network
    from `Supernet.extract`.

    Args:
        arch: what to build. Skipped slots leave no trace.
    """

    def __init__(self, arch: Arch) -> None:
        super().__init__()
        self.arch = arch
        self.ends = Ends(arch.ends)
        self.blocks = nn.ModuleDict(
            {
                block_name(slot, spec): build_sub_block(spec)
                for slot, spec in arch.named_sub_blocks()
            }
        )

    def reset(self, generator: torch.Generator) -> Subnet:
        """Initialise every parameter at random; returns itself."""
        for module in self.modules():
            if isinstance(module, MixerBlock | FFNBlock | Ends):
                reset_sub_block(module, generator, self.arch.depth)
        return self

    def init_state(
        self, batch: int, max_tokens: int, device: torch.device | None = None
    ) -> list[Any]:
        """Return the empty state of every sub-block, for `forward`."""
        return [
            cast(MixerBlock | FFNBlock, block).init_state(batch, max_tokens, device)
            for block in self.blocks.values()
        ]

    def forward(self, tokens_BT: Tensor, state: list[Any] | None = None) -> Tensor:
        """Return logits (B, T, V) for the next token at every position.

        Args:
            tokens_BT: token ids, int64.
            state: from `init_state`; tokens continue what it has seen, and it is updated in place.
                One call with all tokens, or any split into calls, gives the same logits.
        """
        x_BTD = self.ends.embed(tokens_BT)
        states = [None] * len(self.blocks) if state is None else state
        for block, block_state in zip(self.blocks.values(), states, strict=True):
            x_BTD = block(x_BTD, block_state)
        return self.ends.logits(x_BTD)

    def pack(self) -> Subnet:
        """Turn int8 layers into their real int8 form (inference only); returns itself."""
        pack(self)
        return self

    def pack_empty(self) -> Subnet:
        """Take the packed form without computing values (for loading); returns itself."""
        pack_empty(self)
        return self

    def save(self, folder: Path | str, facts: Mapping[str, Any] | None = None) -> None:
        """Write `config.json` and `model.safetensors`; see `searchspace.checkpoint.save_subnet`."""
        save_subnet(self, Path(folder), facts)

    @classmethod
    def load(cls, folder: Path | str) -> Subnet:
        """Read an exported folder, ready for inference.

        Raises:
            UserError: when a file is absent, truncated, or of another kind or arch.
        """
        return load_subnet(Path(folder))

    def weight_bytes(self) -> int:
        """Bytes of all weights as stored after `pack`."""
        return sum(weight_bytes(block) for block in [self.ends, *self.blocks.values()])


def weight_bytes(module: nn.Module) -> int:
    """Return the bytes a module's weights take once packed (int8 values and fp32 row scales)."""
    total = 0
    for child in module.modules():
        for name, tensor in [
            *child.named_parameters(recurse=False),
            *child.named_buffers(recurse=False),
        ]:
            if isinstance(child, Linear) and child.precision == "int8" and name == "weight":
                total += tensor.numel() + 4 * tensor.shape[0]
            elif name != "weight_scale":
                total += tensor.numel() * tensor.element_size()
    return total


def state_bytes(state: list[Any]) -> int:
    """Return the bytes of a state: the key/value caches and recurrent states."""
    tensors = (t for block in state if block is not None for t in block.tensors().values())
    return sum(t.numel() * t.element_size() for t in tensors)
