"""Sections about the measured front: pictures, comparison, layers, and the table."""

from __future__ import annotations

from nas.report.commands import export_command, generate_command, load_line
from nas.report.front_figures import (
    accuracy_against_latency,
    loss_against_bytes,
    loss_against_latency,
)
from nas.report.layers import legend, mixer_colours, picture, strip, strip_legend, widest_ffn
from nas.report.markup import Markup, fixed, join, megabytes, millions, number, percent, table, tag
from nas.report.networks import Network, numbers
from nas.report.run_data import RunData
from nas.report.statistics import Comparison, bits, comparisons
from nas.report.summary import loss_text, workload_words

NO_FRONT = "No front has been measured yet; `nas search` and `nas export` do that."


def figure(drawing: Markup | None, caption: object) -> Markup | None:
    """Return a drawing with its caption, or None without a drawing."""
    return None if drawing is None else tag("figure", drawing, tag("figcaption", caption))


def front_section(data: RunData) -> Markup:
    """Return the pictures of the measured front and what it buys."""
    if not data.groups["front"]:
        return tag("p", NO_FRONT)
    panels = [
        figure(
            loss_against_latency(data, workload, f"front{index}"),
            f"Loss against latency, {workload_words(workload)}; both measured. "
            "The area of a point is its weight bytes.",
        )
        for index, workload in enumerate(data.workloads)
    ]
    accuracy = figure(
        accuracy_against_latency(data, data.workloads[0], "accuracy") if data.workloads else None,
        "Accuracy on the test split against latency; both measured. Up and to the left is better.",
    )
    size = figure(loss_against_bytes(data, "size"), "Loss (measured) against weight bytes.")
    note = (
        "Down and to the left is better in the pictures of the loss. The line joins the front "
        "members that nothing beats in that pair of measures; a member off the line is on the "
        "front for a third one. " + _baseline_sentence(data)
    )
    return join(
        [tag("p", note), tag("div", *panels, accuracy, size, _comparison(data), class_="grid")]
    )


def _baseline_sentence(data: RunData) -> str:
    baselines = numbers(data.front.get("baselines"))
    told = ", ".join(f"{name} {loss:.2f}" for name, loss in baselines.items())
    sentence = (
        f"Without a network one reaches (nats/{data.unit}, on the test split): {told}; "
        "those near the networks are drawn as dashed lines. "
    )
    names = {"random": "random archs", "uniform": "uniform networks"}
    missing = [name for group, name in names.items() if not data.groups[group]]
    ending = f"This run measured no {' and no '.join(missing)}." if missing else ""
    return (sentence if baselines else "") + ending


def _comparison(data: RunData) -> Markup | None:
    found = comparisons(data, data.workloads[0]) if data.workloads else []
    if not found:
        return None
    unit = tag("small", f"nats/{data.unit}")
    header = [
        "plain network",
        join(["loss", unit]),
        join(["latency", tag("small", "ms")]),
        "front network",
        join(["loss", unit]),
        join(["latency", tag("small", "ms")]),
        "faster",
        "smaller",
    ]
    rows = [_comparison_row(item, data.workloads[0]) for item in found]
    sentence = (
        "For each uniform network (one layer repeated): the fastest front network with at most its "
        f"loss ({workload_words(data.workloads[0])}; losses and latencies measured)."
    )
    return tag(
        "div",
        tag("h3", "What the front buys"),
        tag("p", sentence, class_="note"),
        table(header, rows),
        class_="tight",
    )


def _comparison_row(item: Comparison, workload: str) -> list[object]:
    plain = [item.plain.label, fixed(item.plain.loss), number(item.plain.latency_ms[workload])]
    if item.better is None:
        return [*plain, "none is as good", "", "", "", ""]
    better = item.better
    return [
        *plain,
        tag("span", better.arch_id, class_="id"),
        fixed(better.loss),
        number(better.latency_ms[workload]),
        f"{fixed(item.speedup, 2)}×",  # noqa: RUF001 - a multiplication sign
        f"{fixed(item.bytes_ratio, 2)}×",  # noqa: RUF001 - a multiplication sign
    ]


