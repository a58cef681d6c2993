"""Does the inherited loss order subnetworks as training them alone does?

    python -m tests.benchmarks.ranking --preset decoder-operators

Trains one supernet, then subnetworks of spread sizes alone, each from fresh weights on the same
task; prints both losses and Kendall's tau.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import kendalltau

from hw_profiles.process import prepare_process
from nas.calibration import calibrated_view
from nas.config import TrainConfig
from nas.evaluation import held_out_loss
from nas.progress import Reporter
from nas.tasks import TaskConfig, prepare_task
from nas.training import train_supernet
from searchspace.arch import Arch
from searchspace.cost import CostTable, arch_cost, num_params
from searchspace.files import read_json, write_json
from searchspace.space import SearchSpace
from tests.benchmarks._alone import train_alone


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", default="decoder-operators")
    parser.add_argument("--steps", type=int, default=3000, help="of the supernet")
    parser.add_argument("--alone-steps", type=int, default=400)
    parser.add_argument("--num", type=int, default=16)
    parser.add_argument("--num-random", type=int, default=2, help="random archs per step")
    parser.add_argument("--sampling", default="fair", help="of `nas.arch_sampling`")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/ranking"), help="goes on from there")
    parser.add_argument("--threads", type=int, help="default: every processor")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    prepare_process(arguments.threads)
    task = prepare_task(TaskConfig(), arguments.out / "task")
    space = SearchSpace.load(arguments.preset, task.vocab_size, task.family_facts)
    started = time.monotonic()
    supernet = train_supernet(
        space,
        task,
        TrainConfig(
            num_steps=arguments.steps,
            num_random=arguments.num_random,
            sampling=arguments.sampling,
        ),
        arguments.out / "supernet",
        seed=arguments.seed,
        budget_s=1.0,
        reporter=Reporter(),
    )
    result: dict[str, Any] = {"supernet_s": time.monotonic() - started, "archs": []}
    batches = task.evaluation_batches("test", 32_768, 8)
    config = TrainConfig(num_steps=arguments.alone_steps)
    path = arguments.out / "alone.json"
    known: dict[str, float] = read_json(path, "losses") if path.exists() else {}
    for arch in spread_archs(space, arguments.num, arguments.seed):
        inherited = held_out_loss(calibrated_view(supernet, arch, task), batches, task)
        if arch.id not in known:
            alone = train_alone(arch, task, config, arguments.seed)
            known[arch.id] = held_out_loss(alone, batches, task)
            write_json(path, known)
        row = {
            "arch_id": arch.id,
            "mixers": [layer.mixer for layer in arch.layers],
            "params": int(arch_cost(arch, num_params)),
            "inherited_loss": inherited,
            "alone_loss": known[arch.id],
        }
        result["archs"].append(row)
        print(row, file=sys.stderr, flush=True)
    columns = {
        key: [row[key] for row in result["archs"]] for key in ("inherited_loss", "alone_loss")
    }
    sizes = [-row["params"] for row in result["archs"]]
    result["kendall_tau"] = kendalltau(*columns.values()).statistic
    result["kendall_tau_of_params"] = kendalltau(sizes, columns["alone_loss"]).statistic
    if arguments.json:
        print(json.dumps(result, indent=1))
        return
    for row in result["archs"]:
        print(f"{row['params']:>9,} params  inherited {row['inherited_loss']:.3f}  alone "
              f"{row['alone_loss']:.3f}  {' '.join(row['mixers'])}")  # fmt: skip
    print(f"Kendall tau {result['kendall_tau']:.3f} (of parameter counts: "
          f"{result['kendall_tau_of_params']:.3f})")  # fmt: skip


def spread_archs(space: SearchSpace, num: int, seed: int) -> list[Arch]:
    """Return different random archs near even quantiles of the parameter count."""
    rng = np.random.default_rng([seed, 3])
    genotypes = space.sample_genotypes(rng, 40 * num)
    order = list(CostTable(space, num_params).of(genotypes).argsort())
    archs: dict[str, Arch] = {}
    for place in np.linspace(0, len(order) - 1, num, dtype=int):
        for row in order[place:] + order[:place]:
            arch = space.decode(genotypes[row])
            if arch.id not in archs:
                archs[arch.id] = arch
                break
    return list(archs.values())


if __name__ == "__main__":
    main()
