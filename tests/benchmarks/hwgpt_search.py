"""All samplers at equal numbers of evaluations, and the strong baselines beside them.

    python -m tests.benchmarks.hwgpt_search --data DIR [--seeds 5] [--evals 200] [--plot FILE.png]
    python -m tests.benchmarks.hwgpt_search --problem layered
    python -m tests.benchmarks.hwgpt_search --supernet runs/quickstart --seeds 3 --evals 100

With ``--data`` on the public HW-GPT-Bench surrogates: perplexity against parameters (pp), against
memory (pm) or both (``--three``). Share of the best-known front's hypervolume, from values without
noise, after so many different networks; where no front is published (``--three``, ``--supernet``)
the union of all runs of the table is the best known (``--three`` adds a long evolution on the
surrogates themselves). ``NAME+design`` starts from 50 networks of the structured
design; ``uniform_grid`` tries networks whose layers are all alike. Earlier figures stand below.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from searchspace.errors import UserError, unknown
from tests.benchmarks._search_peers import earlier_rows
from tests.benchmarks._search_plot import draw_curves
from tests.benchmarks._search_problems import (
    SHUFFLES,
    FloatArray,
    HwGpt,
    Layered,
    Problem,
    Shuffled,
    evolved_front,
)
from tests.benchmarks._search_runs import METHODS, Run, run_search, shares, summary

DEFAULT_METHODS = [name for name in METHODS if name != "gp"]


def problem_of(args: argparse.Namespace, wish: str) -> Problem:
    """Return the problem of a part of the table."""
    if wish == "layered":
        return Layered()
    if wish == "supernet":
        from tests.benchmarks._search_supernet import SupernetProblem

        cache = args.out / "losses.json" if args.out else None
        return SupernetProblem(args.supernet, args.objectives, args.tokens, cache)
    folder = args.data / "hwgpt" if (args.data / "hwgpt").is_dir() else args.data
    return HwGpt(folder, *wish.split())


def runs_of(args: argparse.Namespace, wish: str, problem: Problem, method: str) -> list[Run]:
    """Run or read the searches of one method, one per seed; each seed shuffles differently."""
    runs = []
    evals = args.evals_of.get(method, args.evals)
    for seed in range(args.seeds):
        settings = f"{wish} {method} {seed} {evals} {args.noise} {args.shuffle}"
        path = args.out / f"{settings.replace(' ', '_')}.json" if args.out else None
        if path is not None and path.is_file():
            stored = json.loads(path.read_text())
            runs.append(Run(np.array(stored["values"]), stored["seconds"]))
            continue
        shown = Shuffled(problem, args.shuffle, seed) if args.shuffle else problem
        run = run_search(shown, method, seed, evals, args.noise)
        runs.append(run)
        print(f"{settings}: {run.seconds:.1f} s", file=sys.stderr, flush=True)
        if path is not None:
            path.write_text(json.dumps({"values": run.values.tolist(), "seconds": run.seconds}))
    return runs


def reference_of(problem: Problem, runs: Sequence[Run]) -> FloatArray:
    """Return the best-known front: the published one, or the best that is found here."""
    known = problem.best_known()
    if known is not None:
        return known
    found = [run.values for run in runs]
    if isinstance(problem, HwGpt):
        found.append(evolved_front(problem, rounds=60, keep=600))
    return np.vstack(found)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line.

    Raises:
        UserError: for an unknown sampler, or when there is nothing to search.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, help="folder with hwgpt_*.npz and front_*.npz")
    parser.add_argument("--problem", choices=["layered"], help="a synthetic one, without data")
    parser.add_argument("--supernet", type=Path, help="a finished run folder")
    parser.add_argument("--spaces", nargs="*", default=["s", "m"], choices=["s", "m"])
    parser.add_argument("--pairs", nargs="*", default=["pp", "pm"], choices=["pp", "pm"])
    parser.add_argument("--three", action="store_true", help="perplexity, parameters and memory")
    parser.add_argument("--samplers", nargs="*", default=DEFAULT_METHODS, help="or: all")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--evals", type=int, default=200)
    parser.add_argument(
        "--evals-of",
        nargs="*",
        default=[],
        metavar="SAMPLER=N",
        help="other numbers of evaluations, such as gp=50 (2 s each and more)",
    )
    parser.add_argument("--noise", type=float, default=0.0, help="such as 0.02, multiplicative")
    parser.add_argument("--shuffle", nargs="?", const="labels", choices=SHUFFLES)
    parser.add_argument("--objectives", nargs="*", default=["loss", "latency_ms"])
    parser.add_argument("--tokens", type=int, default=4096, help="per loss of the supernet")
    parser.add_argument(
        "--out",
        type=Path,
        help="keep runs here and go on from them (a new folder for another supernet)",
    )
    parser.add_argument("--plot", type=Path, help="draw shares against evaluations")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args(arguments)
    if args.samplers == ["all"]:
        args.samplers = list(METHODS)
    args.evals_of = dict(_read_evals(text) for text in args.evals_of)
    for name in (*args.samplers, *args.evals_of):
        if name not in METHODS:
            raise unknown("sampler", name, METHODS)
    if args.data is None and args.supernet is None and args.problem is None:
        raise UserError(
            "nothing to search: give --data DIR, --supernet FOLDER or --problem layered"
        )
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
    return args


def _read_evals(text: str) -> tuple[str, int]:
    name, _, number = text.partition("=")
    if not number.isdigit():
        raise UserError(f"--evals-of {text!r} is not understood; write SAMPLER=NUMBER")
    return name, int(number)


def wishes_of(args: argparse.Namespace) -> list[str]:
    """Return the parts of the table."""
    pairs = ["three"] if args.three else args.pairs
    wishes = [f"{space} {pair}" for pair in pairs for space in args.spaces] if args.data else []
    wishes += ["supernet"] if args.supernet else []
    return wishes + (["layered"] if args.problem else [])


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Print an aligned table; a range stands behind its median."""
    widest = max(rows, key=len)
    keys = [key for key in widest if not key.endswith("_range")]
    cells = [[_cell(row, key) for key in keys] for row in rows]
    widths = [max(len(k), *(len(c[i]) for c in cells)) for i, k in enumerate(keys)]
    for line in [keys, *cells]:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def _cell(row: dict[str, Any], key: str) -> str:
    if row.get(key) is None and f"{key}_range" not in row:
        return "-" if key in row else ""
    low, high = (("-" if k is None else k) for k in row.get(f"{key}_range", ("", "")))
    median = "-" if row[key] is None else str(row[key])
    return f"{median} ({low}..{high})" if f"{key}_range" in row else median


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark from the command line."""
    args = parse(arguments)
    rows, curves = [], {}
    for wish in wishes_of(args):
        problem = problem_of(args, wish)
        runs = {method: runs_of(args, wish, problem, method) for method in args.samplers}
        reference = reference_of(problem, [run for group in runs.values() for run in group])
        curves[wish] = {
            m: [shares(r.values, reference) for r in group] for m, group in runs.items()
        }
        rows += [
            {"problem": wish, "sampler": method, **summary(curves[wish][method], group)}
            for method, group in runs.items()
        ]
        rows += [] if args.noise or args.shuffle else earlier_rows(wish)
    if args.plot:
        draw_curves(args.plot, curves)
    if args.json:
        print(json.dumps(rows))
    else:
        print_table(rows)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
