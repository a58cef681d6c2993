"""The graphs of a network: one that reads a prompt, and one that goes on token by token.

Shapes: B batch, T tokens, P tokens before, V vocabulary or classes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor

from hw_profiles.backends.onnx_runtime.builder import Value
from hw_profiles.backends.onnx_runtime.linear import with_exportable_linears
from nas.export.onnx.builder import FreeBuilder, dim_of
from nas.export.onnx.recorder import Recorded, Sizes, record
from nas.export.onnx.states import growing
from searchspace.ends import Position
from searchspace.mixers import MIXERS
from searchspace.mixers.kv_cache import SegmentCache
from searchspace.specs import MixerSpec
from searchspace.subnet import Subnet

BATCH_HINT, TOKENS_HINT = 1009, 8179
"""Sizes that branches are taken for: large ones that nothing else in a network has."""
MANY_TOKENS = 1 << 30
"""Of states that are made to be looked at only."""


@dataclass(frozen=True)
class Graph:
    """A recorded graph with names for all that goes in and out.

    Args:
        recorded: nodes and constants.
        inputs: names and sizes of what it takes; a text stands for a free size.
        outputs: names and sizes of what it returns.
    """

    recorded: Recorded
    inputs: dict[str, list[int | str]]
    outputs: dict[str, list[int | str]]


@torch.inference_mode(False)
@torch.no_grad()
def graphs_of(subnet: Subnet, int8_tables: bool = False) -> dict[str, Graph]:
    """Return the graphs of a network: ``"prefill"`` and ``"decode"``, or ``"whole"``.

    Args:
        subnet: packed.
        int8_tables: whether the embedding is rounded to int8, with a scale per row.

    Raises:
        NotImplementedError: naming an operator that has no translation.
    """
    if not subnet.arch.family.causal:
        return {"whole": whole_graph(subnet, int8_tables)}
    return {
        "prefill": prefill_graph(subnet, int8_tables),
        "decode": decode_graph(subnet, int8_tables),
    }


def whole_graph(subnet: Subnet, int8_tables: bool = False) -> Graph:
    """Return the graph of an encoder or ViT: inputs to logits."""
    sizes, family = Sizes(), subnet.arch.family
    batch = sizes.free("batch", BATCH_HINT)
    if family.kind == "vit":
        image = (batch, family.channels, family.image_size, family.image_size)
        given = {"pixel_values": sizes.empty(image, torch.float32)}
    else:
        tokens = sizes.free("tokens", tokens_hint(subnet))
        given = {"input_ids": sizes.empty((batch, tokens), torch.int64)}
    network = with_exportable_linears(subnet, BATCH_HINT)

    def roots(b: FreeBuilder, values: Mapping[str, Value]) -> dict[str, Value]:
        (value,) = values.values()
        found = {"batch": axis_size(b, value, 0)}
        return found if family.kind == "vit" else {**found, "tokens": axis_size(b, value, 1)}

    recorded = record(lambda x: [network(x)], sizes, given, roots, int8_tables)
    return _named(recorded, ["logits"], sizes)


def prefill_graph(subnet: Subnet, int8_tables: bool = False) -> Graph:
    """Return the graph of a decoder that reads a prompt: token ids to logits and state."""
    sizes = Sizes()
    batch = sizes.free("batch", BATCH_HINT)
    tokens = sizes.free("tokens", tokens_hint(subnet))
    network = with_exportable_linears(subnet, BATCH_HINT)
    given = {"input_ids": sizes.empty((batch, tokens), torch.int64)}
    names: list[str] = []

    def run(inputs: Tensor) -> list[Tensor]:
        state = [
            None if part is None else growing(part, 0, lambda s, d: torch.zeros(*s, dtype=d))
            for part in network.init_state(batch, MANY_TOKENS)[:-1]
        ]
        logits = network(inputs, [*state, Position()])
        after = state_tensors(network, state)
        names[:] = after
        return [logits, *after.values()]

    def roots(b: FreeBuilder, values: Mapping[str, Value]) -> dict[str, Value]:
        ids = values["input_ids"]
        return {"batch": axis_size(b, ids, 0), "tokens": axis_size(b, ids, 1)}

    recorded = record(run, sizes, given, roots, int8_tables)
    outputs = ["logits", *(f"present.{name}" for name in names)]
    return _named(recorded, outputs, sizes)


def decode_graph(subnet: Subnet, int8_tables: bool = False) -> Graph:
    """Return the graph of a decoder that takes one more token and the state."""
    sizes = Sizes()
    batch = sizes.free("batch", BATCH_HINT)
    past = sizes.free("past", past_hint(subnet))
    network = with_exportable_linears(subnet, 1)
    with sizes.mode:
        made = network.init_state(batch, MANY_TOKENS)[:-1]
    state = [None if part is None else growing(part, past, sizes.empty) for part in made]
    before = {
        name: sizes.empty(tensor.shape, tensor.dtype)
        for name, tensor in state_tensors(network, state).items()
    }
    given = {
        "input_ids": sizes.empty((batch, 1), torch.int64),
        "past_length": sizes.empty((), torch.int64),
        **{f"past.{name}": tensor for name, tensor in before.items()},
    }

    def run(inputs: Tensor, _: Tensor, *tensors: Tensor) -> list[Tensor]:
        filled = filled_state(state, tensors)
        logits = network(inputs, [*filled, Position(cast(int, past))])
        return [logits, *state_tensors(network, filled).values()]

    def roots(b: FreeBuilder, values: Mapping[str, Value]) -> dict[str, Value]:
        length = b.reshape(values["past_length"], (1,))
        return {"batch": axis_size(b, values["input_ids"], 0), "past": length}

    recorded = record(run, sizes, given, roots, int8_tables)
    outputs = ["logits", *(f"present.{name}" for name in before)]
    return _named(recorded, outputs, sizes)


def tokens_hint(subnet: Subnet) -> int:
    """Return the number of tokens that branches are taken for: as many as the network can take."""
    arch = subnet.arch
    specs = [spec for _, spec in arch.named_sub_blocks()]
    most = [spec.max_tokens for spec in specs if _bounded(spec)]
    if arch.family.embedding_position == "learned":
        most.append(arch.family.max_tokens)
    # Not too near to the largest: blocks of tokens would fill that up.
    return min([TOKENS_HINT, *(_prime_below(7 * number // 8) for number in most)])


def past_hint(subnet: Subnet) -> int:
    """Return a number of tokens with which every segment is about to be full."""
    parts = subnet.init_state(1, 1, torch.device("meta"))
    whole = math.lcm(*(part.segment for part in parts if isinstance(part, SegmentCache)))
    most = tokens_hint(subnet)
    return most // whole * whole - 1 if whole > 1 and most > whole else most


def _bounded(spec: object) -> TypeGuard[MixerSpec]:
    return isinstance(spec, MixerSpec) and MIXERS[spec.mixer].bounded


def _prime_below(number: int) -> int:
    """Return the largest prime below a number, which is hardly ever the size of something else."""
    for candidate in range(number - 1, 2, -1):
        if all(candidate % divisor for divisor in range(2, int(candidate**0.5) + 1)):
            return candidate
    return max(number, 2)


def axis_size(b: FreeBuilder, value: Value, axis: int) -> Value:
    """Return the size (1,) of an input's axis."""
    return b.op("Shape", [value], (1,), torch.int64, start=axis, end=axis + 1)


