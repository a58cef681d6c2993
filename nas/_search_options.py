"""Options of `nas search` and `nas run` about the search, and `nas study merge`."""

from __future__ import annotations

import argparse
import json
from typing import Any

SEARCH_STAGES = ("run", "search")
MERGE_SUMMARY = "make one run folder of two whose searches evaluated archs of the same space"


def add_search_options(stage: argparse.ArgumentParser) -> None:
    """Add what a search can be told on the command line; each stands for a key of the config."""
    add = stage.add_argument_group("search").add_argument
    add("--sampler", metavar="NAME", help="search algorithm; --list-samplers names them")
    add(
        "--objectives",
        metavar="A,B,C",
        help="what is minimised: loss and any of latency_ms, prefill_ms, decode_ms, "
        "weight_bytes, params",
    )
    add(
        "--constraint",
        action="append",
        metavar="'METRIC<=NUMBER'",
        help="an upper limit, such as 'latency_ms<=8'; may be repeated, and replaces those of the "
        "config; 'none' for no limit",
    )
    add(
        "--evals",
        type=int,
        metavar="N",
        help="archs to evaluate in all; a finished search goes on when N is larger",
    )
    add("--workers", type=int, metavar="N", help="processes that evaluate at the same time")
    add(
        "--ray",
        nargs="?",
        const="local",
        metavar="ADDRESS",
        help="evaluate on a Ray cluster, --workers actors (default: as many as it has room for); "
        "ADDRESS is HOST:PORT of its head, or auto for the one this machine is a node of; without "
        "ADDRESS Ray is started here; CONFIG goes before --ray",
    )
    add(
        "--devices",
        metavar="A,B",
        help="optimise for these devices of the cluster: nodes that offer the resource hw:NAME",
    )
    add(
        "--storage",
        metavar="URL",
        help="where the study lives: postgresql://USER@HOST/DATABASE, sqlite:///FILE or "
        "journal:FILE, with #NAME to name the run there (default: the run folder)",
    )
    add("--list-samplers", action="store_true", help="name the samplers, and stop")


def search_values(options: argparse.Namespace) -> dict[str, Any]:
    """Return the config values, as `load_config` takes them, that the options stand for."""
    if getattr(options, "stage", None) not in SEARCH_STAGES:
        return {}
    objectives = options.objectives
    return {
        "search__sampler": options.sampler,
        "search__objectives": None if objectives is None else _words(objectives),
        "search__constraints": _constraints(options.constraint),
        "search__num_evaluations": options.evals,
        "search__workers": options.workers,
        "search__storage": options.storage,
        "ray__address": options.ray,
        "ray__actors": options.workers if options.ray is not None else None,
        "ray__devices": None if options.devices is None else _words(options.devices),
    }


def _words(text: str) -> list[str]:
    return list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def _constraints(given: list[str] | None) -> list[str] | None:
    if given is None:
        return None
    return [word for text in given for word in _words(text) if word != "none"]


def list_samplers(as_json: bool) -> int:
    """Print the name of every sampler."""
    from nas.samplers import SAMPLERS

    if as_json:
        print(json.dumps(list(SAMPLERS)))
    else:
        print("\n".join(SAMPLERS))
    return 0


def add_study_command(commands: Any) -> None:
    """Add `nas study merge` to a parser's commands."""
    study = commands.add_parser("study", help="merge the studies of two runs")
    actions = study.add_subparsers(title="commands", required=True, metavar="COMMAND")
    merge = actions.add_parser("merge", help=MERGE_SUMMARY, description=MERGE_SUMMARY)
    merge.add_argument("first", metavar="RUN_A", help="its table, weights and config are taken")
    merge.add_argument("second", metavar="RUN_B")
    merge.add_argument("--out", required=True, metavar="RUN_C", help="a new run folder")
    merge.add_argument(
        "--mixed-weights",
        action="store_true",
        help="merge although the supernets differ, so that their losses do not quite compare",
    )
    merge.add_argument("--json", action="store_true", help="print JSON")
    merge.set_defaults(command=_merge)


def _merge(options: argparse.Namespace) -> int:
    from pathlib import Path

    from nas.study_merge import merge_runs

    done = merge_runs(
        Path(options.first), Path(options.second), Path(options.out), options.mixed_weights
    )
    if options.json:
        print(json.dumps(done))
    else:
        print(
            f"merged into {done['folder']}: {done['from_first']} archs of {options.first}, "
            f"{done['from_second']} more of {options.second}, {done['in_both']} were in both"
        )
    return 0
