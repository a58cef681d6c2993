"""Attention transfer: each mixer learns to do what softmax does in its slot.

Only the parameters that are a mixer's own are trained. Queries, keys, values and output projection
are shared with softmax in the supernet and stay as they are.

Shapes: B batch, T tokens, D d_model.

Source: Zhang et al. 2024, "LoLCATs: On Low-Rank Linearizing of Large Language Models", section 3.1
(attention transfer: mean squared error of the outputs of each layer, all layers at once on the
inputs that the softmax network gives them).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nas.progress import Reporter
from searchspace.arch import Arch
from searchspace.errors import UserError
from searchspace.space import SearchSpace
from searchspace.specs import ABSENT, MixerSpec
from searchspace.subnet import Subnet, block_name
from searchspace.supernet import Supernet

if TYPE_CHECKING:
    from nas.training.task import TrainingTask

SOFTMAX = "softmax"


@dataclass(frozen=True)
class TransferError:
    """How far a mixer is from softmax on a batch it was not trained on.

    Args:
        before: mean squared difference of the outputs, relative to softmax's mean square.
        after: the same after the transfer.
    """

    before: float
    after: float


@dataclass(frozen=True)
class _Student:
    """A mixer with its own options in all slots.

    Args:
        label: the mixer's name, with the option that differs from the first choice.
        arch: a network of the largest size with it everywhere.
        own: names of its own parameters, relative to the sub-block.
    """

    label: str
    arch: Arch
    own: tuple[str, ...]


def transfer_attention(
    supernet: Supernet,
    task: TrainingTask,
    *,
    steps: int,
    lr: float,
    seed: int,
    reporter: Reporter,
    batch_size: int = 8,
) -> dict[str, TransferError]:
    """Warm-start every other mixer of a supernet whose softmax network is trained.

    Args:
        supernet: changed in place.
        task: gives the inputs.
        steps: batches.
        lr: learning rate of Adam at first; it falls linearly to 0.
        seed: of the batches.
        reporter: shows the progress, and which mixers have nothing of their own to train.
        batch_size: sequences per batch.

    Returns:
        The errors by `layer<slot>.<mixer>`.

    Raises:
        UserError: when the space does not offer softmax.
    """
    if SOFTMAX not in supernet.space.mixers:
        raise UserError(
            f"train.attention_transfer_steps={steps} needs softmax to learn from, but space "
            f"{supernet.space.name!r} has only {', '.join(supernet.space.mixers)}; set it to 0"
        )
    source = _everywhere(supernet.space, mixer=SOFTMAX)
    students = _students(supernet, source, reporter)
    held_out = task.train_batch(steps, batch_size, seed)[0].to(supernet.device)
    before = _errors(supernet, source, students, held_out)
    params = [supernet.params[name] for name in _own_params(supernet, students)]
    if params:
        optimizer = torch.optim.Adam(params, lr=lr, betas=(0.9, 0.99))
        with reporter.bar("attention transfer") as bar:
            for step in range(steps):
                inputs = task.train_batch(step, batch_size, seed)[0].to(supernet.device)
                optimizer.param_groups[0]["lr"] = lr * (1.0 - step / steps)
                error = _step(supernet, source, students, inputs)
                supernet.publish_gradients()
                optimizer.step()
                bar.update((step + 1) / steps, f"error {error:.3f}")
        supernet.start_step()
        supernet.publish_gradients()
    after = _errors(supernet, source, students, held_out)
    return {name: TransferError(before[name], after[name]) for name in before}


def _students(supernet: Supernet, source: Arch, reporter: Reporter) -> list[_Student]:
    """Return the mixers to train: each once, and again for options that add parameters."""
    space = supernet.space
    shared = _names(source)
    students = []
    for mixer, options in space.mixers.items():
        if mixer in (SOFTMAX, ABSENT):
            continue
        changes = [{f"{mixer}.{name}": v} for name, values in options.items() for v in values[1:]]
        covered: set[str] = set()
        for change in [{}, *changes]:
            arch = _everywhere(space, **{"mixer": mixer, **change})
            own = _names(arch) - shared
            if own - covered:
                label = mixer + "".join(f"_{k.partition('.')[2]}{v}" for k, v in change.items())
                students.append(_Student(label, arch, tuple(sorted(own))))
                covered |= own
        if not covered:
            reporter.say(f"attention transfer: {mixer} has no parameters of its own, left as it is")
    return students


def _everywhere(space: SearchSpace, **choices: Any) -> Arch:
    """Return the largest network with these choices, each layer with keys and values of its own."""
    if False in space.kv_shared:
        choices["kv_shared"] = False
    return space.uniform(**choices)


def _names(arch: Arch) -> set[str]:
    """Return the names of a mixer's parameters, without those of the norms around it."""
    with torch.device("meta"):
        subnet = Subnet(arch)
    return {name for _, op in _mixers(subnet) for name, _ in op.named_parameters()}