def state_tensors(network: Any, state: Sequence[Any]) -> dict[str, Tensor]:
    """Return all tensors of a state by names such as ``"layer0_mixer.k"``."""
    found = {}
    for block, part in zip(network.blocks, state, strict=True):
        for field in fields(part) if part is not None else ():
            tensor = getattr(part, field.name)
            if isinstance(tensor, Tensor):
                found[f"{block}.{field.name.rpartition('_')[0]}"] = tensor
    return found


def filled_state(state: Sequence[Any], tensors: Sequence[Tensor]) -> list[Any]:
    """Return copies of all parts of a state with other tensors, in the order of their fields."""
    rest, filled = list(tensors), []
    for part in state:
        part = copy.copy(part)
        for field in fields(part) if part is not None else ():
            if isinstance(getattr(part, field.name), Tensor):
                setattr(part, field.name, rest.pop(0))
        filled.append(part)
    return filled


def _named(recorded: Recorded, outputs: Sequence[str], sizes: Sizes) -> Graph:
    """Return a graph with its outputs named, and free sizes called by what they are."""

    def dims(value: Value) -> list[int | str]:
        found = []
        for size in value.shape:
            dim = dim_of(size)
            for name, symbol in sizes.symbols.items():
                dim = dim.replace(symbol, name) if isinstance(dim, str) else dim
            found.append(dim)
        return found

    given = {value.name: dims(value) for value in recorded.inputs}
    pairs = zip(outputs, recorded.outputs, strict=True)
    return Graph(recorded, given, {name: dims(value) for name, value in pairs})
