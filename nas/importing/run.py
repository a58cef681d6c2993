"""Writing the run folder that starts from a checkpoint.

import/space.toml            the search space, whose largest network is the checkpoint
import/tokenizer.json        the checkpoint's, for text
import/supernet.safetensors  the weights, ordered by importance: what `train.start` names
import/import.json           where they come from, and what was checked
task/                        the prepared task
config.json                  written last: a folder without it is no run yet
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nas.config import ExperimentConfig
from nas.importing.checkpoint import Checkpoint
from nas.importing.spaces import Choices, space_around, space_toml
from nas.importing.verify import require_equal
from nas.progress import Reporter
from nas.run_folder import RunFolder
from nas.tasks import prepare_task
from nas.tasks.base import Task
from nas.tasks.checkpoint_tokenizer import CheckpointTokenizer, read_checkpoint_tokenizer
from nas.tasks.labelled import LabelledTask
from nas.tasks.text_rows import TokenRows
from nas.training.losses import data_loss
from nas.training.state import START
from searchspace.arch import Arch
from searchspace.errors import UserError
from searchspace.files import write_json, write_tensors, write_text
from searchspace.importance import order_by_importance
from searchspace.space import SearchSpace
from searchspace.supernet import Supernet

IMPORT, SPACE, TOKENIZER, FACTS = "import", "space.toml", "tokenizer.json", "import.json"
TEXT_TASKS, ENCODER_TASKS = ("stdlib", "text", "tokens"), ("text_classification",)
NUM_BATCHES = 8
Batches = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Import:
    """What is brought in, and how.

    Args:
        checkpoint: looked through already.
        config: of the run; see `nas.import_command`.
        choices: what smaller networks are offered.
        check: compare with transformers, where it is installed.
    """

    checkpoint: Checkpoint
    config: ExperimentConfig
    choices: Choices
    check: bool = True

    def run(self, reporter: Reporter) -> dict[str, Any]:
        """Write the run folder; returns the content of `import.json`.

        Raises:
            UserError: when checkpoint, task and folder do not go together; the folder is no run
                then.
        """
        folder = Path(self.config.out)
        self._check_task()
        require_free(folder)
        tokenizer = self._tokenizer()
        facts: dict[str, Any] = {
            "checkpoint": self.checkpoint.folder.resolve().name,
            "architecture": self.checkpoint.recipe.architecture,
            "arch_id": self.checkpoint.recipe.arch.id,
        }
        facts["difference"] = self._difference(reporter)
        shutil.rmtree(folder / IMPORT, ignore_errors=True)
        if tokenizer is not None:
            tokenizer.save(folder / IMPORT / TOKENIZER)
        task = prepare_task(self.config.task, RunFolder(folder).task, reporter.say)
        supernet = self._supernet(task)
        facts |= self._order(supernet, task, reporter)
        write_tensors(folder / IMPORT / START, supernet.state_dict())
        write_json(folder / IMPORT / FACTS, facts)
        write_json(RunFolder(folder).config, self.config.to_dict())
        return facts

    def _check_task(self) -> None:
        """Refuse a task that the network is not for."""
        family = self.checkpoint.recipe.family
        check_task_name(self.checkpoint, self.config.task.name)
        longest, seq_len = family.max_tokens, self.config.task.seq_len
        if family.embedding_position == "learned" and seq_len > longest:
            raise UserError(
                f"task.seq_len={seq_len} is more than the {longest} positions of the checkpoint; "
                f"give --set task.seq_len={longest} or less"
            )

    def _tokenizer(self) -> CheckpointTokenizer | None:
        """Return the checkpoint's tokenizer, unless the task has token files."""
        if self.config.task.name == "tokens":
            return None
        recipe = self.checkpoint.recipe
        tokenizer = read_checkpoint_tokenizer(self.checkpoint.folder, TOKENIZER, recipe.vocab_size)
        if recipe.family.mask_padding:
            pad = TokenRows(tokenizer, self.config.task.seq_len).pad
            if pad != recipe.family.pad_token:
                raise UserError(
                    f"config.json has pad_token_id={recipe.family.pad_token}, but the tokenizer "
                    f"pads with {pad}; correct one of them"
                )
        return tokenizer

    def _difference(self, reporter: Reporter) -> float | None:
        """Return how far the logits are from those of transformers; None where not checked."""
        if not self.check:
            return None
        found = require_equal(self.checkpoint, self.checkpoint.subnet())
        reporter.say(
            "logits: not checked, because transformers is not installed"
            if found is None
            else f"logits: equal to those of transformers within {found:.1e} of the largest"
        )
        return found

    def _supernet(self, task: Task) -> Supernet:
        """Return the supernet that holds the checkpoint; its space is written."""
        path = Path(self.config.preset)
        name = self.checkpoint.folder.resolve().name
        seq_len = self.config.task.seq_len
        space = space_around(self.checkpoint.recipe, name, self.choices, seq_len)
        write_text(path, space_toml(space))
        # As the stages of a run read it.
        space = SearchSpace.load(
            str(path), task.vocab_size, {"kind": "decoder", **task.family_facts}
        )
        supernet = Supernet(space, torch.Generator().manual_seed(self.config.seed))
        self._check_labels(task)
        self.checkpoint.fill(supernet)
        self._match_labels(supernet, task)
        return supernet

    def _check_labels(self, task: Task) -> None:
        number = self.checkpoint.recipe.family.num_classes
        if isinstance(task, LabelledTask) and len(task.labels) != number:
            raise UserError(
                f"the checkpoint tells {number} classes apart, the data have {len(task.labels)}: "
                f"{', '.join(task.labels)}; give data of these classes"
            )

    @torch.no_grad()
    def _match_labels(self, supernet: Supernet, task: Task) -> None:
        """Bring the classes into the task's order where both name them alike."""
        labels = self.checkpoint.labels()
        if not isinstance(task, LabelledTask) or sorted(labels) != sorted(task.labels):
            return
        order = torch.tensor([labels.index(name) for name in task.labels])
        for name in ("ends.head.weight", "ends.head.bias"):
            supernet.params[name].copy_(supernet.params[name][order])

    def _order(self, supernet: Supernet, task: Task, reporter: Reporter) -> dict[str, Any]:
        """Order heads, FFN channels and features; returns losses before and after."""
        config, space = self.config, supernet.space
        batches = [
            task.train_batch(step, config.train.batch_size, config.seed)
            for step in range(NUM_BATCHES)
        ]
        sizes = sorted(space.intermediate_size)
        half = min(sizes, key=lambda size: abs(size - max(sizes) / 2))
        halved = space.uniform(intermediate_size=half)
        first = mean_loss(supernet, halved, batches)
        reporter.say("ordering heads and FFN channels by importance")
        order_by_importance(supernet, batches, data_loss)
        losses = {
            "largest": mean_loss(supernet, space.largest(), batches),
            "half_of_the_ffn_by_importance": mean_loss(supernet, halved, batches),
            "half_of_the_ffn_as_it_came": first,
        }
        return {"calibration_loss": losses, "half_of_the_ffn": half}


