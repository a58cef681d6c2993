"""Tensors that depend on shapes only, made once."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

import torch
from torch._guards import detect_fake_mode
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

P = ParamSpec("P")
R = TypeVar("R")

_users: list[list[object]] = []


@contextlib.contextmanager
def constants_used() -> Iterator[list[object]]:
    """Collect what cached functions return inside the block, for those who replay addresses.

    A cache drops the oldest constants, and a captured graph goes on reading where they were.
    """
    found: list[object] = []
    _users.append(found)
    try:
        yield found
    finally:
        _users[:] = [other for other in _users if other is not found]


def cached_constant(make: Callable[P, R]) -> Callable[P, R]:
    """Cache a function that makes masks or tables from hashable arguments.

    They are made outside inference mode whoever asks first: a tensor made inside it could not be
    used in training later. While a graph is captured, or tensors are made without values, nothing
    is cached. Treat the result as read-only.
    """

    @functools.lru_cache(maxsize=64)
    def cached(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.inference_mode(False), torch.no_grad():
            return make(*args, **kwargs)

    @functools.wraps(make)
    def constant(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling() or (is_in_torch_dispatch_mode() and detect_fake_mode()):
            # One kept would spoil later calls.
            return make(*args, **kwargs)
        value = cached(*args, **kwargs)  # type: ignore[arg-type]
        for found in _users:
            found.append(value)
        return value

    return constant
