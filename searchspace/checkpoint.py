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
from searchspace.rewrites import rewrite

if TYPE_CHECKING:
    from searchspace.subnet import Subnet

FORMAT = "hwnas-subnet"
VERSION = 1


def save_subnet(subnet: Subnet, folder: Path, facts: Mapping[str, Any] | None = None) -> None:
    """Write a packed subnetwork.

    Args:
        subnet: the network, packed.
        folder: made if need be.
        facts: further JSON-ready entries for `config.json`.

    Raises:
        UserError: when the folder cannot be written to.
    """
    tensors = {name: tensor.contiguous() for name, tensor in subnet.state_dict().items()}
    write_tensors(folder / "model.safetensors", tensors)
    config = {"format": FORMAT, "version": VERSION, "arch_id": subnet.arch.id}
    config |= {"arch": subnet.arch.to_dict(), "rewrites": list(subnet.rewrites)}
    write_json(folder / "config.json", {**config, **(facts or {})})


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
        subnet = Subnet(Arch.from_dict(config["arch"]))
        for name in config.get("rewrites", ()):
            rewrite(subnet, name)
        subnet.pack()
    _check(subnet, tensors, folder)
    # Copies, because what was read are views into the file: some kernels need aligned memory.
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    subnet.load_state_dict(copies, assign=True)
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
