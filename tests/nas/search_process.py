"""One process of a shared search, for the tests: ``python search_process.py FOLDER STORAGE N``.

The loss is that of a made-up supernet; every evaluation leaves a line in FOLDER/log.txt at its
start and at its end, from which the test sees what was evaluated how often.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import numpy as np

from nas.candidates import Objectives, Prices
from nas.progress import Reporter
from nas.study import SearchProblem, SearchRun
from searchspace.arch import Arch
from searchspace.cost import arch_cost, num_params
from searchspace.space import SearchSpace
from tests.nas.conftest import synthetic_table

NAMES = ("loss", "latency_ms", "weight_bytes")
EVALUATION_S = 0.1


def loss_of(arch: Arch) -> float:
    """Falls with size, and with the depth at equal size."""
    return 3.0 - 0.1 * float(np.log(arch_cost(arch, num_params))) - 0.02 * arch.depth


def problem(folder: Path | None = None) -> SearchProblem:
    """A search over a preset with a made-up table; evaluations are logged in a folder."""
    space = SearchSpace.load("decoder-tiny", 384, {"kind": "decoder"})
    prices = Prices(space, synthetic_table(space), "prefill_b1_t64")

    def evaluate(arch: Arch) -> float:
        if folder is not None:
            note(folder, "start", arch)
            time.sleep(EVALUATION_S)
            note(folder, "end", arch)
        return loss_of(arch)

    objectives = Objectives.parse(NAMES, (), prices.metrics)
    return SearchProblem(space, prices, objectives, evaluate, seeds=(space.largest(),))


def note(folder: Path, word: str, arch: Arch) -> None:
    """Append a line; one small write is never torn."""
    with (folder / "log.txt").open("a") as log:
        log.write(f"{word} {os.getpid()} {arch.id}\n")


def main() -> None:
    """Take part in a search until N archs are evaluated."""
    folder, storage, sampler, num = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
    search = SearchRun(problem(folder), storage, sampler, seed=0)
    search.run(num, 1e9, Reporter(quiet=True))


if __name__ == "__main__":
    main()
