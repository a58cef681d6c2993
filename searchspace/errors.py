"""The one exception that means "the user can mend this"."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in what the user gave; the message is one sentence fit for a terminal.

    The message says what was given, what is allowed and what to do. The command line prints it
    without a traceback and exits with code 2.
    """


def unknown(kind: str, name: object, choices: Iterable[str]) -> UserError:
    """Return (not raise) the error for an unknown name, with the nearest known one.

    Args:
        kind: what the name stands for, such as ``"mixer"`` or ``"preset"``.
        name: the name that was given.
        choices: the names that exist.
    """
    known = sorted(choices)
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return UserError(f"unknown {kind} {name!r}: {hint}choose one of {', '.join(known)}")
