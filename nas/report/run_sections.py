"""Sections about how the run went: search, predictions, training, metrics, and what it ran on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from nas.report.figures import COLOURS, NAMES
from nas.report.front_sections import figure
from nas.report.markup import Markup, fixed, join, number, table, tag
from nas.report.networks import finite, mapping
from nas.report.run_data import RunData
from nas.report.run_figures import (
    bars,
    hypervolume_curve,
    latency_agreement,
    loss_agreement_figure,
    training_curves,
)
from nas.report.statistics import PredictionError, latency_error, loss_agreement
from nas.report.summary import verdict, volumes, workload_words


def search_section(data: RunData) -> Markup:
    """Return hypervolume over evaluations, and the groups' final hypervolumes."""
    volumes_so_far = map(finite, data.search.get("hypervolume") or ())
    curve = [value for value in volumes_so_far if value is not None]
    found = volumes(data)
    if not curve and not found and not data.search.get("trials"):
        return tag("p", "No search has been run yet, so there is no hypervolume to show.")
    left = figure(
        hypervolume_curve(curve) if curve else None,
        "Hypervolume of all candidates so far. Their losses are measured on the validation split "
        "with the supernet's weights, their latencies are predicted from the table.",
    )
    right = figure(_volume_bars(found) if found else None, _volume_caption(data))
    return join(
        [
            tag("p", _search_words(data)),
            _infeasible(data),
            tag("div", left, right, class_="grid") if left or right else None,
            _failures(data.search.get("trials") or ()),
        ]
    )


def _volume_bars(found: Mapping[str, float]) -> Markup:
    values = {NAMES[group]: value for group, value in found.items()}
    colours = {NAMES[group]: COLOURS[group] for group in found}
    return bars(
        "volumes",
        "Hypervolume of each group of networks",
        values,
        "hypervolume, from measured values",
        colours,
    )


def _volume_caption(data: RunData) -> str:
    names = ", ".join(str(name) for name in data.front.get("objectives") or ())
    sizes = ", ".join(f"{len(data.groups[g])} {NAMES[g]}" for g in volumes(data))
    return (
        f"Hypervolume over {names}, from measured values of {sizes}; each objective is scaled to "
        f"0..1 over all of them, more is better. In numbers: {verdict(data)}."
    )


def _search_words(data: RunData) -> str:
    trials = [mapping(trial) for trial in data.search.get("trials") or ()]
    if not trials:
        return "The record of single evaluations is not in this folder."
    failed = sum(trial.get("state") == "failed" for trial in trials)
    seconds = sum(finite(trial.get("seconds")) or 0.0 for trial in trials)
    objectives = ", ".join(str(name) for name in data.search.get("objectives") or ())
    constraints = ", ".join(str(text) for text in data.search.get("constraints") or ())
    return (
        f"Sampler {data.search.get('sampler', 'unknown')}: {len(trials)} evaluations, "
        f"{failed} of them failed, {number(seconds)} s in all; minimised: {objectives}; "
        f"constraints: {constraints or 'none'}."
    )


def _infeasible(data: RunData) -> Markup | None:
    """Say what came nearest where nothing that was evaluated keeps the constraints."""
    sentence = mapping(data.search.get("nearest")).get("sentence")
    return tag("p", tag("strong", "No network to hand over: "), str(sentence)) if sentence else None


def _failures(trials: Sequence[Any]) -> Markup | None:
    reasons = Counter(
        str(trial.get("reason") or "no reason given")
        for trial in map(mapping, trials)
        if trial.get("state") == "failed"
    )
    if not reasons:
        return None
    rows = [[reason, count] for reason, count in reasons.most_common()]
    return table(["why evaluations failed", "how many"], rows)


def prediction_section(data: RunData) -> Markup:
    """Return predicted against measured latency, and search loss against test loss."""
    panels = [
        figure(
            latency_agreement(data, workload, f"latency{index}"),
            f"Latency, {workload_words(workload)}: {error_words(latency_error(data, workload))} "
            "The line is equality, the band is ±10 %.",
        )
        for index, workload in enumerate(data.workloads)
    ]
    agreement = loss_agreement(data)
    tau = fixed(agreement.kendall_tau, 2) if agreement else ""
    count = agreement.num_networks if agreement else 0
    panels.append(
        figure(
            loss_agreement_figure(data),
            "Loss the search saw (measured on the validation split) against the loss on the test "
            f"split: Kendall tau {tau} over {count} networks. The line is equality.",
        )
    )
    if not any(panels):
        return tag(
            "p", "No network has both a prediction and a measurement, so nothing is compared here."
        )
    return tag("div", *panels, class_="grid")


def error_words(error: PredictionError | None) -> str:
    """Return prediction figures as a sentence."""
    if error is None:
        return "no figures."
    return (
        f"mean absolute error {number(error.mape_percent, 3)} % of the measured latency (MAPE), "
        f"Kendall tau {fixed(error.kendall_tau, 2)}, over {error.num_networks} networks."
    )


