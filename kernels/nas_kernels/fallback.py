"""Saying once that a slower way is taken because there is no kernel."""

from __future__ import annotations

import functools
import logging

logger = logging.getLogger(__name__)


@functools.cache
def report_fallback(operation: str, reason: str) -> None:
    """Log that `operation` runs without its low-bit kernel, the first time for each reason."""
    logger.info("%s runs on dequantised weights: %s", operation, reason)
