"""A command of `nas` with a summary and a longer text below its options."""

from __future__ import annotations

import argparse
from typing import Any


def add_described(commands: Any, name: str, summary: str, details: str) -> argparse.ArgumentParser:
    """Add a command to a parser's commands.

    Args:
        commands: of `ArgumentParser.add_subparsers`.
        name: of the command.
        summary: one line, in the list of commands and at the top of its help.
        details: at the end of its help, as it is.
    """
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=summary,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser
