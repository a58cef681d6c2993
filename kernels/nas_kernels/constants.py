"""Tensors that depend on shapes only, made once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

import torch

P = ParamSpec("P")
R = TypeVar("R")


def cached_constant(make: Callable[P, R]) -> Callable[P, R]:
    """Cache a function that makes masks or tables from hashable arguments.

    They are made outside inference mode whoever asks first: a tensor made inside it could not be
    used in training later. Treat the result as read-only.
    """

    @functools.lru_cache(maxsize=64)
    def cached(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.inference_mode(False), torch.no_grad():
            return make(*args, **kwargs)

    return cast(Callable[P, R], functools.wraps(make)(cached))
