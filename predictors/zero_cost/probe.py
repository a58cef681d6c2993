"""One freshly initialised network on one batch: everything the metrics look at, computed once.

Shapes: B batch, T tokens, C channels, H height, W width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from predictors.zero_cost._stateless import forget_batches
from predictors.zero_cost.flow_pass import FlowPass, run_flow_pass
from predictors.zero_cost.forward_pass import ForwardPass, forward_pass
from predictors.zero_cost.inits import INITS
from predictors.zero_cost.loss_pass import LossPass, run_loss_pass
from searchspace.arch import Arch
from searchspace.errors import UserError, unknown
from searchspace.norms import PRepBN
from searchspace.subnet import Subnet

Batch = tuple[Tensor, Tensor]
"""Inputs and targets: token ids (B, T) and the next ones (B, T) of a decoder; token ids (B, T) or
images (B, C, H, W), float32, and classes (B,) of an encoder or ViT. Ids and targets are int64."""

IGNORED = -100
"""The target of a position that is not scored; `torch`'s own ``ignore_index``."""


class Probe:
    """An arch's network at random weights, on one batch.

    Nothing is computed before a metric asks for it, and nothing twice.

    Args:
        arch: what is scored.
        batch: inputs and targets.
        seed: of the weights.
        dtype: float64 only serves to check the arithmetic of float32.
        init: how weights are drawn, a key of `predictors.zero_cost.inits.INITS`.

    Raises:
        UserError: when the batch does not fit the arch's inputs and outputs, or for an unknown
            init.
    """

    def __init__(
        self,
        arch: Arch,
        batch: Batch,
        seed: int,
        dtype: torch.dtype = torch.float32,
        init: str = "fan_in",
    ) -> None:
        if init not in INITS:
            raise unknown("init", init, INITS)
        check_batch(batch, arch)
        self.arch = arch
        self.inputs, self.targets = batch
        if self.inputs.is_floating_point():
            self.inputs = self.inputs.to(dtype)
        self.seed, self._dtype, self._init = seed, dtype, init

    @cached_property
    def network(self) -> Subnet:
        """The network as training begins with it; no metric changes its weights.

        Annealed norms are in their exact form then; their final one is made for trained weights
        and would let the stream explode at random ones. Norms that remember batches are in the form
        that they have for the first one, so that no pass depends on how many went before it.
        """
        network = Subnet(self.arch)
        INITS[self._init](network, self.seed)
        for module in network.modules():
            if isinstance(module, PRepBN):
                module.blend = 1.0
        forget_batches(network)
        return network.to(self._dtype)

    @property
    def num_tokens(self) -> int:
        """Tokens of one sequence inside the network, a class token counted."""
        family = self.arch.family
        outside = family.max_tokens if family.kind == "vit" else self.inputs.shape[1]
        return outside + family.num_extra_tokens

    @cached_property
    def loss_pass(self) -> LossPass:
        """The task loss, its gradients and what else falls off on the way.

        Raises:
            UserError: when the loss is not finite or does not depend on the weights.
        """
        return run_loss_pass(self.network, self.inputs, self.targets)

    @cached_property
    def forward_pass(self) -> ForwardPass:
        """What activations are like on the batch, without gradients.

        Raises:
            UserError: when all tokens are padding or the stream does not stay finite.
        """
        return forward_pass(self.network, self.inputs)

    @cached_property
    def flow_pass(self) -> FlowPass:
        """The flow of ones through positive weights."""
        return run_flow_pass(self.copy_network(), self.num_tokens)

    def copy_network(self) -> Subnet:
        """Return a float64 copy that may be changed."""
        return copy.deepcopy(self.network).double()


Metric = Callable[[Probe], float]
"""A training-free metric: higher means expected better. Its name is its key in `METRICS`."""


def check_batch(batch: Batch, arch: Arch) -> None:
    """Refuse a batch that no metric could use.

    Raises:
        UserError: saying what is wrong with it.
    """
    inputs, targets = batch
    family = arch.family
    if family.kind == "vit":
        size = family.image_size
        wanted = f"images (batch, {family.channels}, {size}, {size})"
        fits = tuple(inputs.shape[1:]) == (family.channels, size, size)
    else:
        wanted, fits = "tokens (batch, tokens)", inputs.ndim == 2
    if not fits or not inputs.numel():
        raise UserError(
            f"training-free metrics got inputs {tuple(inputs.shape)} in family {family.kind!r}; "
            f"give {wanted}"
        )
    expected = tuple(inputs.shape[:1]) if family.num_classes else tuple(inputs.shape)
    if tuple(targets.shape) != expected:
        raise UserError(
            f"training-free metrics got inputs {tuple(inputs.shape)} and targets "
            f"{tuple(targets.shape)} in family {family.kind!r}; give targets of shape {expected}"
        )
    if family.kind != "vit":
        _check_ids("inputs", inputs, inputs, arch.vocab_size)
    scored = targets[targets != IGNORED]
    _check_ids("targets", targets, scored, family.num_classes or arch.vocab_size)


def _check_ids(name: str, given: Tensor, ids: Tensor, size: int) -> None:
    if given.dtype != torch.int64:
        raise UserError(f"{name} of a batch have dtype {given.dtype}; give int64 ids")
    if not ids.numel():
        raise UserError(f"none of the {name} of a batch is scored; give a batch with targets")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= size:
        raise UserError(
            f"{name} of a batch hold ids from {low} to {high}; the arch has ids 0 to {size - 1}"
        )
