"""What hooks take from a forward and backward pass while it runs, already summed up.

Shapes: B batch, N sampled tokens or outputs of a linear map, F hidden units, H heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from searchspace.linear import Linear
from searchspace.sub_blocks import FFNBlock, MixerBlock
from searchspace.subnet import Subnet

MAX_PATTERN_TOKENS = 128
"""Tokens whose FFN activation signs are kept, spread evenly over the batch."""


class Recorder:
    """Records, while it is entered, one forward pass of a network and one backward pass.

    Nothing is kept that has one number per token and unit but the few tokens of `patterns`: a
    product of a value with its gradient is summed over positions as soon as the gradient is there.

    Args:
        network: what will run.
        batch: B.
    """

    def __init__(self, network: Subnet, batch: int) -> None:
        self.patterns: list[Tensor] = []
        """For every FFN which hidden units are positive, bool (N, F)."""
        self.channel_BN: dict[str, Tensor] = {}
        """For every linear map the sum over positions of ``output * dL/doutput``, float64."""
        self.head_BH: dict[str, Tensor] = {}
        """For every mixer the sum over positions and a head's channels of ``c * dL/dc``, float64;
        c is what enters its output projection."""
        self._network, self._batch = network, batch
        self._handles: list[Any] = []

    def __enter__(self) -> None:
        for name, module in self._network.named_modules():
            if isinstance(module, Linear):
                self._handles.append(module.register_forward_hook(self._watch_output(name)))
            if isinstance(module, MixerBlock):
                self._watch_heads(name, module)
            if isinstance(module, FFNBlock):
                # What enters the last map is the activation, of gated and plain FFNs alike.
                last = module.op.output_linear() or module.op.down_proj
                self._handles.append(last.register_forward_pre_hook(self._keep_pattern))

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _keep_pattern(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        hidden = inputs[0].detach().flatten(0, 1)
        stride = -(-len(hidden) // MAX_PATTERN_TOKENS)
        self.patterns.append(hidden[::stride] > 0)

    def _watch_output(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            self._sum_products(self.channel_BN, name, output)

        return hook

    def _watch_heads(self, name: str, block: MixerBlock) -> None:
        last, num_heads = block.op.output_linear(), block.spec.num_heads
        if last is None or not num_heads:
            return

        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self._sum_products(self.head_BH, name, inputs[0], num_heads)

        self._handles.append(last.register_forward_pre_hook(hook))

    def _sum_products(
        self, sums: dict[str, Tensor], name: str, value: Tensor, groups: int | None = None
    ) -> None:
        """Add to `sums` once the gradient of `value` is there; its last axis in `groups` parts."""
        kept = value.detach()

        def hook(gradient: Tensor) -> None:
            product = kept * gradient
            # A recurrence may run both directions side by side, as further sequences.
            by_sequence = product.unflatten(0, (-1, self._batch))
            parts = by_sequence.unflatten(-1, (groups or product.shape[-1], -1))
            inside = tuple(axis for axis in range(parts.ndim) if axis not in (1, parts.ndim - 2))
            summed = parts.sum(dim=inside, dtype=torch.float64)
            sums[name] = sums[name] + summed if name in sums else summed

        self._handles.append(value.register_hook(hook))
