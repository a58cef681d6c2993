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
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nas.arch_sampling import StepArch
from nas.training.losses import SoftTargets, predict, soft_targets
from nas.training.team import Share, spread
from searchspace.arch import Arch
from searchspace.supernet import Supernet

BUCKET_BYTES = 32 << 20
"""Large enough that the latency of a message does not count, small enough to overlap."""


class Ranks:
    """The processes of the default process group, seen from one of them."""

    def __init__(self) -> None:
        self._rank, self._size = dist.get_rank(), dist.get_world_size()

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
        length = torch.tensor([len(content)])
        dist.broadcast(length, 0)
        message = torch.zeros(int(length.item()), dtype=torch.uint8)
        if self._rank == 0:
            message = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        dist.broadcast(message, 0)
        agreed: dict[str, Any] = json.loads(bytes(message.tolist()))
        return agreed

    def take_weights(self, supernet: Supernet) -> None:
        """Give every process the weights and running statistics of rank 0."""
        for tensor in supernet.state_dict().values():
            dist.broadcast(tensor, 0)

    def sum_values(self, values: Sequence[float]) -> list[float]:
        """Return the sums over all processes."""
        total = torch.tensor(list(values), dtype=torch.float64)
        dist.all_reduce(total)
        return [float(value) for value in total]

    def sum_gradients(self, supernet: Supernet) -> None:
        """Replace each parameter's gradient by the sum over all processes; None counts as zero.

        A parameter that no process used keeps None, so that the optimizer leaves it alone.
        """
        params = [param for _, param in supernet.named_parameters()]
        used = torch.tensor([param.grad is not None for param in params], dtype=torch.uint8)
        dist.all_reduce(used, op=dist.ReduceOp.MAX)
        wanted = [param for param, flag in zip(params, used.tolist(), strict=True) if flag]
        sent = []
        for bucket in buckets(wanted):
            flat = torch.cat([_gradient(param).flatten() for param in bucket])
            sent.append((bucket, flat, dist.all_reduce(flat, async_op=True)))
        for bucket, flat, work in sent:
            work.wait()
            pieces = flat.split([param.numel() for param in bucket])
            for param, piece in zip(bucket, pieces, strict=True):
                param.grad = piece.view(param.shape)


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
def teach_from(supernet: Supernet, arch: Arch, inputs: Tensor, targets: Tensor) -> SoftTargets:
    """Return what an arch says that another process trains in this step.

    It runs as in training, yet leaves the running statistics of norms as they were.
    """
    before = {name: buffer.clone() for name, buffer in supernet.buffers.items()}
    prediction = predict(supernet.view(arch, train=True), inputs, targets, with_hidden=False)
    for name, buffer in before.items():
        supernet.buffers[name].copy_(buffer)
    return soft_targets(prediction)
