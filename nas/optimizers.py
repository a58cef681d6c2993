"""The supernet's two optimizers, saved and restored by parameter name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from nas.grouped_muon import GroupedMuon


class Trained(Protocol):
    """What is optimised: a supernet, or one network."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters by name."""


class SupernetOptimizer:
    """Muon for the matrices of the layers' linear maps, AdamW for everything else.

    Parameters whose gradient is None (no arch of the step used them) are left alone. On a GPU,
    AdamW is one launch for all parameters; Muon takes matrices of one shape together everywhere.

    Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks";
    Loshchilov and Hutter 2017 (AdamW).

    Args:
        supernet: whose parameters are optimised, the maximal ones; or a single network.
        matrix_lr: peak learning rate of Muon.
        other_lr: peak learning rate of AdamW.
    """

    def __init__(self, supernet: Trained, matrix_lr: float, other_lr: float) -> None:
        self._names = {param: name for name, param in supernet.named_parameters()}
        matrices = [p for p, name in self._names.items() if is_matrix(name, p)]
        others = [p for p, name in self._names.items() if not is_matrix(name, p)]
        fused = True if others[0].is_cuda else None
        self._optimizers: dict[str, torch.optim.Optimizer] = {
            "adamw": torch.optim.AdamW(
                others, lr=other_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=fused
            ),
        }
        if matrices:  # a space of convolutions or pooling without FFNs has none
            self._optimizers["muon"] = GroupedMuon(matrices, lr=matrix_lr, momentum=0.95)
        self._peaks = {"muon": matrix_lr, "adamw": other_lr}

    def step(self, scale: float) -> None:
        """Take one step with the peak learning rates times `scale`."""
        for name, optimizer in self._optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = self._peaks[name] * scale
            optimizer.step()

    def state_dict(self) -> dict[str, Tensor]:
        """Return all state as tensors named `<optimizer>/<parameter>/<quantity>`."""
        state: dict[str, Tensor] = {}
        for name, optimizer in self._optimizers.items():
            for param, param_name in self._names.items():
                for key, value in optimizer.state.get(param, {}).items():
                    state[f"{name}/{param_name}/{key}"] = torch.as_tensor(value)
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned, on whatever device."""
        params = {name: param for param, name in self._names.items()}
        for key, value in state.items():
            optimizer, param, quantity = key.split("/")
            device = params[param].device
            self._optimizers[optimizer].state[params[param]][quantity] = value.to(device, copy=True)


def is_matrix(name: str, param: nn.Parameter) -> bool:
    """Whether Muon is meant for the parameter: the matrix of a linear map inside a layer.

    Other parameters with two axes, such as the taps of convolutions, map no space to another, so
    making their update orthogonal has no meaning.
    """
    return param.ndim == 2 and name.startswith("blocks.") and name.endswith(".weight")
