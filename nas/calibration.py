"""Networks of a supernet with statistics of their own, where their norms need any.

The running statistics that a supernet shares are a mixture over all its networks and fit none of
them; a network gets its own from a few training batches before it is judged or handed over.
"""

from __future__ import annotations

from nas.tasks.base import Task
from searchspace.arch import Arch
from searchspace.norms import NORMS
from searchspace.norms.base import BatchStatisticNorm
from searchspace.norms.calibration import recalibrated
from searchspace.specs import ABSENT
from searchspace.subnet import Subnet
from searchspace.supernet import Supernet

CALIBRATION_BATCHES = 4
CALIBRATION_BATCH_SIZE = 8
CALIBRATION_SEED = 20_011


def needs_calibration(arch: Arch) -> bool:
    """Whether an arch has norms with running statistics."""
    names = {spec.norm for _, spec in arch.named_sub_blocks()}
    names |= {arch.family.final_norm, arch.family.embedding_norm}
    return any(issubclass(NORMS[name], BatchStatisticNorm) for name in names - {ABSENT})


def calibrated_view(supernet: Supernet, arch: Arch, task: Task) -> Subnet:
    """Return a network on the supernet's weights, ready to be judged.

    Args:
        supernet: the trained weights; not changed.
        arch: which network.
        task: gives the training batches that statistics are taken from.
    """
    view = supernet.view(arch)
    if needs_calibration(arch):
        for module in view.modules():
            for name, buffer in list(module.named_buffers(recurse=False)):
                module._buffers[name] = buffer.clone()
        calibrate(view, task)
    return view


def calibrated_extract(supernet: Supernet, arch: Arch, task: Task) -> Subnet:
    """Return a network with its own copy of the weights, ready to be judged or packed."""
    subnet = supernet.extract(arch)
    calibrate(subnet, task)
    return subnet


def calibrate(subnet: Subnet, task: Task) -> None:
    """Give a network that owns its buffers exact running statistics, if its norms have any."""
    if not needs_calibration(subnet.arch):
        return
    device = next(subnet.parameters()).device
    with recalibrated(subnet):
        for step in range(CALIBRATION_BATCHES):
            inputs, _ = task.train_batch(step, CALIBRATION_BATCH_SIZE, CALIBRATION_SEED)
            subnet(inputs.to(device))
