"""From the first stage to the second: order the weights, freeze the teacher, warm up other mixers.

Source: Wang et al. 2022, "LightHuBERT" (two-stage distillation).
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from nas.attention_transfer import SOFTMAX, transfer_attention
from nas.progress import Reporter
from nas.training.losses import data_loss
from nas.training.state import MAIN_STAGE
from searchspace.files import write_json
from searchspace.importance import order_by_importance
from searchspace.specs import ABSENT

if TYPE_CHECKING:
    from nas.training.trainer import Trainer

IMPORTANCE_BATCHES = 8


def begin_main_stage(trainer: Trainer, reporter: Reporter) -> None:
    """Prepare the weights, freeze the teacher, and forget the first stage's momenta.

    In a team every process does the same for itself; where they round differently, rank 0 is right.
    """
    start, supernet = trainer.state.step, trainer.supernet
    supernet.norm_blend = trainer.schedule.norm_blend(trainer.state)
    if trainer.config.importance_ordering:
        drawn = [trainer.batch(step) for step in range(start, start + IMPORTANCE_BATCHES)]
        batches = [(x.to(trainer.device), y.to(trainer.device)) for x, y in drawn]
        # So that what it makes itself is made there too.
        with trainer.device:
            order_by_importance(supernet, batches, data_loss)
        trainer.team.take_weights(supernet)
    trainer.passes.forget()
    trainer.teacher = trainer.new_teacher()
    if trainer.config.attention_transfer_steps:
        _transfer_attention(trainer, reporter)
        trainer.team.take_weights(supernet)
    trainer.optimizer = trainer.new_optimizer()
    trainer.state = replace(trainer.state, stage=MAIN_STAGE, stage_start=start)


def _transfer_attention(trainer: Trainer, reporter: Reporter) -> None:
    """Warm up the other mixers where the first stage trained softmax; write the errors."""
    space, config = trainer.space, trainer.config
    if any(layer.mixer not in (SOFTMAX, ABSENT) for layer in space.largest().layers):
        reporter.say(
            f"attention transfer is left out: the first mixer of space {space.name!r} is "
            "not softmax, so no softmax network is trained yet"
        )
        return
    errors = transfer_attention(
        trainer.supernet,
        trainer.task,
        steps=config.attention_transfer_steps,
        lr=config.attention_transfer_lr,
        seed=trainer.seed,
        reporter=reporter,
        batch_size=config.batch_size,
    )
    if trainer.team.rank == 0:
        shown = {name: asdict(error) for name, error in errors.items()}
        write_json(trainer.folder / "attention_transfer.json", shown)
