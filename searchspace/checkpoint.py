"""A subnetwork as a folder: `config.json` and `model.safetensors`, loadable without a supernet."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from searchspace.arch import Arch
from searchspace.errors import UserError
from searchspace.files import read_json, read_tensors, write_json, write_tensors
from searchspace.linear import Linear

if TYPE_CHECKING:
    from searchspace.subnet import Subnet

FORMAT = "hwnas-subnet"
VERSION = 1


def save_subnet(subnet: Subnet, folder: Path, facts: Mapping[str, Any] | None = None) -> None:
    """Write a packed subnetwork.

    Args:
        subnet: the network; int8 layers must be packed.
        folder: made if need be.
        facts: further JSON-ready entries for `config.json`.

    Raises:
        UserError: when the folder cannot be written to.
    """
    tensors = {name: tensor.contiguous() for name, tensor in subnet.state_dict().items()}
    write_tensors(folder / "model.safetensors", tensors)
    config = {"format": FORMAT, "version": VERSION, "arch_id": subnet.arch.id}
    write_json(folder / "config.json", {**config, "arch": subnet.arch.to_dict(), **(facts or {})})


def load_subnet(folder: Path) -> Subnet:
    """Read what `save_subnet` wrote, ready for inference.

    Raises:
        UserError: when a file is absent, truncated, or of another kind or arch.
    """
    config = read_json(folder / "config.json", "subnetwork config")
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise UserError(f"{folder} is not an exported subnetwork: its config.json has another form")
    if config.get("version") != VERSION:
        raise UserError(
            f"{folder} has format version {config.get('version')}, this release reads {VERSION}; "
            "export it again"
        )
    tensors = read_tensors(folder / "model.safetensors")
    from searchspace.subnet import Subnet

    with torch.device("meta"):
        subnet = Subnet(Arch.from_dict(config["arch"])).pack_empty()
    _check(subnet, tensors, folder)
    subnet.load_state_dict(tensors, assign=True)
    return subnet.eval().requires_grad_(False)


def _check(subnet: Subnet, tensors: Mapping[str, Tensor], folder: Path) -> None:
    expected = subnet.state_dict()
    for name in sorted(set(expected) ^ set(tensors)):
        where = "lacks" if name in expected else "has a foreign"
        raise UserError(f"{folder}/model.safetensors {where} tensor {name!r}; export it again")
    for name, tensor in expected.items():
        found = tensors[name]
        if found.shape != tensor.shape or found.dtype != tensor.dtype:
            raise UserError(
                f"{folder}/model.safetensors: {name} is {found.dtype} {tuple(found.shape)}, the "
                f"config says {tensor.dtype} {tuple(tensor.shape)}; export it again"
            )


def pack_empty(module: torch.nn.Module) -> None:
    """Give every int8 layer of a meta module its packed form, without values."""
    for child in module.modules():
        if isinstance(child, Linear) and child.precision == "int8" and not child.packed:
            shape, device = child.weight.shape, child.weight.device
            del child.weight
            child.register_buffer("weight", torch.empty(shape, dtype=torch.int8, device=device))
            child.register_buffer("weight_scale", torch.empty(shape[0], device=device))
