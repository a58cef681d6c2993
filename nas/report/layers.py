"""A picture of a network's layers, drawn with HTML so that its text is readable at any width."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nas.report.markup import Markup, join, tag
from nas.report.networks import Network, finite, mapping

MIXER_COLOURS = {
    "softmax": "#2f6fc4",
    "sliding_window": "#15857c",
    "linear_elu": "#b7791f",
    "gla": "#8b4bb0",
}
# Dark enough for white text; every other one is of another family of hues.
OTHER_COLOURS = (
    *("#b03a5b", "#4d6b2f", "#5a4fcf", "#7a5230", "#0e7490", "#a21caf", "#3f7d20", "#b4451f"),
    *("#475569", "#9d174d", "#1e6b52", "#6d28d9", "#8a6a00", "#7f1d1d", "#155e99", "#5b4636"),
)
FFN_COLOUR = "#5b6675"
ABSENT = "none"


def mixer_colours(networks: Sequence[Network]) -> dict[str, str]:
    """Return a colour for every mixer that occurs, the known ones first."""
    used = {str(layer.get("mixer", ABSENT)) for network in networks for layer in network.layers}
    used.discard(ABSENT)
    known = {name: colour for name, colour in MIXER_COLOURS.items() if name in used}
    others = sorted(used - set(known))
    return known | {
        name: OTHER_COLOURS[index % len(OTHER_COLOURS)] for index, name in enumerate(others)
    }


def widest_ffn(networks: Sequence[Network]) -> float:
    """Return the largest FFN width of all networks: a full bar."""
    widths = [_width(layer) for network in networks for layer in network.layers]
    return max([1.0, *widths])


def picture(network: Network, colours: Mapping[str, str], full_width: float) -> Markup:
    """Draw the layer slots of a network, from embedding to head.

    Args:
        network: what to draw.
        colours: of the mixers, from `mixer_colours`.
        full_width: the FFN width whose bar is full, from `widest_ffn`.
    """
    family = mapping(network.arch.get("family"))
    slots = [_slot(index, layer, colours, full_width) for index, layer in enumerate(network.layers)]
    return tag(
        "div",
        _end(f"{_input(network, family)} → d_model {network.arch.get('d_model', '?')}"),
        *slots,
        _end(_output(family)),
        class_="layers",
    )


def _input(network: Network, family: Mapping[str, Any]) -> str:
    """Say what the layers read."""
    if family.get("kind") == "vit":
        image, patch = (_count(family.get(key)) for key in ("image_size", "patch_size"))
        facts = [f"image of {image} pixels in patches of {patch}"]
    else:
        facts = ["embedding", f"vocabulary {network.arch.get('vocab_size', '?')}"]
    if family.get("embedding_position", ABSENT) != ABSENT:
        facts.append(f"{family['embedding_position']} positions")
    if family.get("pooling") == "class_token":
        facts.append("class token")
    if family.get("embedding_norm", ABSENT) != ABSENT:
        facts.append(str(family["embedding_norm"]))
    if family.get("embedding_size"):
        facts.append(f"width {family['embedding_size']}")
    return " · ".join(facts)


def _output(family: Mapping[str, Any]) -> str:
    """Say what becomes of the last layer's result."""
    classes = family.get("num_classes")
    norm = str(family.get("final_norm", "rmsnorm"))
    facts = [norm] if norm != ABSENT else []
    if classes:
        facts.append(str(family.get("pooling", "mean")).replace("_", " "))
    return " · ".join([*facts, f"head of {classes} classes" if classes else "head"])


def legend(colours: Mapping[str, str]) -> Markup:
    """Return the key to the pictures."""
    items = [
        tag("span", tag("i", class_="swatch", style=f"background:{colour}"), name)
        for name, colour in colours.items()
    ]
    items += [
        tag("span", _heads(4, 2, FFN_COLOUR), "4 query heads on 2 key/value heads"),
        tag(
            "span",
            tag("i", class_="swatch striped", style=f"background-color:{FFN_COLOUR}"),
            "striped: a precision below fp32",
        ),
        tag("span", tag("i", class_="swatch empty"), "dashed: sub-block or slot left out"),
        tag("span", "FFN bar: length is the hidden width"),
    ]
    return tag("p", join(items, " "), class_="key")