def _mixers(subnet: Subnet) -> Iterator[tuple[int, nn.Module]]:
    """Yield (slot, mixer) of every slot that has one."""
    for slot, spec in subnet.arch.named_sub_blocks():
        if isinstance(spec, MixerSpec):
            yield slot, cast(nn.Module, subnet.blocks[block_name(slot, spec)].op)


def _own_params(supernet: Supernet, students: list[_Student]) -> list[str]:
    """Return the full names of all that is trained."""
    prefix = {slot: f"blocks.layer{slot}_mixer.op." for slot in range(supernet.space.num_layers)}
    names = {
        prefix[slot] + name
        for student in students
        for slot in prefix
        for name in student.own
        if prefix[slot] + name in supernet.params
    }
    return sorted(names)


def _step(supernet: Supernet, source: Arch, students: list[_Student], inputs: Tensor) -> float:
    """Add the gradients of all slots and mixers; return the mean relative error."""
    examples = _examples(supernet, source, inputs)
    supernet.start_step()
    errors = []
    for student in students:
        for slot, op in _mixers(supernet.view(student.arch, train=True)):
            for name, param in op.named_parameters():
                # Nothing is computed for what is shared.
                param.requires_grad_(name in student.own)
            error = _relative_error(op, *examples[slot])
            with warnings.catch_warnings():
                # The gradient slices are strided on purpose (see Supernet).
                warnings.filterwarnings("ignore", message="grad and param do not obey")
                error.backward()
            errors.append(error.detach())
    # Asked for one by one, a GPU would be waited for as often.
    return sum(torch.stack(errors).tolist()) / len(errors)


@torch.no_grad()
def _errors(
    supernet: Supernet, source: Arch, students: list[_Student], inputs: Tensor
) -> dict[str, float]:
    examples = _examples(supernet, source, inputs)
    errors = {
        f"layer{slot}.{student.label}": _relative_error(op, *examples[slot])
        for student in students
        for slot, op in _mixers(supernet.view(student.arch))
    }
    return {name: error.item() for name, error in errors.items()}


def _relative_error(op: nn.Module, x_BTD: Tensor, y_BTD: Tensor) -> Tensor:
    return F.mse_loss(op(x_BTD), y_BTD) / y_BTD.square().mean().clamp_min(1e-12)


@torch.no_grad()
def _examples(supernet: Supernet, source: Arch, inputs: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
    """Return what goes into and comes out of every softmax mixer (B, T, D), by slot."""
    network = supernet.view(source)
    found: dict[int, tuple[Tensor, Tensor]] = {}
    with _recorded(network, found):
        network(inputs)
    return found


@contextmanager
def _recorded(network: Subnet, found: dict[int, tuple[Tensor, Tensor]]) -> Iterator[None]:
    def recorder(slot: int) -> object:
        return lambda _, args, out: found.__setitem__(slot, (args[0], out))

    hooks = [op.register_forward_hook(recorder(slot)) for slot, op in _mixers(network)]  # type: ignore[arg-type]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
