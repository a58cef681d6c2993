"""What choices cost: bytes, parameters, and latency as the table's correction makes it.

A corrected latency has three parts. Scaled entries and what every sub-block adds are sums. What is
added once per trait is a sum over the traits that are there. What a large working set adds bends:
it is a function of two sums, the entries and the working set.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from hw_profiles.latency_table import LatencyTable
from hw_profiles.latency_table.correction import MIB, Correction, traits, working_set_bytes
from hw_profiles.workload import Workload
from nas.assignment.problem import Curve
from searchspace.cost import num_params, state_bytes, weight_bytes
from searchspace.space import SearchSpace
from searchspace.specs import EndsSpec, SubBlockSpec

SpecCost = Callable[[SubBlockSpec], float]


@dataclass
class CostModel:
    """Costs of sub-blocks by metric.

    Args:
        parts: by metric what a sub-block adds; also the sums that curves depend on.
        constants: by metric what is added once to every network.
        once: by metric and trait what is added once.
        curves: by metric the part that bends.
    """

    parts: dict[str, SpecCost] = field(default_factory=dict)
    constants: dict[str, float] = field(default_factory=dict)
    once: dict[str, Mapping[str, float]] = field(default_factory=dict)
    curves: dict[str, Curve] = field(default_factory=dict)

    @property
    def metrics(self) -> list[str]:
        """Names that limits may be set on."""
        return [name for name in self.parts if "/" not in name]

    def traits(self, specs: Sequence[SubBlockSpec | None]) -> tuple[frozenset[str], ...]:
        """Return for each sub-block its traits that something is added once for."""
        known = {trait for values in self.once.values() for trait in values}
        return tuple(frozenset(known & set(traits(spec) if spec else ())) for spec in specs)

    def costs(
        self, specs: Sequence[SubBlockSpec | None]
    ) -> dict[str, np.ndarray[tuple[int], np.dtype[np.float64]]]:
        """Return by part what each sub-block adds, 0 for none, shape (number of specs,)."""
        return {
            name: np.array([0.0 if spec is None else float(cost(spec)) for spec in specs])
            for name, cost in self.parts.items()
        }

    def fixed(self, ends: EndsSpec) -> dict[str, float]:
        """Return by part what every network with these ends costs anyway."""
        total = {name: float(cost(ends)) for name, cost in self.parts.items()}
        for name, constant in self.constants.items():
            total[name] += constant
        for name, values in self.once.items():
            total[name] += sum(values.get(trait, 0.0) for trait in traits(ends))
        return total


def cost_model(space: SearchSpace, table: LatencyTable | None, workload: str) -> CostModel:
    """Return the costs that a run knows, by the names that `nas search` has for them.

    Args:
        space: the search space.
        table: latencies of this device; without one there is no latency.
        workload: name of the one that ``latency_ms`` means.
    """
    model = CostModel({"weight_bytes": weight_bytes, "params": num_params})
    for item in table.workloads if table else ():
        names = [f"{item.phase}_ms"] if f"{item.phase}_ms" not in model.parts else []
        names += ["latency_ms"] if item.name == workload else []
        for name in names:
            assert table is not None
            _add_latency(model, name, table, item)
        if item.phase == "decode" and space.family.causal and "state_bytes" not in model.parts:
            model.parts["state_bytes"] = _state_bytes_of(item)
    return model


def _state_bytes_of(workload: Workload) -> SpecCost:
    def cost(spec: SubBlockSpec) -> float:
        if isinstance(spec, EndsSpec):
            return 0.0
        return state_bytes(spec, workload.batch, workload.max_tokens)

    return cost


def _add_latency(model: CostModel, name: str, table: LatencyTable, workload: Workload) -> None:
    fit = table.correction(workload)

    def entry_us(spec: SubBlockSpec) -> float:
        return table.entry(workload, spec.key).latency_us

    model.parts[name] = lambda spec: fit.sub_block_us(spec, entry_us(spec)) / 1e3
    model.once[name] = {trait: us / 1e3 for trait, us in fit.once_us.items()}
    if not fit.spills:
        model.constants[name] = fit.intercept_us / 1e3
        return
    inputs = f"{name}/entries_us", f"{name}/working_set_mib"
    model.parts[inputs[0]] = entry_us
    model.parts[inputs[1]] = lambda spec: working_set_bytes(spec, workload) / MIB
    model.curves[name] = Curve(inputs, _bent_part_ms(fit))


def _bent_part_ms(fit: Correction) -> Callable[[float, float], float]:
    def value(entries_us: float, working_set_mib: float) -> float:
        return float(fit.network_us(np.array([entries_us]), np.array([working_set_mib]))[0]) / 1e3

    return value
