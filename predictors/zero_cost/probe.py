"""One freshly initialised network on one batch: everything the metrics look at, computed once.

Shapes: B batch, T tokens, D d_model, V vocabulary, N sampled tokens, F hidden units of an FFN.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from searchspace.arch import Arch
from searchspace.errors import UserError
from searchspace.linear import Linear
from searchspace.sub_blocks import FFNBlock
from searchspace.subnet import Subnet

Batch = tuple[Tensor, Tensor]
"""Input and target token ids, both int64 of shape (B, T)."""

MAX_PATTERN_TOKENS = 128
"""Tokens whose FFN activation signs are kept, spread evenly over the batch."""

MIN_SENSITIVITY = 1e-4
"""Nats per relative change of all weights, below which a loss of about a nat is constant.

Rounding noise of float32 stays some tens of times below it, real networks some thousand times
above.
"""


@dataclass(frozen=True)
class LossPass:
    """What one forward and backward pass of the task loss leaves behind.

    Args:
        loss: mean cross-entropy in nats per token.
        weights: every linear map's weight by name.
        gradients: the loss's gradient of each of them.
        patterns: for every FFN which hidden units are positive, bool (N, F).
        jacobian_BTD: gradient of the sum of all logits with respect to the embedded tokens.
    """

    loss: float
    weights: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor]
    patterns: tuple[Tensor, ...]
    jacobian_BTD: Tensor


class Probe:
    """An arch's network at random weights, on one batch.

    Nothing is computed before a metric asks for it, and nothing twice.

    Args:
        arch: what is scored.
        batch: inputs and targets.
        seed: of the weights.
        dtype: float64 only serves to check the arithmetic of float32.

    Raises:
        UserError: when the batch is not two equal (B, T) int64 tensors of known tokens.
    """

    def __init__(
        self, arch: Arch, batch: Batch, seed: int, dtype: torch.dtype = torch.float32
    ) -> None:
        check_batch(batch, arch.vocab_size)
        self.arch = arch
        self.inputs_BT, self.targets_BT = batch
        self._seed, self._dtype = seed, dtype

    @cached_property
    def network(self) -> Subnet:
        """The network at its initial weights; no metric changes them."""
        network = Subnet(self.arch).reset(torch.Generator().manual_seed(self._seed))
        return network.to(self._dtype)

    @cached_property
    def loss_pass(self) -> LossPass:
        """The task loss, its gradients and what else falls off on the way.

        Raises:
            UserError: when the loss is not finite or does not depend on the weights.
        """
        network, patterns = self.network, _SignPatterns(self.network)
        weights = linear_weights(network)
        with torch.enable_grad(), patterns:
            x_BTD = network.ends.embed(self.inputs_BT).detach().requires_grad_()
            logits_BTV = run_blocks(network, x_BTD)
            loss = F.cross_entropy(logits_BTV.flatten(0, 1), self.targets_BT.flatten())
            # Needs the graph for the Jacobian too, but not the weights' gradients a second time.
            grads = torch.autograd.grad(loss, list(weights.values()), retain_graph=True)
            (jacobian_BTD,) = torch.autograd.grad(logits_BTV.sum(), x_BTD)
        gradients = dict(zip(weights, grads, strict=True))
        check_gradients(loss.item(), weights, gradients)
        return LossPass(loss.item(), weights, gradients, tuple(patterns.kept), jacobian_BTD)

    def copy_network(self) -> Subnet:
        """Return a float64 copy that may be changed."""
        return copy.deepcopy(self.network).double()


Metric = Callable[[Probe], float]
"""A training-free metric: higher means expected better. Its name is its key in `METRICS`."""


def linear_weights(network: nn.Module) -> dict[str, Tensor]:
    """Return the weight of every linear map by name: what saliencies sum over.

    The embedding is a table look-up (only rows of tokens in the batch would count), and norms and
    biases are no connections.
    """
    return {
        name: module.weight
        for name, module in network.named_modules()
        if isinstance(module, Linear)
    }


def run_blocks(network: Subnet, x_BTD: Tensor) -> Tensor:
    """Return the logits (B, T, V) of embedded tokens."""
    for block in network.blocks.values():
        x_BTD = block(x_BTD)
    return network.ends.logits(x_BTD)


def check_batch(batch: Batch, vocab_size: int) -> None:
    """Refuse a batch that no metric could use.

    Raises:
        UserError: saying what is wrong with it.
    """
    inputs, targets = batch
    if inputs.ndim != 2 or inputs.shape != targets.shape or not inputs.numel():
        raise UserError(
            f"training-free metrics got inputs {tuple(inputs.shape)} and targets "
            f"{tuple(targets.shape)}; give two token tensors of the same shape (batch, tokens)"
        )
    for name, tokens in (("inputs", inputs), ("targets", targets)):
        if tokens.dtype != torch.int64:
            raise UserError(f"{name} of a batch have dtype {tokens.dtype}; give int64 token ids")
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= vocab_size:
            raise UserError(
                f"{name} of a batch hold token ids from {low} to {high}; the arch's vocabulary has "
                f"ids 0 to {vocab_size - 1}"
            )


def check_gradients(
    loss: float, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor]
) -> None:
    """Refuse a loss whose gradient is missing: scores would be made of rounding noise.

    `|g| |W|` is how strongly the loss answers to a relative change of all weights. (A sum of
    layer-normalised outputs, used as a loss by published benchmarks of such metrics, is constant:
    its gradient is rounding noise and fails the test.)

    Raises:
        UserError: when the loss or a gradient is not finite, or the gradient vanishes.
    """
    if not math.isfinite(loss):
        raise UserError(f"the loss at random weights is {loss}; the arch cannot be scored")
    for name, gradient in gradients.items():
        if not bool(torch.isfinite(gradient).all()):
            raise UserError(f"the gradient of {name} at random weights is not finite")
    sensitivity = _norm(gradients) * _norm(weights)
    if sensitivity <= MIN_SENSITIVITY * max(1.0, abs(loss)):
        raise UserError(
            f"the gradient vanishes (|g||W| = {sensitivity:.1e} for a loss of {loss:.3g}), so the "
            "loss is constant; score with a loss that depends on the weights"
        )


def _norm(tensors: Mapping[str, Tensor]) -> float:
    return math.sqrt(sum(float(t.detach().double().square().sum()) for t in tensors.values()))


class _SignPatterns:
    """Records which hidden units of every FFN are positive, while it is entered."""

    def __init__(self, network: Subnet) -> None:
        self.kept: list[Tensor] = []
        self._ffns = [b.op for b in network.blocks.values() if isinstance(b, FFNBlock)]

    def __enter__(self) -> None:
        # What enters the last map is the activation, of gated and plain FFNs alike.
        self._hooks = [ffn.down_proj.register_forward_pre_hook(self._keep) for ffn in self._ffns]

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _keep(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        hidden = inputs[0].detach().flatten(0, 1)
        stride = -(-len(hidden) // MAX_PATTERN_TOKENS)
        self.kept.append(hidden[::stride] > 0)
