"""Which process works on a trial, and whether it still lives.

A trial says who owns it from before the sampler is asked. On the same machine the process table
tells at once whether the owner is gone; of other machines only the heartbeat is seen, a number on
the trial that keeps changing while the owner lives.
"""

from __future__ import annotations

import contextlib
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

OWNER = "owner"
BEAT = "heartbeat"
BEAT_S = 5.0
EXPIRY_S = 60.0


_at_work: set[str] = set()


def new_owner() -> dict[str, Any]:
    """Return what identifies this process and one search in it, in JSON."""
    process = os.getpid()
    return {
        "host": _host(),
        "process": process,
        "started": _start_of(process),
        "search": uuid.uuid4().hex,
    }


@contextlib.contextmanager
def at_work(owner: Mapping[str, Any]) -> Iterator[None]:
    """Show to other searches of this process that an owner is at work, while the block runs."""
    _at_work.add(owner["search"])
    try:
        yield
    finally:
        _at_work.discard(owner["search"])


def is_gone(owner: Mapping[str, Any] | None) -> bool | None:
    """Return whether an owner has ended; None if that cannot be seen from here."""
    if owner is None:
        return None
    if owner.get("search") in _at_work:
        # Most trials under way are this process's own where it has many of them.
        return False
    if owner.get("host") != _host():
        return None
    if owner["process"] == os.getpid() and owner["started"] == _start_of(os.getpid()):
        return owner["search"] not in _at_work
    return bool(_start_of(int(owner["process"])) != owner["started"])


def _host() -> str:
    """Name the machine since it was started, and the container: process numbers count in it."""
    boot = _read("/proc/sys/kernel/random/boot_id")
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    return f"{platform.node()} {boot} {space}".strip()


def _start_of(process: int) -> str:
    """Return when a process was started, in the system's own unit; empty if it does not run."""
    try:
        os.kill(process, 0)
    except PermissionError:
        pass
    except OSError:
        return ""
    # The name, in brackets, may hold spaces; the start is field 22 and a zombie has state Z.
    fields = _read(f"/proc/{process}/stat").rpartition(")")[2].split()
    if fields and fields[0] in "ZX":
        return ""
    return fields[19] if len(fields) > 19 else "running"


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


class Watch:
    """Tells which running trials have lost their owner.

    Args:
        expiry_s: seconds without a sign of life after which an owner that cannot be seen from
            here counts as gone, by this process's own clock.
    """

    def __init__(self, expiry_s: float = EXPIRY_S) -> None:
        self._expiry_s = expiry_s
        self._seen: dict[int, tuple[object, float]] = {}

    def is_lost(self, trial: FrozenTrial) -> bool:
        """Return whether nobody works on a running trial any more."""
        gone = is_gone(trial.user_attrs.get(OWNER))
        if gone is not None:
            return gone
        sign = (trial.user_attrs.get(BEAT), len(trial.params), len(trial.user_attrs))
        before, since = self._seen.get(trial.number, (None, 0.0))
        if sign != before:
            self._seen[trial.number] = (sign, time.monotonic())
            return False
        return time.monotonic() - since > self._expiry_s


@contextlib.contextmanager
def heartbeats(
    study: Study, trial_ids: Callable[[], Iterable[int]], interval_s: float = BEAT_S
) -> Iterator[None]:
    """Show on trials that this process lives, while the block runs.

    Args:
        study: has the trials.
        trial_ids: returns those that are worked on; asked in another thread.
        interval_s: seconds from one sign of life to the next.
    """
    stop = threading.Event()
    storage = study._storage

    def beat() -> None:
        count, took_s = 0, 0.0
        # Signs of life of a thousand trials may not keep the block from its work.
        while not stop.wait(max(interval_s, min(20 * took_s, EXPIRY_S / 4))):
            count += 1
            start = time.monotonic()
            for trial_id in trial_ids():
                # One that was taken away, or a storage that is busy: the block sees for itself.
                with contextlib.suppress(Exception):
                    storage.set_trial_user_attr(trial_id, BEAT, count)
            took_s = time.monotonic() - start
        storage.remove_session()

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


class OwningSampler(BaseSampler):
    """Writes the owner on every trial before another sampler is asked.

    Args:
        sampler: is asked.
    """

    def __init__(self, sampler: BaseSampler) -> None:
        self.sampler = sampler
        self.owner = new_owner()

    def reseed_rng(self) -> None:
        """Reseed the sampler."""
        self.sampler.reseed_rng()

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Say whose trial it is."""
        study._storage.set_trial_user_attr(trial._trial_id, OWNER, self.owner)
        self.sampler.before_trial(study, trial)

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Ask the sampler."""
        return self.sampler.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Ask the sampler."""
        return self.sampler.sample_relative(study, trial, search_space)

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Ask the sampler."""
        return self.sampler.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(
        self,
        study: Study,
        trial: FrozenTrial,
        state: TrialState,
        values: Sequence[float] | None,
    ) -> None:
        """Tell the sampler."""
        self.sampler.after_trial(study, trial, state, values)