@torch.no_grad()
def mean_loss(supernet: Supernet, arch: Arch, batches: Batches) -> float:
    """Return the mean loss of a network in nats per target."""
    network = supernet.view(arch)
    losses = [float(data_loss(network(inputs), targets)) for inputs, targets in batches]
    return sum(losses) / len(losses)


def check_task_name(checkpoint: Checkpoint, name: str) -> None:
    """Refuse a task that a network is not for.

    Raises:
        UserError: naming those that it is for.
    """
    is_decoder = checkpoint.recipe.family.kind == "decoder"
    fitting = TEXT_TASKS if is_decoder else ENCODER_TASKS
    if name not in fitting:
        raise UserError(
            f"a {checkpoint.recipe.architecture} cannot be trained on task={name}; choose "
            f"{' or '.join(fitting)} with --task and --data"
        )


def require_free(folder: Path) -> None:
    """Refuse a folder that holds anything but an import that was broken off.

    Raises:
        UserError: naming what it holds.
    """
    if not folder.exists():
        return
    foreign = [path.name for path in folder.iterdir() if path.name not in (IMPORT, "task")]
    if "config.json" in foreign:
        raise UserError(f"{folder} holds a run already; give another --out")
    if foreign:
        raise UserError(f"{folder} is not empty, it holds {sorted(foreign)[0]}; give another --out")
