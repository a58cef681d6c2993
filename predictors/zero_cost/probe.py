"""One freshly initialised network on one batch: everything the metrics look at, computed once.

Shapes: B batch, T tokens, D d_model, V vocabulary or classes, N sampled tokens, F hidden units of
an FFN, C channels, H height, W width.
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
from searchspace.norms import PRepBN
from searchspace.sub_blocks import FFNBlock
from searchspace.subnet import Subnet

Batch = tuple[Tensor, Tensor]
"""Inputs and targets: token ids (B, T) and the next ones (B, T) of a decoder; token ids (B, T) or
images (B, C, H, W), float32, and classes (B,) of an encoder or ViT. Ids and targets are int64."""

IGNORED = -100
"""The target of a position that is not scored; `torch`'s own ``ignore_index``."""

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
        loss: mean cross-entropy in nats per scored target.
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
        UserError: when the batch does not fit the arch's inputs and outputs.
    """

    def __init__(
        self, arch: Arch, batch: Batch, seed: int, dtype: torch.dtype = torch.float32
    ) -> None:
        check_batch(batch, arch)
        self.arch = arch
        self.inputs, self.targets = batch
        if self.inputs.is_floating_point():
            self.inputs = self.inputs.to(dtype)
        self._seed, self._dtype = seed, dtype

    @cached_property
    def network(self) -> Subnet:
        """The network as training begins with it; no metric changes its weights.

        Annealed norms are in their exact form then; their final one is made for trained weights
        and would let the stream explode at random ones.
        """
        network = Subnet(self.arch).reset(torch.Generator().manual_seed(self._seed))
        for module in network.modules():
            if isinstance(module, PRepBN):
                module.blend = 1.0
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
        network, patterns = self.network, _SignPatterns(self.network)
        weights = linear_weights(network)
        with torch.enable_grad(), patterns:
            x_BTD = network.ends.embed(self.inputs)
            logits = network.ends.logits(network.run_layers(x_BTD), self.inputs)
            loss = F.cross_entropy(logits.flatten(0, -2), self.targets.flatten())
            # Needs the graph for the Jacobian too, but not the weights' gradients a second time.
            grads = torch.autograd.grad(
                loss, list(weights.values()), retain_graph=True, materialize_grads=True
            )
            (jacobian_BTD,) = torch.autograd.grad(logits.sum(), x_BTD)
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
        last = [ffn.output_linear() or ffn.down_proj for ffn in self._ffns]
        self._hooks = [linear.register_forward_pre_hook(self._keep) for linear in last]

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _keep(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        hidden = inputs[0].detach().flatten(0, 1)
        stride = -(-len(hidden) // MAX_PATTERN_TOKENS)
        self.kept.append(hidden[::stride] > 0)
