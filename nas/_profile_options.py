"""Options of `nas profile`, and its commands list, show, diff and check."""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nas.config import ExperimentConfig

COMMANDS = {
    "list": "latency tables that are shipped or in ./runs",
    "show": "what a latency table says",
    "diff": "how two latency tables differ",
    "check": "whether a latency table still holds: times a sample again (exit code 0 or 1)",
}
POSITIONAL = {"list": (), "show": ("table",), "diff": ("first", "second"), "check": ("table",)}
TABLE_HELP = "a shipped table's name or device id, a file, or a run folder"


def join_command(words: Sequence[str]) -> list[str]:
    """Return the command line with ``profile list`` and its like as one word.

    What else follows ``profile`` is a config, as for every other stage.
    """
    if len(words) > 1 and words[0] == "profile" and words[1] in COMMANDS:
        return [f"profile {words[1]}", *words[2:]]
    return list(words)


def add_profile_options(
    stage: argparse.ArgumentParser, config_of: Callable[..., ExperimentConfig]
) -> None:
    """Add the options that only this stage has.

    Args:
        stage: the parser of ``nas profile``.
        config_of: returns the config of parsed options.
    """
    add = stage.add_argument
    add("--backend", help="how networks are run, such as eager")
    add("--threads", type=int, metavar="N", help="threads of one operator (default: every core)")
    add("--realtime", action="store_true", help="real-time scheduling, where it is allowed")
    add("--check", action="store_true", help="only time a sample of the folder's table again")
    add(
        "--device",
        metavar="TABLE",
        help=f"use a table that is there instead of measuring: {TABLE_HELP}",
    )
    add(
        "--from",
        dest="source",
        metavar="TABLE",
        help=f"transfer a table of another device by a few measurements: {TABLE_HELP}",
    )
    add(
        "--measurements",
        type=int,
        metavar="N",
        help="whole networks to time for --from (default: 20)",
    )
    stage.set_defaults(command=functools.partial(_stage, config_of))


def add_profile_commands(commands: Any) -> None:
    """Add the commands that look at tables to a parser's commands."""
    for name, summary in COMMANDS.items():
        command = commands.add_parser(f"profile {name}", help=summary, description=summary)
        for word in POSITIONAL[name]:
            if name == "check":
                text = f"{TABLE_HELP} (default: runs/quickstart)"
                command.add_argument(word, metavar=word.upper(), nargs="?", help=text)
            else:
                command.add_argument(word, metavar=word.upper(), help=TABLE_HELP)
        command.add_argument("--json", action="store_true", help="print JSON")
        if name == "check":
            command.add_argument("--realtime", action="store_true", help="real-time scheduling")
            command.add_argument("--quiet", action="store_true", help="no progress on stderr")
        command.set_defaults(command=functools.partial(_look, name))


def _stage(config_of: Callable[..., ExperimentConfig], options: argparse.Namespace) -> int:
    from nas import profile_command

    if options.check:
        is_table = options.config and not options.config.endswith(".toml")
        options.table = options.config if is_table else config_of(options).out
        return profile_command.check_command(options)
    folder = profile_command.stage_command(options, functools.partial(config_of, options))
    if options.json:
        print(json.dumps({"stage": "profile", "folder": str(folder)}))
    else:
        print(f"profile done: {folder}")
    return 0


def _look(name: str, options: argparse.Namespace) -> int:
    from nas import profile_command

    command: Callable[[argparse.Namespace], int] = getattr(profile_command, f"{name}_command")
    return command(options)
