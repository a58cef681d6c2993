"""What `train.attention_transfer_steps` buys: inherited losses with and without it.

    python -m tests.benchmarks.attention_transfer --json > attention_transfer.json

A supernet over softmax and other mixers is trained in two stages: its softmax network alone, then
random mixtures, taught by it. In between, every other mixer may learn to do what softmax does in
its slot; the second stage then is that many steps shorter. All start from the same first stage.
Judged is, for every mixer, the network that has it in all layers, right before the second stage and
at the end. Mixers without parameters of their own cannot be transferred to: what they lose is what
the steps taken from the second stage cost.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from hw_profiles.process import prepare_process
from nas.config import TrainConfig
from nas.evaluation import held_out_loss
from nas.progress import Reporter
from nas.tasks import TaskConfig, prepare_task
from nas.tasks.base import Task
from nas.training.state import MAIN_STAGE
from nas.training.trainer import Trainer
from searchspace.space import SearchSpace
from searchspace.supernet import Supernet
from tests.benchmarks._sub_blocks import aligned

SOFTMAX = "softmax"
MIXERS = ("hedgehog", "gla", "deltanet", "mamba", "retention", "cosine", "linear_elu")
BEFORE, END = "before second stage", "at the end"


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--mixers", nargs="+", default=list(MIXERS))
    parser.add_argument("--steps", type=int, default=700, help="in all, the transfer's included")
    parser.add_argument("--first-steps", type=int, default=600, help="of softmax alone")
    parser.add_argument("--transfer-steps", nargs="+", type=int, default=[25, 50])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--d-model", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument(
        "--data", type=Path, default=Path("runs/attention_transfer"), help="folder to prepare in"
    )
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    arguments.transfer_steps = sorted({0, *arguments.transfer_steps})
    if not 0 < arguments.first_steps < arguments.steps - arguments.transfer_steps[-1]:
        parser.error("--steps must be more than --first-steps and --transfer-steps together")
    prepare_process(arguments.threads)
    result = run(arguments)
    print(json.dumps(result, indent=1) if arguments.json else table_text(result))


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train all supernets; returns losses by transfer steps, moment, mixer and seed."""
    task = prepare_task(
        TaskConfig(vocab_size=512, seq_len=128, max_train_bytes=4_000_000), arguments.data
    )
    space = space_of(arguments, task)
    judge = judge_of(space, task)
    recipes: dict[int, Any] = {steps: [] for steps in arguments.transfer_steps}
    for seed in range(arguments.seeds):
        weights = first_stage(space, task, config_of(arguments, 0), seed)
        for steps, outcomes in recipes.items():
            with tempfile.TemporaryDirectory() as folder:
                config = config_of(arguments, steps)
                trainer = _SecondStage(space, task, config, Path(folder), seed, budget_s=1.0)
                outcomes.append(trainer.outcome(weights, arguments.first_steps, judge))
            last = {name: round(loss, 3) for name, loss in outcomes[-1][END].items()}
            print(f"seed {seed}, {steps} transfer steps: {last}", file=sys.stderr, flush=True)
    facts = {name: getattr(arguments, name) for name in ("steps", "first_steps", "seeds")}
    return {**facts, "unit": f"nats per {task.unit}", "recipes": recipes}


def space_of(arguments: argparse.Namespace, task: Task) -> SearchSpace:
    """Return a space whose only choice is the mixer of each layer."""
    heads = arguments.d_model // 16
    return SearchSpace(
        name="transfer",
        vocab_size=task.vocab_size,
        d_model=(arguments.d_model,),
        head_dim=16,
        num_layers=arguments.layers,
        min_depth=arguments.layers,
        mixers={mixer: {} for mixer in dict.fromkeys([SOFTMAX, *arguments.mixers])},
        heads=((heads, heads),),
        intermediate_size=(2 * arguments.d_model,),
    )


