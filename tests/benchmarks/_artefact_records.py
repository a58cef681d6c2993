"""What `tests.benchmarks.artefacts` has found: JSON lines that a stopped run goes on from."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from searchspace.errors import UserError
from tests.benchmarks._sub_blocks import aligned

WRITTEN, REFUSED, FAILED = "written", "refused", "failed"


@dataclass(frozen=True)
class Record:
    """What became of one artefact.

    Args:
        preset: search space.
        variant: whether the arch is as it was drawn.
        seed: of the archs and weights.
        index: of the arch, from 0.
        format: of the artefact; ``"supernet"`` stands for taking the network out.
        arch_id: of the arch.
        status: `WRITTEN` and verified, `REFUSED` or `FAILED`.
        reason: why it was refused or failed.
        exact: whether logits must be equal, as no weight is rounded.
        difference: largest of logits, relative to the largest logit where that is above 1.
        loss_share: by which the loss differs from the simulated one.
        seconds: to write and verify.
        file_bytes: of the artefact.
    """

    preset: str
    variant: str
    seed: int
    index: int
    format: str
    arch_id: str
    status: str
    reason: str = ""
    exact: bool = False
    difference: float | None = None
    loss_share: float | None = None
    seconds: float = 0.0
    file_bytes: int = 0

    @property
    def key(self) -> tuple[tuple[str, str, int, int], str]:
        """What makes it one and the same artefact: network and format."""
        return (self.preset, self.variant, self.seed, self.index), self.format


def read_records(path: Path) -> list[Record]:
    """Return the records of a file; a last line that was broken off is left out.

    Raises:
        UserError: for a file of something else.
    """
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    lines = text[: text.rfind("\n") + 1].splitlines()
    try:
        return [Record(**json.loads(line)) for line in lines]
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{path} holds no records of this benchmark ({error}); give another --into"
        ) from None


class Writer:
    """Adds records to a file, behind its last whole line.

    Args:
        path: made if need be.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            content = path.read_bytes()
            with path.open("r+b") as file:
                file.truncate(content.rfind(b"\n") + 1)

    def add(self, record: Record) -> None:
        """Write a record at once."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(record)) + "\n")


def summary(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Return what to print of every preset and format."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record.preset, record.format), []).append(record)
    rows = []
    for (preset, name), found in groups.items():
        statuses = Counter(record.status for record in found)
        rows.append(
            {
                "preset": preset,
                "format": name,
                **{status: statuses[status] for status in (WRITTEN, REFUSED, FAILED)},
                "worst_difference": _worst(r.difference for r in found if r.exact),
                "worst_difference_rounded": _worst(r.difference for r in found if not r.exact),
                "worst_loss_share": _worst(r.loss_share for r in found),
                "seconds": sum(record.seconds for record in found),
                "reasons": _reasons(found),
            }
        )
    return rows


def _worst(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _reasons(records: Iterable[Record]) -> dict[str, int]:
    """Count reasons, those as one that differ in numbers and ids only."""
    texts = (
        f"{r.status}: {re.sub(r'[0-9][0-9a-f.e+-]*', '#', r.reason.replace(r.arch_id, '#'))}"
        for r in records
        if r.reason
    )
    return dict(Counter(texts).most_common())


def table_text(rows: Sequence[dict[str, Any]]) -> str:
    """Return the table and, below it, the reasons."""
    head = ["preset", "format", WRITTEN, REFUSED, FAILED, "logits", "rounded", "loss %", "s each"]
    lines, reasons = [head], []
    for row in rows:
        number = row[WRITTEN] + row[REFUSED] + row[FAILED]
        share = row["worst_loss_share"]
        lines.append(
            [
                row["preset"],
                row["format"],
                *(str(row[status]) for status in (WRITTEN, REFUSED, FAILED)),
                *(_number(row[n]) for n in ("worst_difference", "worst_difference_rounded")),
                "-" if share is None else f"{100 * share:.3f}",
                f"{row['seconds'] / number:.1f}",
            ]
        )
        reasons += [
            f"{row['preset']} {row['format']}: {count} {text}"
            for text, count in row["reasons"].items()
        ]
    return "\n".join([aligned(lines), *([""] if reasons else []), *reasons])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"
