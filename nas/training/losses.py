"""What training minimises: the loss on the data, on a teacher's soft targets and hidden states.

Targets are token ids (B, T), or classes (B,) with one row of logits per sequence. A target of
`IGNORED` counts nowhere.

Shapes: B batch, T tokens, V vocabulary or classes, D d_model, N scored positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from nas.tasks.base import IGNORED
from nas_kernels.cross_entropy import CHUNK_BYTES, linear_cross_entropy
from searchspace.errors import UserError
from searchspace.linear import Linear
from searchspace.subnet import Subnet


@dataclass(frozen=True)
class Scored:
    """Which positions of flattened targets are taken, and how much each counts.

    Args:
        rows: of those that are taken.
        weight_N: their shares in mean losses; None where all count alike. Positions that are not
            scored may be taken, with a share of 0, so that shapes are the same for every batch.
    """

    rows: Tensor | slice
    weight_N: Tensor | None = None

    @staticmethod
    def of(targets: Tensor) -> Scored:
        """Return the scored positions; on a GPU the host waits for it.

        Raises:
            UserError: when there is none.
        """
        return Scored(scored_rows(targets))


@dataclass(frozen=True)
class Prediction:
    """What a network says at the scored positions.

    Args:
        log_probs_NV: log-probabilities.
        hidden_ND: hidden states that the head reads; None unless asked for.
        weight_N: see `Scored`.
    """

    log_probs_NV: Tensor
    hidden_ND: Tensor | None = None
    weight_N: Tensor | None = None


@dataclass(frozen=True)
class SoftTargets:
    """What a teacher says at the scored positions, cut off from its graph.

    Args:
        probs_NV: probabilities.
        hidden_ND: final hidden states, D at least the student's width; None where not matched.
    """

    probs_NV: Tensor
    hidden_ND: Tensor | None = None


def predict(
    model: Subnet,
    inputs: Tensor,
    targets: Tensor,
    with_hidden: bool,
    scored: Scored | None = None,
) -> Prediction:
    """Run a network and keep what stands at scored positions.

    Args:
        model: gives logits (..., V) for targets (...).
        inputs: a batch.
        targets: its targets, (B, T) or (B,).
        with_hidden: keep the final hidden states too.
        scored: which targets count; looked up where it is None.

    Raises:
        UserError: when nothing is scored, or logits and targets do not fit.
    """
    kept: list[Tensor] = []
    hook = None
    if with_hidden:
        hook = model.ends.head.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    try:
        logits = model(inputs)
    finally:
        if hook is not None:
            hook.remove()
    check_fits(logits, targets)
    scored = scored or Scored.of(targets)
    hidden = kept[0].float().flatten(0, -2)[scored.rows] if with_hidden else None
    log_probs_NV = F.log_softmax(logits.float().flatten(0, -2)[scored.rows], dim=-1)
    return Prediction(log_probs_NV, hidden, scored.weight_N)


def num_scored(targets: Tensor) -> int:
    """Return how many targets are scored."""
    return int((targets != IGNORED).sum())


def scored_rows(targets: Tensor) -> Tensor | slice:
    """Return an index of the scored positions of flattened `targets`.

    Raises:
        UserError: when there is none.
    """
    scored = targets.flatten() != IGNORED
    if scored.all():
        # The usual case; a slice copies nothing.
        return slice(None)
    if not scored.any():
        raise UserError(f"a batch has no scored target: all of them are {IGNORED}")
    return scored.nonzero().squeeze(1)


def hard_loss(prediction: Prediction, targets: Tensor, scored: Scored | None = None) -> Tensor:
    """Return the mean cross entropy, in nats per scored target; `scored` as for `predict`."""
    rows = (scored or Scored.of(targets)).rows
    return F.nll_loss(prediction.log_probs_NV, targets.flatten()[rows], ignore_index=IGNORED)


def data_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross entropy of logits (..., V), in nats per scored target."""
    return F.cross_entropy(logits.float().flatten(0, -2), targets.flatten(), ignore_index=IGNORED)


