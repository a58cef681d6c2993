"""`Subnet`: the plain network of an `Arch`, which is exported, profiled and scored.

Shapes: B batch, T tokens, D d_model, V vocabulary or classes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from searchspace.arch import Arch
from searchspace.checkpoint import load_subnet, save_subnet
from searchspace.ends import Ends, Position
from searchspace.mixers.base import SharedKV
from searchspace.packing import pack
from searchspace.specs import MixerSpec
from searchspace.sub_blocks import (
    FFNBlock,
    MixerBlock,
    build_sub_block,
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
        self.rewrites: tuple[str, ...] = ()
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
        """Return the empty state of every sub-block and the position, for `forward`."""
        blocks = [
            None if _borrows(block) else block.init_state(batch, max_tokens, device)
            for block in self._blocks()
        ]
        return [*blocks, Position()]

    def forward(self, inputs: Tensor, state: list[Any] | None = None) -> Tensor:
        """Return logits: (B, T, V) of a decoder, one row per class (B, V) of the others.

        Args:
            inputs: token ids (B, T), int64, or images (B, channels, height, width).
            state: from `init_state`; tokens continue what it has seen, and it is updated in place.
                One call with all tokens, or any split into calls, gives the same logits.
        """
        return self.ends.logits(self.features(inputs, state), inputs)

    def features(self, inputs: Tensor, state: list[Any] | None = None) -> Tensor:
        """Return the residual stream after the last layer, (B, T, D), the class token first."""
        if state is None:
            return self.run_layers(self.ends.embed(inputs), None, self.ends.visible(inputs))
        x_BTD = self.run_layers(self.ends.embed(inputs, state[-1].length), state[:-1])
        state[-1].length += inputs.shape[1]
        return x_BTD

    def run_layers(
        self,
        x_BTD: Tensor,
        states: list[Any] | None = None,
        visible_BT: Tensor | None = None,
    ) -> Tensor:
        """Return what the layers make of the embedded inputs, same shape.

        Args:
            x_BTD: the embedded inputs.
            states: of the sub-blocks.
            visible_BT: which tokens softmax attention does not leave out; None for all.
        """
        states = [None] * len(self.blocks) if states is None else states
        shared = SharedKV(visible_BS=visible_BT)
        for block, block_state in zip(self._blocks(), states, strict=True):
            if isinstance(block, MixerBlock):
                x_BTD = block(x_BTD, block_state, shared)
            else:
                x_BTD = block(x_BTD, block_state)
        return x_BTD

    def _blocks(self) -> list[MixerBlock | FFNBlock]:
        return [cast(MixerBlock | FFNBlock, block) for block in self.blocks.values()]

    def pack(self) -> Subnet:
        """Take the form that is stored and run (inference only); returns itself.

        On the meta device the form is taken without values, for loading.
        """
        pack(self)
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


def _borrows(block: MixerBlock | FFNBlock) -> bool:
    """Whether a block has no state of its own, but reads an earlier layer's."""
    return isinstance(block, MixerBlock) and block.spec.kv_shared


def weight_bytes(module: nn.Module) -> int:
    """Return the bytes a module's weights take once packed: those of a packed copy on meta."""
    tensors = [*module.parameters(), *module.buffers()]
    # Told that these are copied already, `deepcopy` copies the structure and no values.
    memo: dict[int, Any] = {id(tensor): tensor.detach().to("meta") for tensor in tensors}
    memo |= {id(p): nn.Parameter(memo[id(p)], p.requires_grad) for p in module.parameters()}
    copied = copy.deepcopy(module, memo)
    pack(copied)
    return sum(t.numel() * t.element_size() for t in copied.state_dict().values())


def state_bytes(state: list[Any]) -> int:
    """Return the bytes of a state: the key/value caches and recurrent states."""
    tensors = (t for block in state if block is not None for t in block.tensors().values())
    return sum(t.numel() * t.element_size() for t in tensors)
