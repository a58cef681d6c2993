"""What has to be the same on every node for losses to be comparable."""

from __future__ import annotations

import platform
from collections.abc import Mapping

from searchspace.errors import UserError


def versions_here() -> dict[str, str]:
    """Return the versions of this process that evaluations depend on."""
    import torch

    from nas import __version__

    return {
        "python": ".".join(platform.python_version_tuple()[:2]),
        "torch": str(torch.__version__),
        "hwnas": __version__,
    }


def check_versions(here: Mapping[str, str], there: Mapping[str, str], node: str) -> None:
    """Refuse a node whose evaluations would not be those of this process.

    Args:
        here: of the process that holds the study.
        there: of an actor.
        node: where the actor is, in words.

    Raises:
        UserError: naming the node and what differs.
    """
    differ = [
        f"{name} {there.get(name, 'none')} instead of {version}"
        for name, version in here.items()
        if there.get(name) != version
    ]
    if differ:
        raise UserError(
            f"node {node} has {' and '.join(differ)}; install the same versions on every node, "
            "because losses of different ones do not compare"
        )
