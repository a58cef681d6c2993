"""The ``torchao`` format: weights that torchao quantises, as safetensors in torchao's own layout.

Eager torchao is slower than fp32 on most CPUs; the format is for storage, and for GPUs.
"""

from __future__ import annotations

import copy
import importlib.util
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nas.export.base import Handover
from nas.export.huggingface.exporter import LoadedSubnet
from nas.export.quiet import quiet
from searchspace.checkpoint import CONFIG, WEIGHTS, read_skeleton
from searchspace.errors import unknown
from searchspace.files import read_tensors, write_file, write_json
from searchspace.linear import Linear
from searchspace.subnet import Subnet
from searchspace.untrusted import read_small_json, require_tensors

FORMAT, VERSION = "hwnas-torchao", 1
SCHEMES = ("int8_weight", "int8_dynamic")
"""int8 weights, and beside them int8 activations. torchao's int4 layouts need a GPU."""
FEWEST_INPUTS = 32
"""Maps with fewer inputs save nothing, as every row has a scale."""


class TorchAoExporter:
    """The subnetwork with all its fp32 maps quantised, the head among them.

    A map for which the search chose a lower precision stays as it is: its weights are rounded
    already, and rounding them again would lose more and save nothing.

    Args:
        scheme: one of `SCHEMES`.

    Raises:
        UserError: when the scheme is unknown.
    """

    name = "torchao"
    summary = "safetensors quantised by torchao: small, but slow on CPUs"
    folder = "torchao"
    max_difference = math.inf

    def __init__(self, scheme: str = SCHEMES[0]) -> None:
        if scheme not in SCHEMES:
            raise unknown("torchao scheme", scheme, SCHEMES)
        self.scheme = scheme

    def missing(self) -> str:
        """Return how to get torchao, if it is not installed."""
        if importlib.util.find_spec("torchao"):
            return ""
        return "torchao is not installed; pip install 'hwnas[export]'"

    def refusal(self, handover: Handover) -> str:
        """Return that there is nothing to quantise, if so."""
        if any(_is_wanted(module, "") for module in handover.subnet.modules()):
            return ""
        return "all its maps have a low precision already, so there is nothing left to quantise"

    def stands_for(self, handover: Handover) -> Subnet:
        """Return a copy that torchao has quantised."""
        return _quantised(copy.deepcopy(handover.subnet), self.scheme)

    def write(self, handover: Handover, folder: Path) -> Mapping[str, Any]:
        """Write config and weights; see `Exporter.write`."""
        from safetensors.torch import save

        quantised = self.stands_for(handover)
        tensors, about = _flat(quantised)
        content = save({name: t.contiguous() for name, t in tensors.items()}, about)
        write_file(folder / WEIGHTS, lambda stream: stream.write(content))
        facts = {"scheme": self.scheme, "torchao_version": _version()}
        config = {"format": FORMAT, "version": VERSION, "arch_id": handover.arch.id, **facts}
        config |= {"arch": handover.arch.to_dict(), "rewrites": list(handover.subnet.rewrites)}
        write_json(folder / CONFIG, config)
        num_maps = sum(isinstance(module, Linear) for module in quantised.modules())
        num_wanted = sum(_is_wanted(module, "") for module in handover.subnet.modules())
        return {**facts, "quantised_maps": num_wanted, "maps": num_maps}

    def load(self, folder: Path) -> LoadedSubnet:
        """Return the network; see `Exporter.load`.

        What a tensor is follows from the arch and the scheme, never from the file.
        """
        subnet, stored = read_skeleton(folder, FORMAT)
        scheme = read_small_json(folder, CONFIG, "torchao config").get("scheme")
        if scheme not in SCHEMES:
            raise unknown("torchao scheme", scheme, SCHEMES)
        expected, about = _flat(_quantised(subnet, scheme))
        require_tensors(stored, expected, folder / WEIGHTS)
        tensors = {name: t.clone() for name, t in read_tensors(folder / WEIGHTS).items()}
        with quiet():
            from torchao.prototype.safetensors.safetensors_support import (
                unflatten_tensor_state_dict,
            )

            whole, _ = unflatten_tensor_state_dict(tensors, about)
        subnet.load_state_dict(whole, assign=True)
        return LoadedSubnet(subnet.eval().requires_grad_(False))


def _is_wanted(module: torch.nn.Module, _: str) -> bool:
    """Whether a map is quantised."""
    if not isinstance(module, Linear) or module.packed or module.precision != "fp32":
        return False
    return module.weight.shape[1] >= FEWEST_INPUTS


def _quantised(subnet: Subnet, scheme: str) -> Subnet:
    """Quantise the maps of a network in place and return it."""
    with quiet():
        from torchao.quantization import (
            Int8DynamicActivationInt8WeightConfig,
            Int8WeightOnlyConfig,
            quantize_,
        )

        configs = dict(
            zip(SCHEMES, (Int8WeightOnlyConfig, Int8DynamicActivationInt8WeightConfig), strict=True)
        )
        # Without the flag it would change settings of PyTorch's compiler for the whole process.
        quantize_(subnet, configs[scheme](set_inductor_config=False), _is_wanted)
    return subnet


def _flat(subnet: Subnet) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return plain tensors, and what torchao says of them."""
    with quiet():
        from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

        tensors, about = flatten_tensor_state_dict(dict(subnet.state_dict()))
    return tensors, about


def _version() -> str:
    with quiet():
        import torchao

    return str(torchao.__version__)
