"""Options of `nas score`."""

from __future__ import annotations

import argparse
from typing import Any

from nas._described_command import add_described

SUMMARY = "rank archs by training-free metrics and predictors"
DETAILS = """\
what --by takes (--list says what each is):
  a training-free metric, such as synflow or params; more is expected to be better
  combined           rank aggregation of a few metrics, among the archs that are scored
  weight_bytes       exact
  latency_ms, prefill_ms, decode_ms
                     predicted by the run folder's latency table
  loss               predicted from what the run folder's search has evaluated
  FILE.safetensors   a predictor written with --save
"""


def add_score_command(commands: Any) -> None:
    """Add `nas score` to a parser's commands."""
    parser = add_described(commands, "score", SUMMARY, DETAILS)
    add = parser.add_argument
    add("config", nargs="?", metavar="CONFIG", help="TOML file, or a run folder")
    add("--by", action="append", metavar="NAME", help="what to score by; may be repeated")
    add("--num", type=int, default=50, help="random archs of the space to score (default: 50)")
    add(
        "--archs",
        metavar="FILE",
        help="score these instead: a JSON list of archs, a front.json, or a folder of subnetworks",
    )
    add("--sort", metavar="NAME", help="the score that ranks (default: the first)")
    add("--top", type=int, default=20, help="rows of the table (default: 20)")
    add("--preset", help="search space: a preset's name or a TOML file")
    add("--task", metavar="TASK", help="what inputs and targets are taken from")
    add("--data", help="the task's files")
    add("--seed", type=int, help="of archs and random weights (default: the config's)")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="any config key")
    add("--out", metavar="FILE.csv", help="write all scores")
    add("--save", metavar="FILE.safetensors", help="write the predictor of --by loss")
    add(
        "--importance",
        metavar="FILE.png|svg",
        help="draw which features the predictor of the loss (or of a file) listens to",
    )
    add("--list", action="store_true", help="say what can be scored by, and stop")
    add("--json", action="store_true", help="print JSON, of all archs")
    add("--quiet", action="store_true", help="no progress on stderr")
    parser.set_defaults(command=_score)


def _score(options: argparse.Namespace) -> int:
    from nas import score_command

    return score_command.score_command(options)
