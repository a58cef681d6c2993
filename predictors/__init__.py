"""What guesses without running: training-free metrics, encodings and learned predictors."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from predictors.latency import LatencyRegressor
    from predictors.quality import QualityRegressor

__all__ = ["LatencyRegressor", "QualityRegressor"]

# Imported on first use: they bring scikit-learn, which most commands never need.
_HOMES = {"LatencyRegressor": "predictors.latency", "QualityRegressor": "predictors.quality"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
