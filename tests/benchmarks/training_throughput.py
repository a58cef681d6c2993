"""Tokens per second of supernet training against plain training of its largest network.

    PYTHONPATH=.:kernels python -m tests.benchmarks.training_throughput --device cuda

It needs torch and numpy, on a GPU triton, and no installation. Each way of training (`--modes`:
operator by operator, CUDA graphs, `torch.compile`) and precision has three rows: the plain network,
the supernet when it trains only the largest one (what views cost), and a sandwich step with
distillation, all of whose archs' tokens count. Rows take turns, a few whole steps with the same
optimizer at a time; medians are given. `work` is the share of the largest network's weights that
the archs of a step have on average: where a step costs as much as its archs do, the ratio to the
plain network is 1 / work. `--json` also has the first losses, which must be alike in all modes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from nas.config import COMPILE_MODES, TrainConfig
from nas.training.device import training_device
from nas.training.modes import COMPILE, GRAPHS
from nas.training.state import FIRST_STAGE, MAIN_STAGE
from searchspace.errors import UserError
from searchspace.space import SearchSpace
from tests.benchmarks._gpu_device import facts
from tests.benchmarks._training_sides import PlainTraining, RandomTokens, SupernetTraining

PLAIN, ALONE, SANDWICH = "plain", "supernet, largest", "supernet, sandwich"
WARM_UPS = 4
"""Steps before anything is timed: archs that recur are compiled in the second, captured in the
third."""
MOST_SAMPLES = 60


@dataclass
class Contender:
    """One row of the table."""

    what: str
    mode: str
    precision: str
    training: Any
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def row(self, tokens: int) -> dict[str, Any]:
        """Return medians; tokens are those of a batch."""
        step_s = statistics.median(self.seconds)
        return {
            "what": self.what,
            "mode": self.mode,
            "precision": self.precision,
            "archs": self.training.num_archs,
            "work": self.training.work,
            "step_ms": 1e3 * step_s,
            "tokens_s": tokens * self.training.num_archs / step_s,
            "samples": len(self.seconds),
            "losses": self.losses,
        }


def contenders(options: argparse.Namespace, folder: Path, deadline: float) -> list[Contender]:
    """Return what is compared, each warmed up, as far as there is time."""
    space = SearchSpace.load(options.preset, options.vocab)
    task = RandomTokens(options.tokens, options.vocab)
    found: list[Contender] = []
    for precision in options.precisions:
        for mode in options.modes:
            config = TrainConfig(
                num_steps=10**9, batch_size=options.batch_size, num_random=options.random,
                first_stage_share=0.5, warmup_steps=1, precision=precision, device=options.device,
                compile=mode,
            )  # fmt: skip
            makers: dict[str, Callable[[], Any]] = {
                PLAIN: lambda config=config: PlainTraining(space, task, config),
                ALONE: lambda config=config: SupernetTraining(
                    space, task, config, FIRST_STAGE, folder
                ),
                SANDWICH: lambda config=config: SupernetTraining(
                    space, task, replace(config, first_stage_share=0.0), MAIN_STAGE, folder
                ),
            }
            for what, make in makers.items():
                if time.monotonic() > deadline:
                    print(f"no time left for {what}, {mode}, {precision}", file=sys.stderr)
                    continue
                training = make()
                losses = [float(training.step()) for _ in range(WARM_UPS)]
                found.append(Contender(what, mode, precision, training, losses))
                print(f"ready: {what}, {mode}, {precision}", file=sys.stderr, flush=True)
    return found


def measure(some: Sequence[Contender], steps: int, device: torch.device, deadline: float) -> None:
    """Let all take turns, the first one in turn, until the deadline; at least three times."""
    for turn in range(MOST_SAMPLES):
        if turn >= 3 and time.monotonic() > deadline:
            return
        first = turn % max(len(some), 1)
        for contender in [*some[first:], *some[:first]]:
            start = time.perf_counter()
            for _ in range(steps):
                contender.training.step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            contender.seconds.append((time.perf_counter() - start) / steps)


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add the ratios of tokens/s to the plain network's of the same mode, and of mode off."""
    plain = {(r["mode"], r["precision"]): r["tokens_s"] for r in rows if r["what"] == PLAIN}
    for row in rows:
        for name, mode in (("to_plain", row["mode"]), ("to_plain_off", "off")):
            base = plain.get((mode, row["precision"]))
            row[name] = row["tokens_s"] / base if base else None
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as text."""
    lines = [f"{'training':<20}{'mode':<9}{'precision':<10}{'archs':>6}{'work':>7}{'step ms':>10}"
             f"{'tokens/s':>12}{'/ plain':>9}{'/ plain off':>13}{'n':>5}"]  # fmt: skip
    for row in rows:
        ratios = ["-" if row[n] is None else f"{row[n]:.3f}" for n in ("to_plain", "to_plain_off")]
        lines.append(
            f"{row['what']:<20}{row['mode']:<9}{row['precision']:<10}{row['archs']:>6}"
            f"{row['work']:>7.2f}{row['step_ms']:>10.2f}{row['tokens_s']:>12,.0f}"
            f"{ratios[0]:>9}{ratios[1]:>13}{row['samples']:>5}"
        )
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--preset", default="decoder-small")
    parser.add_argument("--modes", nargs="+", choices=COMPILE_MODES[1:], help="ways of training")
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), default=["bf16"])
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--random", type=int, default=1, help="random archs of a step")
    parser.add_argument("--steps", type=int, default=5, help="steps at a time")
    parser.add_argument("--budget-s", type=float, default=240.0)
    parser.add_argument("--json", action="store_true", help="print data instead of a table")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    options = parse(arguments)
    began = time.monotonic()
    try:
        device = training_device(options.device)
        if options.modes is None:
            options.modes = ["off", GRAPHS, COMPILE] if device.type == "cuda" else ["off"]
        with tempfile.TemporaryDirectory() as folder:
            # Half of the time for making, compiling and capturing.
            some = contenders(options, Path(folder), began + 0.5 * options.budget_s)
            measure(some, options.steps, device, began + options.budget_s)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    rows = with_ratios([one.row(options.batch_size * options.tokens) for one in some])
    if options.json:
        print(json.dumps({**facts(device), "options": vars(options), "rows": rows}))
        return 0
    found = facts(device)
    print(f"{found['device']}, torch {found['torch']}, {found['date']}")
    sizes = f"batch {options.batch_size} x {options.tokens} tokens, vocabulary {options.vocab}"
    print(f"{options.preset}, {sizes}")
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
