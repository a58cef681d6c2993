"""What is derived from the measurements: errors, rank agreement, comparisons."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import kendalltau

from nas.report.networks import Network, finite, mapping
from nas.report.run_data import RunData


def bits(nats: float | None) -> float | None:
    """Return nats as bits."""
    return None if nats is None else nats / math.log(2)


def kendall_tau(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Return Kendall's tau-b of two rankings, None where it is not defined."""
    return finite(float(kendalltau(x, y).statistic)) if len(x) > 1 else None


@dataclass(frozen=True)
class PredictionError:
    """How far predictions are from measurements.

    Args:
        mape_percent: mean absolute error in percent of the measurement.
        kendall_tau: rank agreement, 1 is the same order.
        num_networks: networks compared.
    """

    mape_percent: float | None
    kendall_tau: float | None
    num_networks: int


def latency_error(data: RunData, workload: str) -> PredictionError | None:
    """Return the run's own figures for a workload, or the same computed from its networks."""
    given = mapping(mapping(data.front.get("latency_error")).get(workload))
    if given:
        return PredictionError(
            finite(given.get("mape_percent")),
            finite(given.get("kendall_tau")),
            int(finite(given.get("num_networks")) or 0),
        )
    unique = {network.arch_id: network for network in data.networks}
    return _error(predicted_and_measured(list(unique.values()), workload))


def predicted_and_measured(networks: Sequence[Network], workload: str) -> list[tuple[float, float]]:
    """Return (predicted, measured) latency in ms of the networks that have both."""
    return [
        (network.predicted_ms[workload], network.latency_ms[workload])
        for network in networks
        if workload in network.predicted_ms and network.latency_ms.get(workload, 0.0) > 0.0
    ]


def loss_agreement(data: RunData) -> PredictionError | None:
    """Compare the validation loss that the search saw with the loss on the test split."""
    unique = {network.arch_id: network for network in data.networks}.values()
    return _error([(n.search_loss, n.loss) for n in unique if n.search_loss and n.loss])


def _error(pairs: Sequence[tuple[float, float]]) -> PredictionError | None:
    if not pairs:
        return None
    first, second = zip(*pairs, strict=True)
    error = 100.0 * np.mean([abs(a - b) / b for a, b in pairs])
    return PredictionError(float(error), kendall_tau(first, second), len(pairs))


def smallest_by(
    networks: Sequence[Network], key: Callable[[Network], float | None]
) -> Network | None:
    """Return the network with the smallest key; those without one do not count."""
    known = [(value, network) for network in networks if (value := key(network)) is not None]
    return min(known, key=lambda pair: pair[0])[1] if known else None


@dataclass(frozen=True)
class Comparison:
    """A plain network and the fastest front network that is at least as good.

    Args:
        plain: the network to beat.
        better: the front network, or None when none reaches the loss.
        speedup: measured latency of `plain` over that of `better`.
        bytes_ratio: weight bytes of `plain` over those of `better`.
    """

    plain: Network
    better: Network | None
    speedup: float | None = None
    bytes_ratio: float | None = None


def comparisons(data: RunData, workload: str) -> list[Comparison]:
    """Compare the front with every uniform network, best loss first."""
    plain = [n for n in data.groups["uniform"] if n.loss is not None and workload in n.latency_ms]
    return [_compare(n, data.groups["front"], workload) for n in sorted(plain, key=_loss)]


def _compare(plain: Network, front: Sequence[Network], workload: str) -> Comparison:
    reaching = [n for n in front if n.loss is not None and _loss(n) <= _loss(plain)]
    better = smallest_by(reaching, lambda n: n.latency_ms.get(workload))
    if better is None:
        return Comparison(plain, None)
    size = (
        plain.weight_bytes / better.weight_bytes
        if (plain.weight_bytes and better.weight_bytes)
        else None
    )
    return Comparison(plain, better, plain.latency_ms[workload] / better.latency_ms[workload], size)


def _loss(network: Network) -> float:
    return math.inf if network.loss is None else network.loss
