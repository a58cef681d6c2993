"""How sub-blocks resemble each other: what a device may speed up or slow down together.

Letters: S sub-blocks, P features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hw_profiles.workload import Workload
from searchspace.cost import flops, weight_bytes
from searchspace.specs import EndsSpec, FFNSpec, MixerSpec, SubBlockSpec

Floats = NDArray[np.float64]

OFFSET, FACTOR, SIZE = 0, 1, 2
"""Groups of features: what all sub-blocks share, named choices, and functions of the latency."""
OFFSET_SD = 3.0
"""Prior standard deviation of the logarithm of how much slower the device is as a whole."""
OPERATORS = ("kind ", "mixer ", "ffn ")
"""Beginnings of factors whose dependence on size is a feature of its own."""
PEAK_QUANTILE = 0.98
MIN_SHARE_OF_PEAK, MAX_SHARE_OF_PEAK = 0.02, 2.0


@dataclass(frozen=True)
class Features:
    """What the log ratio of target latency to source latency is a linear function of.

    Args:
        values_SP: one row for each sub-block; the last is for what a network pays once.
        group_P: `OFFSET`, `FACTOR` or `SIZE` of every column.
        names: of the columns.
    """

    values_SP: Floats
    group_P: NDArray[np.int64]
    names: tuple[str, ...]

    def prior_variance(self, factor_sd: float, size_sd: float) -> Floats:
        """Return the prior variance of every column's weight, shape (P,)."""
        return np.array([OFFSET_SD, factor_sd, size_sd])[self.group_P] ** 2


def transfer_features(
    specs: Sequence[SubBlockSpec], source_us: Floats, workload: Workload
) -> Features:
    """Describe sub-blocks by their choices, their latency on the source, and their work.

    A faster device, or one more thread, shortens arithmetic and not the fixed time of calling an
    operator. How much of a sub-block is arithmetic shows in its latency and in its rate, stated as
    a share of the best rate of all. Weight bytes tell what leaves which cache.

    Args:
        specs: the sub-blocks.
        source_us: their latencies on the source, shape (S - 1,).
        workload: that they are the latencies of.
    """
    rows = [_factors(spec) for spec in specs]
    names = list(dict.fromkeys(name for row in rows for name in row))
    factors = {name: np.array([float(name in row) for row in rows]) for name in names}
    sizes = _sizes(specs, source_us, workload)
    size = sizes["size"]
    for name in names:
        if name.startswith(OPERATORS):
            sizes[f"size, {name}"] = factors[name] * size
    columns = {"offset": np.ones(len(specs)), **factors, **sizes}
    values_SP = np.stack([*columns.values(), np.zeros(len(specs))], axis=1)
    once = [1.0] + [0.0] * (len(columns) - 1) + [1.0]
    groups = [OFFSET] + [FACTOR] * len(factors) + [SIZE] * len(sizes) + [FACTOR]
    return Features(np.vstack([values_SP, once]), np.array(groups), (*columns, "once"))


def _sizes(
    specs: Sequence[SubBlockSpec], source_us: Floats, workload: Workload
) -> dict[str, Floats]:
    """Return functions of latency and work, each 0 on average over the time spent."""
    flop = np.array([workload.batch * flops(spec, workload.new_tokens) for spec in specs])
    rate = np.maximum(flop, 1.0) / source_us
    share = np.clip(rate / np.quantile(rate, PEAK_QUANTILE), MIN_SHARE_OF_PEAK, MAX_SHARE_OF_PEAK)
    size = np.log(source_us)
    columns = {
        "size": size,
        "size of the short": np.minimum(size - np.average(size, weights=source_us) + 1.0, 0.0),
        "share of peak": share,
        "log share of peak": np.log(share),
        "log weight bytes": np.log([max(weight_bytes(spec), 1) for spec in specs]),
    }
    return {name: v - np.average(v, weights=source_us) for name, v in columns.items()}


def _factors(spec: SubBlockSpec) -> dict[str, None]:
    """Return the names of the choices a sub-block was built from, in a fixed order."""
    if isinstance(spec, EndsSpec):
        return dict.fromkeys(["kind ends", f"width {spec.d_model}"])
    kind = "mixer" if isinstance(spec, MixerSpec) else "ffn"
    names = [
        f"kind {kind}",
        f"width {spec.d_model}",
        f"precision {spec.precision}",
        f"{kind} precision {spec.precision}",
        f"norm {spec.norm}",
        f"placement {spec.placement}",
    ]
    names += _ffn_factors(spec) if isinstance(spec, FFNSpec) else _mixer_factors(spec)
    return dict.fromkeys(names)


def _ffn_factors(spec: FFNSpec) -> list[str]:
    options = "".join(f" {name}={value}" for name, value in spec.options)
    own = [f"option {spec.ffn}{options}"] if options else []
    return [f"ffn {spec.ffn}", f"ffn {spec.ffn} {spec.precision}", *own]


def _mixer_factors(spec: MixerSpec) -> list[str]:
    options = "".join(f" {name}={value}" for name, value in spec.options)
    return [
        f"mixer {spec.mixer}",
        f"mixer {spec.mixer} {spec.precision}",
        f"option {spec.mixer}{options}",
        f"heads {spec.num_heads}",
        f"kv heads {spec.num_kv_heads}",
        f"position {spec.position}",
        f"kv_shared {spec.kv_shared}",
    ]
