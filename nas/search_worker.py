"""One worker of `nas search --workers N`: ``python -m nas.search_worker RUN_FOLDER``."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path


def main() -> int:
    """Take part in a run's search; return the exit code as `nas` does."""
    parser = argparse.ArgumentParser(prog="python -m nas.search_worker")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--budget-s", type=float, required=True)
    options = parser.parse_args()
    from searchspace.errors import UserError

    try:
        take_part_in(options.folder, options.threads, options.budget_s)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def take_part_in(folder: Path, num_threads: int, budget_s: float) -> None:
    """Evaluate until the search is done, or until the process that started this one is gone.

    Args:
        folder: a run folder that is ready to be searched.
        num_threads: threads of one operator.
        budget_s: seconds, where no number of evaluations is given.
    """
    import torch

    from nas.config import load_config
    from nas.pipeline import Pipeline
    from nas.progress import Reporter
    from nas.search_stage import take_part

    starter = os.getppid()
    config = load_config(str(folder / "config.json"), out=str(folder))
    pipeline = Pipeline(config, Reporter(quiet=True))
    # The table is of the device with its number of threads, so it is checked before that changes.
    pipeline.table  # noqa: B018
    torch.set_num_threads(num_threads)
    take_part(pipeline, budget_s, lambda: os.getppid() != starter)


if __name__ == "__main__":
    sys.exit(main())
