"""Everything that there is to measure on a GPU, in one command.

    PYTHONPATH=.:kernels python -m tests.benchmarks.gpu --out FOLDER --budget-s 540

Five parts, each in a process of its own with its share of the budget and its own log: the tests
that run on a GPU, every kernel against its alternatives, a latency table, its predictions against
networks that it has not seen, and training. A part that fails, hangs or lacks a package leaves the
others alone. Time that a part does not need goes to those behind it.

It needs PyTorch, Triton and NumPy, for the tests pytest and hypothesis too, and no installation.
The folder gets `summary.json` (rewritten after every part) and a folder for each part with its
`stdout.txt` and `log.txt`. `--device cpu --quick` only shows that everything runs. A latency table
that is to be shipped takes a run of its own: `--parts profile --budget-s 580`, again with the same
folder until `profile/figures.json` says that it can be.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks._gpu_parts import PARTS, Part, short

BUDGET_S = 540.0
GRACE_S = 10.0
"""After its budget a part is ended; it may have had to finish a measurement."""
FACTS = """
import json, sys, torch
from tests.benchmarks._gpu_device import facts
device = torch.device(sys.argv[1])
if device.type == "cuda" and not torch.cuda.is_available():
    sys.exit("no CUDA device is visible to PyTorch; --device cpu --quick only shows that all runs")
print(json.dumps(facts(device)))
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts; returns 0 when all that were started ended well."""
    options = parse(arguments)
    deadline = time.monotonic() + options.budget_s
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        facts = facts_of(options.device)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    summary: dict[str, Any] = {"facts": facts, "quick": options.quick}
    summary["parts"] = results = {}
    parts = [PARTS[name] for name in options.parts]
    for index, part in enumerate(parts):
        weights = sum(other.weight for other in parts[index:])
        budget_s = max(deadline - time.monotonic(), 1.0) * part.weight / weights
        print(f"{part.name}: {budget_s:.0f} s", file=sys.stderr, flush=True)
        results[part.name] = run(part, options, budget_s)
        write(options.out / "summary.json", summary)
    text = table(summary)
    print(json.dumps(summary, indent=1) if options.json else text)
    return int(any(result["status"] != "ok" for result in results.values()))


def facts_of(device: str) -> dict[str, Any]:
    """Return what the device is, found by a process that does not stay on it.

    Raises:
        RuntimeError: when it cannot be used, saying why.
    """
    command = [sys.executable, "-c", FACTS, device]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(last_line(done.stderr))
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--budget-s", type=float, default=BUDGET_S)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="small shapes: does everything run?")
    parser.add_argument("--json", action="store_true", help="print data instead of a table")
    return parser.parse_args(arguments)


def run(part: Part, options: argparse.Namespace, budget_s: float) -> dict[str, Any]:
    """Run one part; returns its status, seconds, and what it found."""
    reason = ""
    folder = (options.out / part.name).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    command = [sys.executable, *part.command(options, folder, budget_s)]
    with (folder / "stdout.txt").open("w") as out, (folder / "log.txt").open("w") as log:
        # A group of its own: whatever it has started ends with it.
        process = subprocess.Popen(command, stdout=out, stderr=log, start_new_session=True)
        try:
            process.wait(budget_s + GRACE_S)
        except subprocess.TimeoutExpired:
            reason = f"time is up after {budget_s:.0f} s"
        finally:
            end(process)
    if not reason and process.returncode:
        said = last_line((folder / "log.txt").read_text(encoding="utf-8", errors="replace"))
        said = said or last_line((folder / "stdout.txt").read_text(encoding="utf-8"))
        reason = f"exit status {process.returncode}: {said}"
    return {
        "status": "failed" if reason else "ok",
        "seconds": round(time.monotonic() - began, 1),
        "reason": reason,
        "command": command[1:],
        "figures": part.figures(folder),
    }


def end(process: subprocess.Popen[bytes]) -> None:
    """End a part that still runs, with all that it has started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def write(path: Path, summary: dict[str, Any]) -> None:
    """Write the summary whole or not at all."""
    made = path.with_suffix(".tmp")
    made.write_text(json.dumps(summary, indent=1), encoding="utf-8")
    made.replace(path)


def table(summary: dict[str, Any]) -> str:
    """Return the summary as text."""
    facts = summary["facts"]
    lines = [
        f"{facts['device']}, PyTorch {facts['torch']}, Triton {facts['triton']}, {facts['date']}"
    ]
    lines += ["", f"{'part':15}{'status':10}{'s':>7}  figures"]
    for name, result in summary["parts"].items():
        row = f"{name:15}{result['status']:10}{result['seconds']:7.0f}  "
        lines.append(row + "; ".join(filter(None, (result["reason"], short(result["figures"])))))
    return "\n".join(lines)


def last_line(text: str) -> str:
    """Return the last line that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


if __name__ == "__main__":
    sys.exit(main())