def loss_in_chunks(
    model: Subnet, inputs: Tensor, targets: Tensor, scored: Scored | None = None
) -> Tensor | None:
    """Return the mean cross entropy from a part of the logits at a time; None where all are few.

    From `CHUNK_BYTES` of logits on, some of them at a time take less memory than all. On one CPU
    core 4,096 targets and a vocabulary of 50,257 took 0.6 GiB in place of 2.3, in the same time.
    Below that there would be one part with all logits.

    Args:
        model: gives logits (..., V) for targets (...), by a map of its last hidden states.
        inputs: a batch.
        targets: its targets, (B, T) or (B,).
        scored: which of them count; looked up where it is None.

    Raises:
        UserError: when nothing is scored, or hidden states and targets do not fit.
    """
    head = model.ends.head
    if targets.numel() * head.weight.shape[0] * torch.float32.itemsize <= CHUNK_BYTES:
        return None
    hidden = model.ends.hidden(model.features(inputs), inputs)
    check_fits(hidden, targets)
    rows = (scored or Scored.of(targets)).rows
    bias_V = head.bias if isinstance(head, Linear) else None
    return linear_cross_entropy(
        hidden.flatten(0, -2)[rows], head.weight, targets.flatten()[rows], bias_V
    )


def check_fits(scores: Tensor, targets: Tensor) -> None:
    """Raise a `UserError` unless there is a row of scores, of whatever kind, for each target."""
    if scores.shape[:-1] != targets.shape:
        raise UserError(
            f"the network gives logits of shape {tuple(scores.shape)} for targets of shape "
            f"{tuple(targets.shape)}; the task and the space's family do not fit"
        )


def training_loss(
    hard: Tensor,
    prediction: Prediction,
    teacher: SoftTargets | None,
    distillation: float,
    hidden_distillation: float,
) -> Tensor:
    """Return what is minimised for one network.

    Args:
        hard: its loss on the data.
        prediction: what it says.
        teacher: what its teacher says; None without one.
        distillation: share of the soft targets' loss; the rest is the data's.
        hidden_distillation: weight of the match of hidden states, where the teacher gives them.
    """
    if teacher is None:
        return hard
    loss = (1 - distillation) * hard + distillation * soft_loss(prediction, teacher)
    if teacher.hidden_ND is not None:
        loss = loss + hidden_distillation * hidden_loss(prediction, teacher)
    return loss


def soft_loss(student: Prediction, teacher: SoftTargets) -> Tensor:
    """Return the mean cross entropy against a teacher's probabilities.

    Source: Hinton, Vinyals and Dean 2015, "Distilling the Knowledge in a Neural Network",
    section 2, at temperature 1.
    """
    loss_N = -(teacher.probs_NV * student.log_probs_NV).sum(dim=-1)
    return loss_N.mean() if student.weight_N is None else (loss_N * student.weight_N).sum()


def hidden_loss(student: Prediction, teacher: SoftTargets) -> Tensor:
    """Return the mean squared difference of normalised hidden states.

    The student of width d is compared with the first d features of the teacher, each brought to
    unit root mean square, so that a loss of 2 means unrelated.

    Source: Wang et al. 2022, "LightHuBERT", two-stage distillation (the last layer's latent
    representation is matched by subnets of every width).
    """
    assert student.hidden_ND is not None and teacher.hidden_ND is not None
    width = student.hidden_ND.shape[-1]
    target_ND = F.rms_norm(teacher.hidden_ND[:, :width], (width,))
    hidden_ND = F.rms_norm(student.hidden_ND, (width,))
    if student.weight_N is None:
        return F.mse_loss(hidden_ND, target_ND)
    return ((hidden_ND - target_ND).square().mean(dim=-1) * student.weight_N).sum()


@torch.no_grad()
def soft_targets(prediction: Prediction) -> SoftTargets:
    """Return what a network says as a teacher's word."""
    hidden = prediction.hidden_ND
    return SoftTargets(prediction.log_probs_NV.exp(), None if hidden is None else hidden.detach())
