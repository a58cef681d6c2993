"""One training by several processes that talk through `torch.distributed`.

Gradients are summed by hand. `DistributedDataParallel` hooks the parameters of the module that it
wraps; here a step runs other views of the supernet in every process, whose parameters are leaves
of their own, so its hooks would never fire, and what a process does not use has no gradient at all.
Summed in buckets, None as zero, the result is that of one process which trains the same archs on
the same batch, but for the order of floating-point sums.

In-place distillation needs the largest network's logits in every process. Each runs that forward
pass itself: to wait for them from rank 0 takes as long, and then (batch x tokens x vocabulary)
numbers would have to be sent in every step.

Two things depend on the spread: norms that keep statistics of training batches (`prepbn`,
`unified_norm`) see the batches of their own process only, and rank 0's statistics are kept (they
are taken anew before an evaluation anyway); `unified_norm` smooths over these batches, and `prepbn`
normalises by the rows of its process where the batch is split.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nas.arch_sampling import StepArch
from nas.training.batch import Batch
from nas.training.device import CPU
from nas.training.losses import SoftTargets, predict, soft_targets
from nas.training.team import Share, spread
from searchspace.arch import Arch
from searchspace.supernet import Supernet

NCCL = "nccl"
BUCKET_BYTES = 32 << 20
"""Large enough that the latency of a message does not count, small enough to overlap."""


@dataclass(frozen=True)
class Channel:
    """How tensors travel.

    Args:
        group: of all processes; None for the default one.
        device: where it takes them from.
    """

    group: Any
    device: torch.device


class Ranks:
    """The processes of the default process group, seen from one of them.

    Tensors of a GPU travel by NCCL, in a group of its own where the default one has another
    backend; it needs a GPU for every process. Without NCCL they go through the host's memory.
    """

    def __init__(self) -> None:
        self._rank, self._size = dist.get_rank(), dist.get_world_size()
        self._channels: dict[torch.device, Channel] = {}

    @property
    def rank(self) -> int:
        """Which of them this is."""
        return self._rank

    def share(self, archs: Sequence[StepArch], num_rows: int) -> Share:
        """Return what this process trains of a step with a batch of `num_rows`."""
        return spread(archs, num_rows, self._size)[self._rank]

    def agree(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return rank 0's values; they are sent as JSON, so nothing is unpickled."""
        content = json.dumps(dict(values)).encode()
        device = _device_of_messages()
        length = torch.tensor([len(content)], device=device)
        dist.broadcast(length, 0)
        message = torch.zeros(int(length.item()), dtype=torch.uint8, device=device)
        if self._rank == 0:
            message = torch.frombuffer(bytearray(content), dtype=torch.uint8).to(device)
        dist.broadcast(message, 0)
        agreed: dict[str, Any] = json.loads(bytes(message.tolist()))
        return agreed

    def take_weights(self, supernet: Supernet) -> None:
        """Give every process the weights and running statistics of rank 0."""
        channel = self._channel(supernet.device)
        for tensor in supernet.state_dict().values():
            sent = tensor.to(channel.device)
            dist.broadcast(sent, 0, group=channel.group)
            if sent is not tensor:
                tensor.copy_(sent)

    def sum_values(self, values: Sequence[float]) -> list[float]:
        """Return the sums over all processes."""
        total = torch.tensor(list(values), dtype=torch.float64, device=_device_of_messages())
        dist.all_reduce(total)
        return [float(value) for value in total.tolist()]

    def sum_gradients(self, supernet: Supernet) -> None:
        """Replace each parameter's gradient by the sum over all processes; None counts as zero.

        A parameter that no process used keeps None, so that the optimizer leaves it alone.
        """
        channel = self._channel(supernet.device)
        params = [param for _, param in supernet.named_parameters()]
        flags = [param.grad is not None for param in params]
        used = torch.tensor(flags, dtype=torch.uint8, device=_device_of_messages())
        dist.all_reduce(used, op=dist.ReduceOp.MAX)
        wanted = [param for param, flag in zip(params, used.tolist(), strict=True) if flag]
        sent = []
        for bucket in buckets(wanted):
            flat = torch.cat([_gradient(param).flatten() for param in bucket]).to(channel.device)
            sent.append((bucket, flat, dist.all_reduce(flat, group=channel.group, async_op=True)))
        for bucket, flat, work in sent:
            work.wait()
            summed = flat.to(supernet.device)
            pieces = summed.split([param.numel() for param in bucket])
            for param, piece in zip(bucket, pieces, strict=True):
                param.grad = piece.view(param.shape)

    def _channel(self, device: torch.device) -> Channel:
        """Return how tensors of a device travel; every process asks for it at the same point."""
        if device not in self._channels:
            own_nccl = device.type == "cuda" and dist.get_backend() != NCCL
            if own_nccl and not dist.is_nccl_available():
                self._channels[device] = Channel(None, CPU)
            else:
                group = dist.new_group(backend=NCCL) if own_nccl else None
                self._channels[device] = Channel(group, device)
        return self._channels[device]


def _device_of_messages() -> torch.device:
    """Return from where the default group takes small messages."""
    if dist.get_backend() != NCCL:
        return CPU
    return torch.device("cuda", torch.cuda.current_device())


def _gradient(param: nn.Parameter) -> Tensor:
    return torch.zeros_like(param) if param.grad is None else param.grad


def buckets(params: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Yield parameters in runs of one type that are sent at once, the same in every process."""
    bucket: list[nn.Parameter] = []
    size = 0
    for param in params:
        num_bytes = param.numel() * param.element_size()
        if bucket and (size + num_bytes > BUCKET_BYTES or param.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(param)
        size += num_bytes
    if bucket:
        yield bucket


@torch.no_grad()
def teach_from(supernet: Supernet, arch: Arch, batch: Batch) -> SoftTargets:
    """Return what an arch says that another process trains in this step.

    It runs as in training, yet leaves the running statistics of norms as they were.
    """
    before = {name: buffer.clone() for name, buffer in supernet.buffers.items()}
    model = supernet.view(arch, train=True)
    prediction = predict(model, batch.inputs, batch.targets, False, batch.scored)
    for name, buffer in before.items():
        supernet.buffers[name].copy_(buffer)
    return soft_targets(prediction)
