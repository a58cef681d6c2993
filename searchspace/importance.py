"""Importance ordering: what a network needs most comes first, where slices keep it.

A smaller arch uses the leading features, heads and FFN channels of the supernet. Before slicing,
they are put in the order of their importance to the largest network, whose function stays the same.

Shapes: D d_model, H query heads, G key/value heads, R = H / G.

Source: Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning", equation 3 and
section 3.1 (first-order Taylor expansion); Michel et al. 2019, "Are Sixteen Heads Really Better
than One?", section 4.1 (heads); Munoz et al. 2024, "EFTNAS" (reordering before slicing).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from searchspace.arch import width_of_head
from searchspace.ends import Ends
from searchspace.errors import UserError
from searchspace.ffn import FFNS
from searchspace.mixers import MIXERS
from searchspace.norms import NORMS
from searchspace.specs import EndsSpec, MixerSpec, SubBlockSpec
from searchspace.sub_blocks import param_axes
from searchspace.supernet import Supernet

Axes = dict[str, tuple[str, ...]]
Scores = dict[str, tuple[Tensor, ...]]
"""By parameter, the importance of every place on each of its axes."""
LossFn = Callable[[Tensor, Tensor], Tensor]
Batches = Sequence[tuple[Tensor, Tensor]]
MAX_CHANGE = 1e-3
"""Largest relative change of the largest network's logits; an ordering beyond it is taken back.
Rounding alone gives about 1e-6; operators that tell their heads or features apart give far more."""
FEATURES, FFN_CHANNELS, Q_HEADS, KV_HEADS = (
    "d_model", "intermediate_size", "num_heads", "num_kv_heads",
)  # fmt: skip
"""Dimensions that are ordered."""


def order_by_importance(supernet: Supernet, batches: Batches, loss_fn: LossFn) -> Supernet:
    """Put the most important features, heads and FFN channels of a supernet first, in place.

    Features of the residual stream have one order in the whole network, FFN channels and heads one
    per slot. Query heads stay with the key/value head they read. Nothing moves inside a head, where
    rotary positions pair features up. The largest network computes the same as before; where an
    operator depends on an order (Fourier transforms over features, position biases per head),
    that order stays.

    Args:
        supernet: its largest network is trained. Momenta of an optimizer no longer fit afterwards.
        batches: (inputs, targets) pairs that importance is judged on.
        loss_fn: gives the loss of logits and targets.

    Returns:
        The same supernet.

    Raises:
        UserError: when there is no batch.
    """
    if not batches:
        raise UserError("importance ordering needs at least one batch; none was given")
    axes = _named_axes(supernet)
    scores = _taylor_scores(supernet, batches, loss_fn)
    probe = batches[0][0]
    expected = _logits(supernet, probe)
    for order in _orders(supernet, axes, scores):
        _permute(supernet, axes, order)
        if _change(_logits(supernet, probe), expected) > MAX_CHANGE:
            _permute(supernet, axes, order.inverse())
    return supernet


@dataclass(frozen=True)
class _Order:
    """New orders of named dimensions.

    Args:
        prefix: of the tensors it holds for.
        units: by dimension, which unit comes to each place.
    """

    prefix: str
    units: dict[str, Tensor]

    def inverse(self) -> _Order:
        return _Order(self.prefix, {name: unit.argsort() for name, unit in self.units.items()})


def _orders(supernet: Supernet, axes: Axes, scores: Scores) -> Iterator[_Order]:
    """Yield the orders by importance, each for itself."""
    space, head_dim = supernet.space, _head_dim(supernet)

    def score(prefix: str, dimension: str, num_units: int) -> Tensor:
        parts = [
            _unit_scores(per_place, num_units, _unit_size(axis_name, head_dim))
            for name, values in scores.items()
            if name.startswith(prefix)
            for per_place, axis_name in zip(values, axes[name], strict=True)
            if _dimension(axis_name) == dimension
        ]
        return sum(parts, torch.zeros(num_units))

    for slot, layer in enumerate(space.largest().layers):
        if layer.intermediate_size:
            prefix = f"blocks.layer{slot}_ffn."
            channels = score(prefix, FFN_CHANNELS, layer.intermediate_size)
            yield _Order(prefix, {FFN_CHANNELS: channels.argsort(descending=True)})
        if layer.num_heads:
            prefix = f"blocks.layer{slot}_mixer."
            query_H = score(prefix, Q_HEADS, layer.num_heads)
            yield _head_order(prefix, query_H, score(prefix, KV_HEADS, layer.num_kv_heads))
    if not _depends_on_features(supernet):
        features = score("", FEATURES, max(space.d_model))
        yield _Order("", {FEATURES: features.argsort(descending=True)})


def _unit_scores(per_place: Tensor, num_units: int, unit_size: int) -> Tensor:
    """Return the sum over all places that belong to a unit of an axis, for the leading units."""
    return per_place[: num_units * unit_size].unflatten(0, (num_units, unit_size)).sum(dim=1)


def _head_order(prefix: str, query_H: Tensor, group_G: Tensor) -> _Order:
    """Order key/value heads with all that read them, and query heads inside these groups."""
    query_GR = query_H.unflatten(0, (len(group_G), -1))
    groups_G = (group_G + query_GR.sum(dim=1)).argsort(descending=True)
    inside_GR = query_GR.argsort(dim=1, descending=True)
    queries_GR = groups_G[:, None] * query_GR.shape[1] + inside_GR[groups_G]
    return _Order(prefix, {Q_HEADS: queries_GR.flatten(), KV_HEADS: groups_G})


def _taylor_scores(supernet: Supernet, batches: Batches, loss_fn: LossFn) -> Scores:
    """Return `|weight * gradient|` of the largest network's parameters, summed over batches."""
    buffers = {name: buffer.clone() for name, buffer in supernet.buffers.items()}
    scores: Scores = {}
    for inputs, targets in batches:
        supernet.start_step()
        view = supernet.view(supernet.space.largest(), train=True)
        with warnings.catch_warnings():
            # The gradient slices are strided on purpose (see Supernet).
            warnings.filterwarnings("ignore", message="grad and param do not obey")
            loss_fn(view(inputs), targets).backward()
        supernet.publish_gradients()
        for name, param in supernet.named_parameters():
            if param.grad is not None:
                found = _per_axis((param.detach() * param.grad).abs_())
                old = scores.get(name)
                scores[name] = found if old is None else tuple(map(torch.add, old, found))
    supernet.start_step()
    supernet.publish_gradients()
    for name, buffer in buffers.items():
        # Views that train update running statistics.
        supernet.buffers[name].copy_(buffer)
    return scores


