"""A nested FFN's M size, extracted, against the same architecture trained alone.

    python -m tests.benchmarks.matformer

Both see the same tokens in the same order. Source: Devvrit et al. 2023, "MatFormer", section 4.1.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from hw_profiles.process import prepare_process
from nas.config import TrainConfig
from nas.evaluation import held_out_loss
from nas.progress import Reporter
from nas.tasks import TaskConfig, prepare_task
from nas.training import train_supernet
from searchspace.space import SearchSpace
from tests.benchmarks._alone import train_alone


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", default="baseline-matformer")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, default=Path("runs/text"), help="folder to prepare in")
    parser.add_argument(
        "--all-sizes", action="store_true", help="train every size alone, not M only"
    )
    parser.add_argument("--test-tokens", type=int, default=65_536)
    parser.add_argument("--threads", type=int, help="default: every processor")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    prepare_process(arguments.threads)
    task = prepare_task(TaskConfig(), arguments.data)
    space = SearchSpace.load(arguments.preset, task.vocab_size, task.family_facts)
    config = TrainConfig(
        num_steps=arguments.steps, sampling="matformer", distillation=0.0, precision="fp32"
    )
    batches = task.evaluation_batches("test", arguments.test_tokens, 8)
    started = time.monotonic()
    supernet = train_supernet(
        space, task, config, Path(tempfile.mkdtemp()), seed=arguments.seed, budget_s=1.0,
        reporter=Reporter(),
    )  # fmt: skip
    result: dict[str, object] = {"steps": arguments.steps, "joint_s": time.monotonic() - started}
    sizes = sorted(space.intermediate_size)
    middle = sizes[len(sizes) // 2]
    rows = []
    for size in sizes:
        arch = space.uniform(intermediate_size=size)
        row = {"intermediate_size": size, "name": "M" if size == middle else ""}
        row["nested_loss"] = held_out_loss(supernet.extract(arch).eval(), batches, task)
        if size == middle or arguments.all_sizes:
            alone = train_alone(arch, task, config, arguments.seed)
            row["alone_loss"] = held_out_loss(alone, batches, task)
            row["nested_over_alone"] = row["nested_loss"] / row["alone_loss"]
        rows.append(row)
    result["sizes"] = rows
    if arguments.json:
        print(json.dumps(result, indent=1))
        return
    print(f"{arguments.steps} steps, losses in nats per {task.unit} on the test files")
    for row in rows:
        print("  ".join(f"{key} {value:.4f}" if isinstance(value, float) else f"{key} {value}"
                        for key, value in row.items()))  # fmt: skip


if __name__ == "__main__":
    main()
