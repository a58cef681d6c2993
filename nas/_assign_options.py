"""Options of `nas assign`."""

from __future__ import annotations

import argparse
from typing import Any

from nas._described_command import add_described

SUMMARY = "choose the best block for every layer under hard limits, by integer programming"
DETAILS = """\
Every block of the largest network is replaced once by every other choice, and the loss evaluated:
the scores. They are kept in the run folder, so an interrupted command goes on, and another budget
takes seconds. For every width and depth the choice of lowest summed score that keeps the limits is
then found exactly, by HiGHS.

limits: latency_ms, prefill_ms, decode_ms, weight_bytes, params, state_bytes; <= and >=

which layers a network of fewer layers skips, --depth-by:
  influence  those that change the residual stream least
  skip-loss  those without which alone the loss rises least
  greedy     one after another, that without which the loss rises least
  best       of these three, that of lowest loss without all of them, at every depth
  additive   left to the programme, at the scores of single layers, which do not add up
"""


def add_assign_command(commands: Any) -> None:
    """Add `nas assign` to a parser's commands."""
    parser = add_described(commands, "assign", SUMMARY, DETAILS)
    add = parser.add_argument
    add("folder", metavar="RUN_FOLDER", help="a run with a latency table and a trained supernet")
    add(
        "--constraint",
        action="append",
        metavar="LIMIT",
        help="'METRIC<=NUMBER' or 'METRIC>=NUMBER'; may be repeated (default: those of the run)",
    )
    add(
        "--sweep",
        nargs=2,
        metavar=("METRIC", "NUM"),
        help="a whole front: NUM budgets of a metric, the limits kept at each",
    )
    add(
        "--only",
        action="append",
        default=[],
        metavar="GENE=CHOICE,...",
        help="score fewer choices, such as d_model=192 or mixer=softmax,gla; may be repeated",
    )
    add(
        "--depth-by",
        default="best",
        choices=("best", "influence", "skip-loss", "greedy", "additive"),
        help="which layers networks of fewer layers skip (default: best)",
    )
    add(
        "--score-tokens",
        type=int,
        default=4096,
        metavar="NUM",
        help="held-out tokens of every score (default: 4096)",
    )
    add(
        "--evaluate",
        type=int,
        default=4,
        metavar="NUM",
        help="networks really evaluated per budget, by predicted loss (default: 4)",
    )
    add(
        "--time-limit",
        type=float,
        default=10.0,
        metavar="SECONDS",
        help="of the solver per width and depth (default: 10)",
    )
    add("--json", action="store_true", help="print JSON")
    add("--quiet", action="store_true", help="no progress on stderr")
    parser.set_defaults(command=_assign)


def _assign(options: argparse.Namespace) -> int:
    from nas import assign_command

    return assign_command.assign_command(options)