def _per_axis(value: Tensor) -> tuple[Tensor, ...]:
    """Return the sums over everything but one axis, for each axis."""
    axes = range(value.ndim)
    return tuple(value.sum(dim=[a for a in axes if a != axis]) if value.ndim > 1 else value
                 for axis in axes)  # fmt: skip


def _named_axes(supernet: Supernet) -> Axes:
    """Return the named axes of every parameter and buffer.

    Where two operators share a parameter under different names for its axes, those of the largest
    network hold: it must not change.
    """
    space = supernet.space
    largest = space.largest()
    by_kind: dict[str, Axes] = {"mixer": {}, "ffn": {}, "ends": {}}
    for spec in [*largest.sub_blocks(), *space.sub_blocks()]:
        kind = "mixer" if isinstance(spec, MixerSpec) else "ffn"
        kind = "ends" if isinstance(spec, EndsSpec) else kind
        for name, named in {**param_axes(spec), **_buffer_axes(spec)}.items():
            by_kind[kind].setdefault(name, named)
    axes: Axes = {"ends." + name: named for name, named in by_kind.pop("ends").items()}
    for slot in range(space.num_layers):
        for kind, found in by_kind.items():
            axes |= {f"blocks.layer{slot}_{kind}.{name}": named for name, named in found.items()}
    return axes


def _buffer_axes(spec: SubBlockSpec) -> Axes:
    if isinstance(spec, EndsSpec):
        return Ends.buffer_axes(spec)
    named = NORMS[spec.norm].buffer_axes
    return {f"{norm}.{name}": axes for norm in ("norm", "norm_out") for name, axes in named.items()}


def _depends_on_features(supernet: Supernet) -> bool:
    """Whether an operator of the space gives the features of the residual stream a meaning."""
    space = supernet.space
    operators = [MIXERS.get(name) for name in space.mixers] + [FFNS.get(n) for n in space.ffn]
    return any(getattr(operator, "feature_order", False) for operator in operators)


def _dimension(axis_name: str) -> str:
    return axis_name.partition("*")[0]


def _head_dim(supernet: Supernet) -> int:
    """Return the width of the largest network's heads, the same in all of its slots."""
    largest = supernet.space.largest()
    return width_of_head(largest.layers[0], largest.d_model, largest.head_dim)


def _unit_size(axis_name: str, head_dim: int) -> int:
    """Return how many neighbours on an axis belong to one unit: a head has `head_dim`."""
    if "*" not in axis_name:
        return 1
    if axis_name.endswith("*head_dim"):
        return head_dim
    raise UserError(f"importance ordering does not know the axis {axis_name!r}; switch it off")


@torch.no_grad()
def _permute(supernet: Supernet, axes: Axes, order: _Order) -> None:
    """Bring units to their new places on every axis that has them."""
    head_dim = _head_dim(supernet)
    for name, tensor in supernet.state_dict().items():
        if not name.startswith(order.prefix):
            continue
        for axis, axis_name in enumerate(axes[name]):
            unit = order.units.get(_dimension(axis_name))
            if unit is not None:
                size = _unit_size(axis_name, head_dim)
                places = (unit[:, None] * size + torch.arange(size)).flatten()
                # Heads beyond those of the largest network stay, and so does what has fewer: an
                # operator with fewer key/value heads that the largest network does not use.
                if tensor.shape[axis] >= len(places):
                    part = tensor.narrow(axis, 0, len(places))
                    part.copy_(part.index_select(axis, places))


@torch.no_grad()
def _logits(supernet: Supernet, inputs: Tensor) -> Tensor:
    return supernet.view(supernet.space.largest())(inputs).float()


def _change(actual: Tensor, expected: Tensor) -> float:
    """Return the RMS of the difference relative to the RMS of what is expected."""
    return ((actual - expected).norm() / expected.norm().clamp_min(1e-12)).item()
