"""The first screen: what was found, in one sentence and a few key figures."""

from __future__ import annotations

from nas.report.markup import Markup, fixed, megabytes, number, percent, tag
from nas.report.networks import Network, finite, mapping, numbers
from nas.report.run_data import RunData
from nas.report.statistics import bits, latency_error, smallest_by


def workload_words(name: str) -> str:
    """Return a workload in words, or its name when it is of another form."""
    phase, _, rest = name.partition("_")
    batch, _, tokens = rest.partition("_")
    if not (batch[:1] == "b" and tokens[:1] == "t" and (batch + tokens)[1:].isalnum()):
        return name
    if phase == "prefill":
        return f"prefill of {tokens[1:]} tokens, batch {batch[1:]}"
    if phase == "decode":
        return f"one token after {tokens[1:]}, batch {batch[1:]}"
    return name


def loss_text(network: Network, unit: str) -> str:
    """Return a network's loss, with its accuracy or in both units of information."""
    loss = f"{fixed(network.loss)} nats/{unit}"
    if network.accuracy is not None:
        return f"{loss}, accuracy {percent(network.accuracy)} %"
    return f"{loss} ({fixed(bits(network.loss))} bits/{unit})"


def volumes(data: RunData) -> dict[str, float]:
    """Return the hypervolume of each group that has one."""
    given = mapping(data.front.get("hypervolume"))
    found = {group: finite(given.get(group)) for group in data.groups}
    return {
        group: value for group, value in found.items() if value is not None and data.groups[group]
    }


def headline(data: RunData) -> str:
    """Return the whole outcome as one sentence."""
    front = data.groups["front"]
    best = smallest_by(front, lambda network: network.loss)
    if best is None:
        return "No front has been measured in this run folder yet."
    parts = [
        f"{len(front)} networks on the measured front: the best reaches "
        f"{loss_text(best, data.unit)} on the test split"
    ]
    if data.workloads:
        main = data.workloads[0]
        fastest = smallest_by(front, lambda network: network.latency_ms.get(main))
        if fastest is not None:
            parts.append(
                f"the fastest takes {number(fastest.latency_ms[main])} ms "
                f"({workload_words(main)}; measured) at {fixed(fastest.loss)} nats/{data.unit}"
            )
    sentence = ", ".join(parts) + "; " + verdict(data)
    error = latency_error(data, data.workloads[0]) if data.workloads else None
    if error is not None:
        sentence += (
            f"; predicted latency is {number(error.mape_percent, 2)} % off the measured one "
            f"(mean over {error.num_networks} networks)"
        )
    return sentence + "."


def verdict(data: RunData) -> str:
    """Say whether the front beats its baselines, from their measured hypervolumes."""
    found = volumes(data)
    names = {"random": "as many random archs", "uniform": "uniform networks"}
    others = {group: value for group, value in found.items() if group != "front"}
    if "front" not in found or not others:
        return "no hypervolume of front and baselines was measured"
    told = " and ".join(f"{fixed(value)} of {names[group]}" for group, value in others.items())
    lost = [names[group] for group, value in others.items() if value >= found["front"]]
    ending = f", so it does not beat {' or '.join(lost)}" if lost else ""
    return f"its hypervolume is {fixed(found['front'])} against {told}{ending}"


def cards(data: RunData) -> Markup | None:
    """Return the key figures."""
    front = data.groups["front"]
    if not front:
        return None
    items = [
        _loss_card(data),
        _accuracy_card(data),
        _latency_card(data),
        _size_card(data),
        _volume_card(data),
    ]
    return tag("div", *items, *_error_cards(data), class_="cards")


def _card(what: str, value: str, *lines: str) -> Markup:
    return tag(
        "div",
        tag("span", what, class_="what"),
        tag("b", value),
        *(tag("span", line) for line in lines),
        class_="card",
    )


def _loss_card(data: RunData) -> Markup | None:
    best = smallest_by(data.groups["front"], lambda network: network.loss)
    if best is None:
        return None
    unit = f"nats/{data.unit}"
    if not data.has_accuracy:
        unit += f" = {fixed(bits(best.loss))} bits/{data.unit}"
    where = f"measured on the test split · {best.arch_id}"
    return _card("Best loss", fixed(best.loss), unit, where)


def _accuracy_card(data: RunData) -> Markup | None:
    best = smallest_by(data.groups["front"], lambda n: None if n.accuracy is None else -n.accuracy)
    if best is None:
        return None
    baselines = numbers(data.front.get("accuracy_baselines"))
    told = [f"{name}: {percent(value)} %" for name, value in baselines.items()]
    where = f"measured on the test split · {best.arch_id}"
    return _card("Best accuracy", f"{percent(best.accuracy)} %", where, *told)


def _latency_card(data: RunData) -> Markup | None:
    main = data.workloads[0] if data.workloads else ""
    fastest = smallest_by(data.groups["front"], lambda network: network.latency_ms.get(main))
    if fastest is None:
        return None
    return _card(
        "Fastest",
        f"{number(fastest.latency_ms[main])} ms",
        workload_words(main),
        f"measured · {fastest.arch_id}",
    )


def _size_card(data: RunData) -> Markup | None:
    smallest = smallest_by(data.groups["front"], lambda network: network.weight_bytes)
    if smallest is None:
        return None
    return _card(
        "Smallest",
        f"{megabytes(smallest.weight_bytes)} MB",
        f"of weights, at {fixed(smallest.loss)} nats/{data.unit}",
        f"counted · {smallest.arch_id}",
    )


def _volume_card(data: RunData) -> Markup | None:
    found = volumes(data)
    if "front" not in found:
        return None
    lines = [f"{name} {fixed(found[name])}" for name in ("random", "uniform") if name in found]
    return _card("Hypervolume", fixed(found["front"]), " · ".join(lines), "from measured values")


def _error_cards(data: RunData) -> list[Markup]:
    found = []
    for workload in data.workloads:
        error = latency_error(data, workload)
        if error is not None:
            phase = workload.partition("_")[0]
            found.append(
                _card(
                    f"Latency prediction, {phase}",
                    f"{number(error.mape_percent, 2)} %",
                    f"mean error, predicted against measured, {error.num_networks} networks",
                    f"Kendall tau {fixed(error.kendall_tau, 2)}",
                )
            )
    return found
