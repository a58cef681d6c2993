"""How the archs of a step are run: the choices of `train.compile`."""

from __future__ import annotations

import torch

from nas.config import TrainConfig
from nas.training.compiled_passes import CompiledPasses
from nas.training.graph_passes import GraphPasses
from nas.training.passes import Autocast, Passes, PlainPasses
from searchspace.errors import UserError
from searchspace.supernet import Supernet

OFF, GRAPHS, COMPILE = "off", "graphs", "compile"


def compile_mode(config: TrainConfig, device: torch.device) -> str:
    """Return how archs that recur are run: `OFF`, `GRAPHS` or `COMPILE`.

    Raises:
        UserError: when CUDA graphs are asked for elsewhere than on a GPU.
    """
    if config.compile == "auto":
        return GRAPHS if device.type == "cuda" else OFF
    if config.compile == GRAPHS and device.type != "cuda":
        raise UserError(
            f"train.compile={GRAPHS!r} needs an NVIDIA GPU, but the training runs on the "
            f"{device.type}; choose train.compile={OFF} or train.compile={COMPILE}"
        )
    return config.compile


def new_passes(supernet: Supernet, config: TrainConfig, autocast: Autocast) -> Passes:
    """Return what runs the networks of a step, on the supernet's device.

    Raises:
        UserError: when the device does not have what the config asks for.
    """
    mode = compile_mode(config, supernet.device)
    if mode == COMPILE:
        return CompiledPasses(supernet, config, autocast)
    plain = PlainPasses(supernet, config, autocast)
    return GraphPasses(plain, supernet) if mode == GRAPHS else plain