def strip_legend(colours: Mapping[str, str]) -> Markup:
    """Return the key to the strips of `strip`."""
    squares = [*colours.items(), ("no mixer, FFN only", "#c9d0da")]
    items = [
        tag("span", tag("i", class_="swatch", style=f"background:{colour}"), name)
        for name, colour in squares
    ]
    return tag("p", *items, tag("span", tag("i", class_="swatch empty"), "skipped"), class_="key")


def strip(network: Network, colours: Mapping[str, str]) -> Markup:
    """Return one small square per layer slot in its mixer's colour, for a table cell."""
    squares = [_square(layer, colours) for layer in network.layers]
    return tag("span", join(squares), class_="strip")


def _square(layer: Mapping[str, Any], colours: Mapping[str, str]) -> Markup:
    mixer = str(layer.get("mixer", ABSENT))
    if layer.get("skip"):
        return tag("i", class_="empty", title="skipped")
    if mixer not in colours:
        return tag("i", class_="bare", title="no mixer, FFN only")
    return tag("i", style=f"background:{colours[mixer]}", title=mixer)


def _end(text: str) -> Markup:
    return tag("div", text, class_="end")


def _slot(
    index: int, layer: Mapping[str, Any], colours: Mapping[str, str], full_width: float
) -> Markup:
    position = tag("b", index + 1)
    if layer.get("skip"):
        return tag("div", position, tag("div", "skipped", class_="empty both"), class_="slot")
    mixer, ffn = _mixer(layer, colours), _ffn(layer, full_width)
    return tag("div", position, mixer, ffn, class_="slot")


def _mixer(layer: Mapping[str, Any], colours: Mapping[str, str]) -> Markup:
    name = str(layer.get("mixer", ABSENT))
    if name == ABSENT:
        return tag("div", "no mixer", class_="empty")
    heads, kv_heads = _count(layer.get("num_heads")), _count(layer.get("num_kv_heads"))
    options = [f"{key} {value}" for key, value in mapping(layer.get("mixer_options")).items()]
    precision = str(layer.get("mixer_precision", "fp32"))
    position = str(layer.get("position", "nope"))
    shape = [f"{heads} q × {kv_heads} kv"] if heads else []  # noqa: RUF001 - a multiplication sign
    facts = [*shape, *options]
    facts += [position] if position != "nope" else []
    facts += ["keys and values of an earlier layer"] if layer.get("kv_shared") else []
    return tag(
        "div",
        tag("strong", name, _badge(precision)),
        _heads(heads, kv_heads, "#fff") if heads else None,
        tag("small", " · ".join([*facts, _norm(layer)])),
        class_=_striped("block", precision),
        style=f"background-color:{colours.get(name, FFN_COLOUR)}",
    )


def _norm(layer: Mapping[str, Any]) -> str:
    placement = str(layer.get("norm_placement", "pre"))
    norm = str(layer.get("norm", ""))
    return norm if placement == "pre" else f"{norm} ({placement})"


def _ffn(layer: Mapping[str, Any], full_width: float) -> Markup:
    width, name = _width(layer), str(layer.get("ffn", ABSENT))
    if width <= 0:
        return tag("div", "no FFN", class_="empty")
    precision = str(layer.get("ffn_precision", "fp32"))
    options = [f"{key} {value}" for key, value in mapping(layer.get("ffn_options")).items()]
    share = max(1.0, 100.0 * min(1.0, width / full_width))
    bar = tag(
        "i",
        class_=_striped("bar", precision),
        style=f"width:{share:.1f}%;background-color:{FFN_COLOUR}",
    )
    return tag(
        "div",
        tag("strong", f"{name} {width:g}", _badge(precision)),
        tag("span", bar, class_="track"),
        tag("small", " · ".join([*options, _norm(layer)])),
        class_="ffn",
    )


def _heads(num_heads: int, num_kv_heads: int, colour: str) -> Markup:
    """Draw query heads as squares; those that share a key/value head stand together."""
    per_group = max(1, num_heads // max(1, num_kv_heads))
    groups = [
        tag("i", join(tag("u", style=f"background:{colour}") for _ in range(per_group)))
        for _ in range(min(num_kv_heads, 64))
    ]
    return tag("span", join(groups), class_="heads", aria_hidden="true")


def _badge(precision: str) -> Markup | None:
    return None if precision == "fp32" else join([" ", tag("em", precision)])


def _striped(name: str, precision: str) -> str:
    return name if precision == "fp32" else f"{name} striped"


def _count(value: Any) -> int:
    return min(256, int(finite(value) or 0))


def _width(layer: Mapping[str, Any]) -> float:
    return finite(layer.get("intermediate_size")) or 0.0
