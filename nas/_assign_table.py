"""Assigned networks as JSON and as a table for the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hw_profiles.latency_table import LatencyTable
from nas._score_archs import described
from nas.assignment import Assigned, Assignment, Limit
from nas.assignment.highs import OPTIMAL
from nas.report.markup import number

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Results:
    """What a command found.

    Args:
        budgets: one assignment per budget.
        losses: really evaluated, by arch id.
        table: of latencies.
        workloads: by latency metric the workload's name.
        unit: what losses are per.
    """

    budgets: Sequence[Assignment]
    losses: Mapping[str, float]
    table: LatencyTable
    workloads: Mapping[str, str]
    unit: str

    @property
    def limits(self) -> list[Limit]:
        """The limits of all budgets, each once."""
        return list(dict.fromkeys(limit for budget in self.budgets for limit in budget.limits))

    def best(self, budget: Assignment) -> Assigned | None:
        """Return a budget's network of lowest evaluated loss; by prediction where none was."""
        evaluated = [i for i in budget.found if math.isfinite(self._loss(i))]
        if not evaluated:
            return budget.found[0] if budget.found else None
        return min(evaluated, key=self._loss)

    def facts(self) -> dict[str, Any]:
        """Return everything JSON-ready."""
        return {
            "unit": self.unit,
            "budgets": [
                {
                    "constraints": [str(limit) for limit in budget.limits],
                    "status": budget.status,
                    "gap": _finite(budget.gap),
                    "bound": _finite(budget.bound),
                    "seconds": budget.seconds,
                    "best": None if (best := self.best(budget)) is None else best.arch.id,
                    "networks": [self._record(item) for item in budget.found],
                }
                for budget in self.budgets
            ],
        }

    def _loss(self, item: Assigned) -> float:
        return self.losses.get(item.arch.id, math.inf)

    def _record(self, item: Assigned) -> dict[str, Any]:
        return {
            "arch_id": item.arch.id,
            "network": described(item.arch),
            "d_model": item.arch.d_model,
            "depth": item.arch.depth,
            "status": item.status,
            "gap": _finite(item.gap),
            "linear": item.exact,
            "seconds": item.seconds,
            "predicted_loss": item.predicted_loss,
            "loss": _finite(self._loss(item)),
            "costs": item.costs,
            "additive": item.additive,
            "table_ms": {name: self._table_ms(item, name) for name in self.workloads},
            "arch": item.arch.to_dict(),
        }

    def _table_ms(self, item: Assigned, metric: str) -> float:
        workload = next(w for w in self.table.workloads if w.name == self.workloads[metric])
        return self.table.latency_ms(item.arch, workload)

    def rich(self) -> Table:
        """Return the table: of one budget its networks, of several the best of each."""
        from rich import box
        from rich.table import Table

        one = len(self.budgets) == 1
        table = Table(caption=self._caption(), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0),
                      pad_edge=False)  # fmt: skip
        metrics = list(dict.fromkeys(limit.metric for limit in self.limits))
        table.add_column("arch" if one else "budget", no_wrap=True)
        table.add_column("network", ratio=1, min_width=12)
        for name in ("lay-\ners", "loss\nsum", "loss\nreal"):
            table.add_column(name, justify="right", no_wrap=True)
        for metric in metrics:
            table.add_column(self._header(metric), justify="right", no_wrap=True)
        table.add_column("proof", no_wrap=True)
        for budget in self.budgets:
            best = self.best(budget)
            for item in budget.found if one else [best] if best else []:
                mark = " *" if one and item is best else ""
                table.add_row(
                    item.arch.id + mark if one else str(budget.limits[-1]),
                    described(item.arch),
                    str(item.arch.depth),
                    number(item.predicted_loss, 4),
                    number(_finite(self._loss(item)), 4),
                    *(self._cost(item, metric) for metric in metrics),
                    _proof(item),
                )
        return table

    def _header(self, metric: str) -> str:
        if metric in self.workloads:
            return f"{metric}\nsum / table"
        return metric.replace("_", "_\n", 1)

    def _cost(self, item: Assigned, metric: str) -> str:
        if metric not in self.workloads:
            return f"{item.costs[metric]:,.0f}"
        whole = self._table_ms(item, metric)
        return f"{number(item.additive[metric])} / {number(whole)}"

    def _caption(self) -> str:
        lines = [f"loss in nats/{self.unit}, sum: scores added up, real: evaluated"]
        if len(self.budgets) == 1:
            lines.append("*: the lowest real loss")
        if any(metric in self.workloads for metric in (limit.metric for limit in self.limits)):
            lines.append("ms, sum: of blocks alone, table: in full, which keeps the limit")
        if any(not item.exact for budget in self.budgets for item in budget.found):
            lines.append("tangent: optimal with latencies taken as their tangent there")
        return "; ".join(lines)


def _proof(item: Assigned) -> str:
    if item.status != OPTIMAL:
        return f"gap {number(item.gap, 2)}"
    return OPTIMAL if item.exact else "tangent"


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
