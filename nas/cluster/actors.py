"""An actor: a process somewhere in the cluster that evaluates archs, and owns no state."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nas.cluster.versions import versions_here
from searchspace.arch import Arch

Evaluate = Callable[[Arch], float]


@dataclass(frozen=True)
class Facts:
    """What an actor says of itself when it is ready.

    Args:
        node: the machine's name and address in the cluster.
        process: number there.
        versions: see `versions_here`.
    """

    node: str
    process: int
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Answer:
    """What came of an evaluation.

    Args:
        loss: None when it failed.
        reason: why it failed.
        seconds: that it took.
        fault: what was raised when it was no failure of the arch but a fault of the program.
    """

    loss: float | None
    reason: str
    seconds: float
    fault: Exception | None = None


class Evaluator:
    """Evaluates one arch after the other; built once, with everything that it needs.

    Args:
        build: makes the function from an arch to its held-out loss, of the content.
        content: what `build` takes; Ray hands over what was put into its object store.
        num_threads: of one operator.
    """

    def __init__(self, build: Callable[[Any], Evaluate], content: Any, num_threads: int) -> None:
        from hw_profiles.process import prepare_process, usable_processors

        prepare_process(min(num_threads, usable_processors()))
        self._node = node_here()
        self._evaluate = build(content)

    def hello(self) -> Facts:
        """Return where this is; the first answer says that it is ready."""
        return Facts(self._node, os.getpid(), versions_here())

    def evaluate(self, arch: Mapping[str, Any]) -> Answer:
        """Return what comes of an arch in its JSON form; other errors than failures are raised."""
        from nas.evaluation import EvaluationFailed

        start = time.perf_counter()
        try:
            loss = self._evaluate(Arch.from_dict(arch))
        except EvaluationFailed as error:
            return Answer(None, str(error), time.perf_counter() - start)
        return Answer(loss, "", time.perf_counter() - start)


def node_here() -> str:
    """Return the name of this machine and its address in the cluster."""
    import ray

    return f"{platform.node()} ({ray.util.get_node_ip_address()})"
