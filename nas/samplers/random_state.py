"""The random numbers of a sampler as JSON, so that a search can go on as if never interrupted.

The project's own samplers draw from their seed and from what the study holds, so they have no such
state. Samplers of Optuna carry generators along.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from optuna.samplers import BaseSampler

from nas.samplers.optuna_samplers import ResumableSampler

PACKAGES = ("optuna.", "nas.samplers.", "nas.study.")


def random_state(sampler: BaseSampler) -> dict[str, Any]:
    """Return the state of every NumPy generator that a sampler holds, by where it is."""
    return {
        path: _jsonable(generator.get_state(legacy=False))
        for path, generator in _generators(sampler)
    }


def restore_random_state(sampler: BaseSampler, state: Mapping[str, Any]) -> None:
    """Set the generators of a sampler that was made as the one whose state this is.

    What the sampler does not hold is left out: another version may hold other generators.
    """
    if not state:
        return
    for part in _parts(sampler):
        if isinstance(part, ResumableSampler):
            part.begin()
    for path, generator in _generators(sampler):
        if path in state:
            generator.set_state(_arrays(state[path]))


def _generators(sampler: object) -> Iterator[tuple[str, np.random.RandomState]]:
    """Yield a sampler's generators with the names of the attributes that lead to them."""
    for path, value in _walk(sampler, "", set()):
        if isinstance(value, np.random.RandomState):
            yield path, value


def _parts(sampler: object) -> list[object]:
    return [value for _, value in _walk(sampler, "", set())]


def _walk(value: object, path: str, seen: set[int]) -> Iterator[tuple[str, object]]:
    if id(value) in seen:
        return
    seen.add(id(value))
    yield path, value
    if type(value).__module__.startswith(PACKAGES) and hasattr(value, "__dict__"):
        for name, part in sorted(vars(value).items()):
            yield from _walk(part, f"{path}.{name}" if path else name, seen)


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _jsonable(item) for key, item in value.items()}
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def _arrays(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a generator's state as NumPy takes it."""
    inner = dict(state["state"])
    return {**state, "state": {**inner, "key": np.array(inner["key"], dtype=np.uint32)}}
