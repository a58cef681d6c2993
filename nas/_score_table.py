"""Scores as a table for the terminal, as CSV and as JSON."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from nas._score_archs import described
from nas._score_columns import Score
from nas.report.markup import MISSING, millions, number
from searchspace.arch import Arch
from searchspace.cost import arch_cost, num_params

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

DIGITS = 4
FACTS = ("rank", "arch_id", "network", "depth", "params")


@dataclass(frozen=True)
class Ranking:
    """Scored archs, best first.

    Args:
        title: what was scored.
        sort: name of the score that ranks.
        archs: N archs.
        scores: each with N values.
    """

    title: str
    sort: str
    archs: tuple[Arch, ...]
    scores: tuple[Score, ...]

    @staticmethod
    def of(title: str, sort: str, archs: Sequence[Arch], scores: Sequence[Score]) -> Ranking:
        """Order archs by one of the scores; those without a value come last."""
        by = next(score for score in scores if score.name == sort)
        keys = np.where(np.isnan(by.values), math.inf, by.values * (-1) ** by.higher_is_better)
        order = np.argsort(keys, kind="stable")
        return Ranking(
            title, sort, tuple(archs[i] for i in order), tuple(_ordered(s, order) for s in scores)
        )

    def records(self) -> list[dict[str, Any]]:
        """Return one JSON-ready record per arch."""
        return [
            {
                "rank": index + 1,
                "arch_id": arch.id,
                "network": described(arch),
                "depth": arch.depth,
                "params": int(arch_cost(arch, num_params)),
                "scores": {s.name: _finite(s.values[index]) for s in self.scores},
                "std": {s.name: float(s.std[index]) for s in self.scores if s.std is not None},
                "arch": arch.to_dict(),
            }
            for index, arch in enumerate(self.archs)
        ]

    def facts(self) -> dict[str, Any]:
        """Return everything JSON-ready."""
        columns = [
            {
                "name": score.name,
                "higher_is_better": score.higher_is_better,
                "what": score.what,
                "reasons": dict(score.reasons),
            }
            for score in self.scores
        ]
        return {"sort": self.sort, "columns": columns, "archs": self.records()}

    def csv(self) -> str:
        """Return a table with a header; an arch without a value has an empty cell."""
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        with_std = [score.name for score in self.scores if score.std is not None]
        names = [score.name for score in self.scores]
        # The parameter count is a metric as well; one column of it is enough.
        facts = [key for key in FACTS if key not in names]
        writer.writerow([*facts, *names, *(f"{name} std" for name in with_std)])
        for record in self.records():
            values = [record["scores"][name] for name in names]
            stds = [record["std"][name] for name in with_std]
            writer.writerow([*(record[key] for key in facts), *values, *stds])
        return stream.getvalue()

    def table(self, top: int) -> Table:
        """Return the best `top` archs for the terminal."""
        from rich import box
        from rich.table import Table

        table = Table(
            title=self.title,
            caption=_caption(self.scores),
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            pad_edge=False,
        )
        table.add_column("#", justify="right", no_wrap=True)
        table.add_column("arch", no_wrap=True)
        table.add_column("network", ratio=1)
        for name in ("lay-\ners", "M\nparams", *(_header(score) for score in self.scores)):
            table.add_column(name, justify="right", no_wrap=True)
        for index, record in enumerate(self.records()[:top]):
            table.add_row(*self._cells(index, record))
        return table

    def _cells(self, index: int, record: dict[str, Any]) -> list[RenderableType]:
        from rich.text import Text

        cells = [
            str(record["rank"]),
            record["arch_id"],
            record["network"],
            str(record["depth"]),
            millions(record["params"]),
        ]
        for score in self.scores:
            cell = number(_finite(score.values[index]), DIGITS)
            if score.std is not None and cell != MISSING:
                cell += f" ± {number(float(score.std[index]), 2)}"
            cells.append(cell)
        return [Text(cell) for cell in cells]


def _ordered(score: Score, order: Sequence[int] | np.ndarray[Any, Any]) -> Score:
    std = None if score.std is None else score.std[order]
    return replace(score, values=score.values[order], std=std)


def _header(score: Score) -> str:
    name = score.name.rpartition("/")[2].removesuffix(".safetensors")
    return f"{name}\n{'high' if score.higher_is_better else 'low'}"


def _caption(scores: Sequence[Score]) -> Text:
    from rich.text import Text

    lines = ["high, low: what is better"]
    lines += [f"{score.name}: {score.what}" for score in scores if score.what != "training-free"]
    lines += [
        f"{score.name} is missing for {len(score.reasons)} archs: "
        f"{next(iter(score.reasons.values()))}"
        for score in scores
        if score.reasons
    ]
    return Text("; ".join(lines))


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
