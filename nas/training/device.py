"""Where a training runs."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from searchspace.errors import UserError

CPU = torch.device("cpu")


def training_device(name: str) -> torch.device:
    """Return the device that `train.device` names; `auto` is a GPU where there is one.

    Raises:
        UserError: when it names a GPU and there is none.
    """
    if name == "cpu":
        return CPU
    if torch.cuda.is_available() and torch.version.cuda:
        # With its index, as tensors have it.
        return torch.device("cuda", _own_gpu())
    if name == "auto":
        return CPU
    raise UserError(
        f"train.device={name!r} needs an NVIDIA GPU, but PyTorch {torch.__version__} sees none; "
        "check what nvidia-smi and CUDA_VISIBLE_DEVICES say, or choose train.device=cpu"
    )


def _own_gpu() -> int:
    """Return which of the visible GPUs is this process's, and make it the current one.

    Launchers of several processes on a machine (torchrun, Ray Train) number them in `LOCAL_RANK`.
    """
    rank = os.environ.get("LOCAL_RANK", "")
    if rank.isdigit() and dist.is_available() and dist.is_initialized():
        torch.cuda.set_device(int(rank) % torch.cuda.device_count())
    return torch.cuda.current_device()
