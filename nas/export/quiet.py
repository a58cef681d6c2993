"""Libraries that talk about their own internals while they are imported or used."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

TALKERS = ("torch", "torchao", "executorch")


@contextmanager
def quiet() -> Iterator[None]:
    """Keep warnings and log messages of PyTorch and of libraries around it from the terminal."""
    loggers = [logging.getLogger(name) for name in TALKERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