def layers_section(data: RunData) -> Markup:
    """Return one picture for each chosen network."""
    members = {network.arch_id: network for network in data.groups["front"]}
    chosen = [(members[i], tags) for i, tags in data.tags.items() if i in members]
    drawn = [(network, tags) for network, tags in chosen if network.layers]
    if not drawn:
        return tag("p", "No network of the front was chosen by name, so none is drawn.")
    networks = [network for network, _ in drawn]
    # A mixer has the same colour in the pictures and in the table.
    colours, width = mixer_colours(data.groups["front"]), widest_ffn(networks)
    used = mixer_colours(networks)
    cards = [
        tag(
            "div",
            tag("h3", _tags(tags), tag("span", network.arch_id, class_="id")),
            tag("p", _facts(network, data)),
            picture(network, colours, width),
            class_="network",
        )
        for network, tags in drawn
    ]
    key = legend({name: colour for name, colour in colours.items() if name in used})
    return join([key, tag("div", *cards, class_="grid")])


def _tags(names: list[str]) -> Markup:
    return join(tag("span", name, class_="tag") for name in names)


def _facts(network: Network, data: RunData) -> str:
    latencies = [f"{number(ms)} ms {name}" for name, ms in network.latency_ms.items()]
    measured = "; ".join([loss_text(network, data.unit), *latencies])
    return (
        f"Measured: {measured}. Counted: {megabytes(network.weight_bytes)} MB, "
        f"{millions(network.params)} M parameters."
    )


def table_section(data: RunData) -> Markup:
    """Return the table of all front members and the commands to use them."""
    if not data.groups["front"]:
        return tag("p", NO_FRONT)
    colours = mixer_colours(data.groups["front"])
    header = [
        "network",
        "layers",
        _header("loss", f"nats/{data.unit}, measured"),
        _header("accuracy", "%, measured")
        if data.has_accuracy
        else _header("loss", f"bits/{data.unit}, measured"),
        *(_header(workload, "ms, measured") for workload in data.workloads),
        *(_header(workload, "mJ, measured") for workload in data.energy_workloads),
        _header("weights", "MB, counted"),
        _header("parameters", "M, counted"),
        _header("peak memory", "MiB, measured"),
        _header("depth", "layers"),
        "d_model",
    ]
    rows = [
        [
            _named(network, data),
            strip(network, colours),
            fixed(network.loss),
            percent(network.accuracy) if data.has_accuracy else fixed(bits(network.loss)),
            *(number(network.latency_ms.get(workload)) for workload in data.workloads),
            *(number(network.energy_mj.get(workload)) for workload in data.energy_workloads),
            megabytes(network.weight_bytes),
            millions(network.params),
            number(network.peak_mib),
            network.depth,
            network.arch.get("d_model", ""),
        ]
        for network in data.front_by_latency
    ]
    order = f"Fastest first ({workload_words(data.workloads[0])})." if data.workloads else None
    shown = table(header, rows, text_columns=2, caption=order)
    return join([shown, strip_legend(colours), _commands(data)])


def _named(network: Network, data: RunData) -> Markup:
    tags = _tags(data.tags.get(network.arch_id, []))
    return join([tag("span", network.arch_id, class_="id"), tags], " ")


def _header(text: str, unit: str) -> Markup:
    return join([text, tag("small", unit)])


def _commands(data: RunData) -> Markup:
    missing = [n.arch_id for n in data.front_by_latency if n.arch_id not in data.exports]
    writes_text = data.unit == "byte"
    command = generate_command if writes_text else load_line
    lines = [command(data.folder, n.arch_id) for n in data.front_by_latency]
    if not writes_text:
        lines.insert(0, "from searchspace.subnet import Subnet")
    parts = [tag("h3", "Use one")]
    if missing:
        parts += [
            tag(
                "p",
                f"Not exported yet: {len(missing)} of {len(data.groups['front'])}. "
                "This exports them:",
            ),
            tag("pre", export_command(data.folder, missing)),
        ]
    use = (
        "Each exported network loads and writes text on its own:"
        if writes_text
        else "Each exported network loads on its own, in Python:"
    )
    return join([*parts, tag("p", use), tag("pre", "\n".join(lines))])
