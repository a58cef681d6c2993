"""Peak memory of a forward pass, exactly and without noise."""

from __future__ import annotations

import contextlib

import torch

from hw_profiles.backends.eager import runner
from hw_profiles.memory.blocks import arch_peak_bytes
from hw_profiles.memory.dry_run import DryRun
from hw_profiles.memory.tensors import TensorMemory, kept_tensors
from hw_profiles.workload import Workload
from searchspace.arch import Arch
from searchspace.ends import example_inputs
from searchspace.subnet import Subnet

__all__ = ["MIB", "TensorMemory", "kept_tensors", "measured_peak_mib", "peak_mib"]

MIB = 2**20


def peak_mib(network: Subnet | Arch, workload: Workload) -> float:
    """Return the most memory that the tensors of one pass take at once, in MiB, without running it.

    Counts weights, what low-bit kernels keep beside them, masks and position tables that the pass
    reads, state, input, and every activation from the operator that makes it to the moment it is
    freed. A view counts nothing of its own, but keeps the whole storage it looks at alive. The
    figure is `measured_peak_mib`'s, to the byte. Scratch space inside single operators is not seen
    (matrix products and fused attention need little), nor is the interpreter itself.

    Args:
        network: in evaluation mode; or an arch, for its packed network, which is then put together
            from sub-blocks that are looked at once per process.
        workload: its batch and tokens.

    Raises:
        UserError: when the shape of some operator's result depends on values.
    """
    if isinstance(network, Arch):
        return arch_peak_bytes(network, workload) / MIB
    return network_peak_bytes(network, workload) / MIB


def measured_peak_mib(network: Subnet, workload: Workload) -> float:
    """Return what `peak_mib` predicts, by running a network in evaluation mode.

    Resident set size would be the obvious alternative, but allocators keep freed memory, so it only
    says what the process once needed.
    """
    return network_peak_bytes(network, workload, run=True) / MIB


def network_peak_bytes(
    network: Subnet, workload: Workload, run: bool = False, hollow: bool = False
) -> int:
    """Return the peak of a pass over a whole network, in bytes.

    Args:
        network: in evaluation mode.
        workload: its batch and tokens.
        run: whether to compute; otherwise shapes alone are followed.
        hollow: whether the weights have no values either.
    """
    inputs = example_inputs(network.arch.ends, workload.batch, workload.new_tokens)
    stored = [*network.parameters(), *network.buffers()]
    dry = DryRun([inputs, *(stored if hollow else [])])
    # In inference mode PyTorch hides what compound operators are made of.
    with torch.inference_mode(False), torch.no_grad(), contextlib.nullcontext() if run else dry:
        # What is kept for later (position tables, masks, layouts) is made here, once.
        runner(network, inputs, workload)()
        with TensorMemory() as memory:
            for tensor in (*stored, *kept_tensors(network), inputs):
                memory.track(tensor)
            call = runner(network, inputs, workload)
            if workload.phase == "decode":
                # States are replaced by what a step leaves: views of slightly more, for windows.
                call()
                memory.restart_peak()
            call()
    return memory.peak_bytes


def hollow_network(arch: Arch) -> Subnet:
    """Return an arch's packed network whose weights were never written."""
    with torch.device("meta"):
        network = Subnet(arch).pack()
    return network.to_empty(device="cpu").eval().requires_grad_(False)