def training_section(data: RunData) -> Markup:
    """Return the training curves."""
    drawing = training_curves(data)
    if drawing is None:
        return tag("p", "There is no training log in this folder, so no curve is drawn.")
    last = data.training[-1]
    seconds = f" in {number(last['elapsed_s'])} s" if "elapsed_s" in last else ""
    caption = (
        f"{last['step']:.0f} steps{seconds}. {_training_words(data)} Each point is the mean of "
        "some steps, and the figures above are the last points."
    )
    return tag("div", figure(drawing, caption), class_="grid")


def _training_words(data: RunData) -> str:
    """Say which networks the steps trained, from the losses they logged."""
    roles = [role for role in data.roles if role in data.training[-1]]
    widths = [role.removeprefix("ffn_") for role in roles if role.startswith("ffn_")]
    named = {"largest": "the largest network", "smallest": "the smallest", "random": "random ones"}
    parts = [named.get(role, f"the {role} one") for role in roles if not role.startswith("ffn_")]
    if widths:
        of = "width" if len(widths) == 1 else "widths"
        parts.append(f"the same layers with FFN {of} {', '.join(widths)}")
    if roles == ["random"]:
        parts = ["random networks"]
    *firsts, final = parts
    told = f"{', '.join(firsts)} and {final}" if firsts else final
    every = f"every step trains {told}{' on the same batch' if firsts else ''}."
    if data.first_stage_end is None:
        return f"E{every[1:]}"
    return (
        f"Up to step {data.first_stage_end} (dotted line) only the largest network was trained; "
        f"from then on {every}"
    )


def metrics_section(data: RunData) -> Markup:
    """Return how well each training-free metric ranks networks."""
    found: dict[str, float] = {}
    counts: list[float] = []
    for name, facts in mapping(data.search.get("metrics")).items():
        tau = finite(mapping(facts).get("kendall_tau"))
        if tau is not None:
            found[str(name)] = tau
            counts.append(finite(mapping(facts).get("num_archs")) or 0)
    if not found:
        return tag("p", "No training-free metric was compared with evaluated losses.")
    order = dict(sorted(found.items(), key=lambda item: -item[1]))
    drawing = bars(
        "metrics",
        "Kendall tau of each training-free metric",
        order,
        "Kendall tau with evaluated loss",
        {},
        lowest=0.0,
    )
    span = f"{min(counts):.0f}" + (f" to {max(counts):.0f}" if min(counts) != max(counts) else "")
    caption = (
        f"Measured on {span} evaluated networks each. 1: the metric puts networks in the order of "
        "their evaluated loss, best first; 0: no relation; negative: the opposite order."
    )
    return tag("div", figure(drawing, caption), class_="grid")


def facts_section(data: RunData) -> Markup:
    """Return verification figures, device, versions and config."""
    tables = [
        _pairs("Device", data.front.get("device")),
        _pairs("Versions", data.front.get("versions")),
    ]
    config = _pairs("Config", data.config)
    return join(
        [
            tag("h3", "Verified exports"),
            _verified(data),
            tag("div", *tables, class_="grid"),
            tag("details", tag("summary", "Config of this run"), config)
            if config
            else tag("p", "There is no config.json in this folder."),
        ]
    )


def _verified(data: RunData) -> Markup:
    if not data.exports:
        return tag("p", "No network has been exported yet, so nothing was verified.")
    records = [
        (arch_id, name, _found(mapping(facts)))
        for arch_id, record in data.exports.items()
        for name, facts in mapping(record.get("formats")).items()
    ]
    columns = list(dict.fromkeys(key for _, _, found in records for key in found))
    rows = [
        [tag("span", arch_id, class_="id"), name, *(_value(found.get(key)) for key in columns)]
        for arch_id, name, found in records
    ]
    titles = (tag("span", key.replace("_", "_\u200b")) for key in columns)
    header = ["network", "format", *titles]
    note = (
        "Measured by another process, which loaded what was written, and compared with the "
        "supernet; differences are shares of the largest logit."
    )
    return join([tag("p", note, class_="note"), table(header, rows)])


def _found(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is said of one format: what was found, or why it was left out."""
    found = dict(mapping(facts.get("verified")))
    differences = found.pop("differences", None)
    if isinstance(differences, list) and differences:
        found = {"difference": max(differences), **found}
    return {**found, "left out": facts["refused"]} if "refused" in facts else found


def _pairs(title: str, values: Any) -> Markup | None:
    rows = [
        [key, tag("span", _value(value), class_="wrap")] for key, value in _scalars(mapping(values))
    ]
    return tag("div", tag("h3", title), table(["name", "value"], rows, 2)) if rows else None


def _scalars(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Return (dotted key, value) of everything nested in a mapping that is not a mapping."""
    found: list[tuple[str, Any]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            found += _scalars(value, f"{prefix}{key}.")
        else:
            found.append((f"{prefix}{key}", value))
    return found


def _value(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]  # noqa: RUF001
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return number(value, 4) if isinstance(value, float) else str(value)