def config_of(arguments: argparse.Namespace, transfer_steps: int) -> TrainConfig:
    """Return the recipe with the transfer's steps taken from the second stage."""
    num_steps = arguments.steps - transfer_steps
    return TrainConfig(
        num_steps=num_steps,
        batch_size=arguments.batch_size,
        sampling="uniform",
        first_stage_share=arguments.first_steps / num_steps,
        attention_transfer_steps=transfer_steps,
        precision="fp32",
        checkpoint_s=1e9,
    )


Judge = Callable[[Supernet], dict[str, float]]


def judge_of(space: SearchSpace, task: Task) -> Judge:
    """Return what gives the validation loss of every mixer's network, by mixer."""
    batches = task.evaluation_batches("validation", 16_384, 16)
    networks = {mixer: space.uniform(mixer=mixer) for mixer in space.mixers}
    return lambda supernet: {
        mixer: held_out_loss(supernet.view(arch), batches, task) for mixer, arch in networks.items()
    }


def first_stage(
    space: SearchSpace, task: Task, config: TrainConfig, seed: int
) -> dict[str, Tensor]:
    """Train the softmax network alone; returns the supernet's weights."""
    trainer = Trainer(space, task, config, Path(), seed, budget_s=1.0)
    trainer.run_stage(Reporter(quiet=True), io.StringIO())
    return trainer.supernet.state_dict()


class _SecondStage(Trainer):
    """What follows the first stage of a training, watched."""

    began_s = 0.0

    def outcome(self, weights: dict[str, Tensor], step: int, judge: Judge) -> dict[str, Any]:
        """Train on from a first stage of `step` steps; returns losses and seconds of the CPU."""
        self.supernet.load_state_dict(weights)
        self.state = replace(self.state, step=step)
        self.judge = judge
        self.run(Reporter(quiet=True))
        second_s = time.process_time() - self.began_s
        losses = {BEFORE: self.before, END: judge(self.supernet)}
        return {**losses, "transfer_s": self.transfer_s, "second_stage_s": second_s}

    def run_stage(self, reporter: Reporter, log: IO[str]) -> None:
        if self.state.stage == MAIN_STAGE:
            self.transfer_s = time.process_time() - self.began_s
            self.before = self.judge(self.supernet)
            self.began_s = time.process_time()
            super().run_stage(reporter, log)
        else:
            super().run_stage(reporter, log)
            self.began_s = time.process_time()


def table_text(result: dict[str, Any]) -> str:
    """Return mean and standard deviation over the seeds, and what the transfer gains."""
    recipes = result["recipes"]
    plain = recipes[0]
    lines = [["transfer steps"], ["loss of"]]
    columns = [(moment, steps) for moment in (BEFORE, END) for steps in recipes]
    for moment, steps in columns:
        lines[0].append(str(steps))
        lines[1].append(moment)
    lines[0] += [str(steps) for steps in recipes if steps]
    lines[1] += ["gain" for steps in recipes if steps]
    for mixer in plain[0][END]:
        cells = [[seed[moment][mixer] for seed in recipes[steps]] for moment, steps in columns]
        cells += [
            [a[END][mixer] - b[END][mixer] for a, b in zip(plain, recipes[steps], strict=True)]
            for steps in recipes
            if steps
        ]
        lines.append([mixer, *map(mean_and_spread, cells)])
    second = result["steps"] - result["first_steps"]
    head = (
        f"validation loss in {result['unit']}, mean ± standard deviation over {result['seeds']} "
        f"seeds;\n{result['first_steps']} steps of softmax alone, then {second} steps, of which "
        "some are transfer"
    )
    return f"{head}\n{aligned(lines)}\n{seconds_text(result)}"


def seconds_text(result: dict[str, Any]) -> str:
    """Return what the steps between the stages, of which transfer is one, and the second take."""
    texts = []
    for steps, seeds in result["recipes"].items():
        transfer_s, main_s = (
            statistics.fmean(seed[name] for seed in seeds)
            for name in ("transfer_s", "second_stage_s")
        )
        texts.append(f"{steps}: {transfer_s:.1f} + {main_s:.1f}")
    return f"seconds of transfer and second stage: {', '.join(texts)}"


def mean_and_spread(values: list[float]) -> str:
    """Return mean and standard deviation as text."""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}"


if __name__ == "__main__":
    main()
