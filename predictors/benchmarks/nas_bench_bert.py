"""NAS-Bench-BERT: trained encoders with their GLUE scores, as archs of the preset of that name.

The networks were trained another way than their description says, so there are two readings:

- ``"trained"``: every layer's mixer is softmax attention, and the feed-forward stack has the widths
  ``[4 * hidden] + [feed_forward_dimension] * (num_feed_forward - 1)``;
- ``"nominal"``: the described mixer (weighted multiplicative attention, Fourier or cosine mixing,
  dynamic convolution), and a stack of ``[feed_forward_dimension] * num_feed_forward``.

Source: Serianni and Kalita 2023, "Training-free Neural Architecture Search for RNNs and
Transformers", section 4.2 (the benchmark); Tuli et al. 2022, "FlexiBERT", section 3.1 and table 1
(the space); Clark et al. 2020, "ELECTRA", section 3.1 (the small model that it varies).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from searchspace.arch import Arch
from searchspace.errors import UserError, unknown
from searchspace.files import read_json
from searchspace.layer_arch import LayerArch
from searchspace.space import SearchSpace

FILE_NAME = "BERT_benchmark.json"
PRESET = "nas-bench-bert"
VOCAB_SIZE = 30522
"""Word pieces of the uncased BERT vocabulary."""
READINGS = ("trained", "nominal")
GLUE = "glue"
"""The score that networks are ranked by: the mean over the tasks."""
MIXERS: dict[tuple[str, str | int], tuple[str, dict[str, Any]]] = {
    ("SA", "SDP"): ("softmax", {}),
    ("SA", "WMA"): ("softmax", {"similarity": "weighted"}),
    ("LT", "DFT"): ("fourier", {}),
    ("LT", "DCT"): ("dct", {}),
    ("DSC", 5): ("dynamic_conv", {"taps": 5}),
    ("DSC", 9): ("dynamic_conv", {"taps": 9}),
}
"""By operation type and parameter: the mixer that the description means, and its options."""
LAYER_SIZES = ("num_operation_heads", "feed_forward_dimension", "num_feed_forward")


@dataclass(frozen=True)
class BertLayer:
    """What the benchmark says of one layer.

    Args:
        operation_type: ``"SA"``, ``"LT"`` or ``"DSC"``.
        operation_parameter: ``"SDP"``, ``"WMA"``, ``"DFT"``, ``"DCT"``, or the taps 5 or 9.
        num_operation_heads: attention heads, which split the hidden width among them.
        feed_forward_dimension: width of the feed-forward maps.
        num_feed_forward: maps in front of the one back to the hidden width.
    """

    operation_type: str
    operation_parameter: str | int
    num_operation_heads: int
    feed_forward_dimension: int
    num_feed_forward: int


@dataclass(frozen=True)
class BertEntry:
    """A trained network of the benchmark.

    Args:
        id: number in the benchmark.
        scores: by task, higher is better; `GLUE` is their mean.
        hidden_size: width of the residual stream.
        layers: in order.
    """

    id: int
    scores: Mapping[str, float]
    hidden_size: int
    layers: tuple[BertLayer, ...]


def read_nas_bench_bert(path: Path | str) -> list[BertEntry]:
    """Read the benchmark.

    Args:
        path: of the JSON file, or of the folder that holds it as `FILE_NAME`.

    Raises:
        UserError: when it is absent, or an entry is not of the form that is expected.
    """
    path = Path(path)
    file = path / FILE_NAME if path.is_dir() else path
    values = read_json(file, "NAS-Bench-BERT file")
    if not isinstance(values, list) or not values:
        raise UserError(f"{file} is no NAS-Bench-BERT file: it holds no list of networks")
    entries = []
    for place, entry in enumerate(values):
        try:
            entries.append(_entry(entry))
        except UserError as error:
            raise UserError(f"{file}, network {place}: {error}") from None
    ids = [entry.id for entry in entries]
    if len(set(ids)) < len(ids):
        raise UserError(f"{file} lists a network twice: its ids are not all different")
    return entries


@functools.cache
def space() -> SearchSpace:
    """Return the space that every network of the benchmark lies in, in both readings."""
    return SearchSpace.load(PRESET, VOCAB_SIZE)


def arch_of(entry: BertEntry, reading: str = "trained") -> Arch:
    """Return the network of an entry as an arch of `space`.

    Its parameters are those of the original but for biases (our linear maps have none) and segment
    embeddings: the class token is one of the 512 positions, and the head is a linear map to two
    classes.

    Args:
        entry: from `read_nas_bench_bert`.
        reading: ``"trained"`` or ``"nominal"``, see above.

    Raises:
        UserError: for an unknown reading, or a network with more layers than the space has.
    """
    if reading not in READINGS:
        raise unknown("reading", reading, READINGS)
    within = space()
    if len(entry.layers) > within.num_layers:
        raise UserError(
            f"network {entry.id} has {len(entry.layers)} layers, space {within.name!r} has "
            f"{within.num_layers}; leave it out"
        )
    layers = [_layer(layer, entry.hidden_size, reading) for layer in entry.layers]
    skipped = [LayerArch()] * (within.num_layers - len(layers))
    return within.arch(entry.hidden_size, (*layers, *skipped))


def replicate_groups(entries: Sequence[BertEntry]) -> list[int]:
    """Return a group number per entry: networks that are the same as trained share one.

    Numbers go up from 0 in the order of first appearance. Networks of a group differ by chance
    only, so a split into training and test networks must keep groups whole.
    """
    numbers: dict[str, int] = {}
    return [numbers.setdefault(arch_of(entry).id, len(numbers)) for entry in entries]


def _layer(layer: BertLayer, hidden_size: int, reading: str) -> LayerArch:
    if reading == "trained":
        first, (mixer, options) = 4 * hidden_size, MIXERS["SA", "SDP"]
    else:
        first = layer.feed_forward_dimension
        mixer, options = MIXERS[layer.operation_type, layer.operation_parameter]
    return LayerArch(
        mixer=mixer,
        num_heads=layer.num_operation_heads,
        num_kv_heads=layer.num_operation_heads,
        ffn="gelu_stack",
        intermediate_size=first,
        norm="layernorm",
        norm_placement="post",
        mixer_options=tuple(sorted(options.items())),
        ffn_options=(
            ("inner_size", layer.feed_forward_dimension),
            ("num_inner", layer.num_feed_forward - 1),
        ),
    )


def _entry(values: Any) -> BertEntry:
    overrides = _field(_field(values, "hparams", dict), "model_hparam_overrides", dict)
    layers = _field(_field(overrides, "nas_config", dict), "encoder_layers", list)
    if not layers:
        raise UserError("encoder_layers is empty; a network has at least one layer")
    return BertEntry(
        id=_field(values, "id", int),
        scores=_scores(_field(values, "scores", dict)),
        hidden_size=_size(overrides, "hidden_size"),
        layers=tuple(_bert_layer(layer) for layer in layers),
    )


def _bert_layer(values: Any) -> BertLayer:
    operation = (
        _field(values, "operation_type", str),
        _field(values, "operation_parameter", str, int),
    )
    if operation not in MIXERS:
        known = ", ".join(f"{kind} {parameter}" for kind, parameter in MIXERS)
        raise UserError(
            f"operation {operation[0]} {operation[1]} is not known; it is one of {known}"
        )
    return BertLayer(*operation, *(_size(values, name) for name in LAYER_SIZES))


def _scores(values: dict[str, Any]) -> dict[str, float]:
    for name in (GLUE, *values):
        score = _field(values, name, int, float)
        if not math.isfinite(score):
            raise UserError(f"score {name}={score} is not finite")
    return {name: float(score) for name, score in values.items()}


def _size(values: Mapping[str, Any], name: str) -> int:
    size: int = _field(values, name, int)
    if size < 1:
        raise UserError(f"{name}={size} must be at least 1")
    return size


def _field(values: Any, name: str, *kinds: type) -> Any:
    """Return a field of a mapping, of one of some types (bools are no numbers)."""
    if not isinstance(values, dict):
        raise UserError(f"{values!r:.40} stands where a mapping with {name!r} is expected")
    if name not in values:
        raise UserError(f"field {name!r} is missing")
    found = values[name]
    if isinstance(found, bool) or not isinstance(found, kinds):
        allowed = " or ".join(kind.__name__ for kind in kinds)
        raise UserError(f"{name}={found!r:.40} is a {type(found).__name__}; expected {allowed}")
    return found
