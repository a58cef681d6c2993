"""Hardware-aware neural architecture search for transformers.

`nas.run()` is the main job, the same as the command `nas run`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nas.config import ExperimentConfig
    from nas.pipeline import Run

__version__ = "0.1.0"
__all__ = ["__version__", "run"]


def run(config: ExperimentConfig | str | None = None, *, quiet: bool = False, **values: Any) -> Run:
    """Train, profile, search and export; return the measured front.

    Args:
        config: an `ExperimentConfig`, the path of a TOML file, or None for the quick start.
        quiet: show no progress.
        values: overrides by key, with ``__`` for the dot: ``out="runs/a"``, ``task__name="text"``.

    Raises:
        UserError: for a mistake in the config, the data or the run folder, in one sentence.
    """
    from nas.config import ExperimentConfig, load_config
    from nas.pipeline import Pipeline
    from nas.progress import Reporter
    from searchspace.errors import UserError

    if not isinstance(config, ExperimentConfig):
        config = load_config(config, **values)
    elif values:
        raise UserError("give overrides with a config file or none, not with an ExperimentConfig")
    return Pipeline(config, Reporter(quiet)).run()
