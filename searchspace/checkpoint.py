"""A subnetwork as a folder: `config.json` and `model.safetensors`, loadable without a supernet."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from searchspace.arch import Arch
from searchspace.errors import UserError
from searchspace.files import read_tensors, write_json, write_tensors
from searchspace.rewrites import rewrite
from searchspace.untrusted import (
    StoredTensor,
    read_small_json,
    require_tensors,
    stored_tensors,
)

if TYPE_CHECKING:
    from searchspace.subnet import Subnet

FORMAT = "hwnas-subnet"
VERSION = 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"
LARGEST = 1 << 24
"""Largest number in an arch."""
COUNTS = ("num_heads", "num_kv_heads", "num_layers", "num_inner", "num_rates")
MOST_MODULES = 4096
"""Largest number of heads or layers of a file with fewer tensors."""


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
    write_tensors(folder / WEIGHTS, tensors)
    config = {"format": FORMAT, "version": VERSION, "arch_id": subnet.arch.id}
    config |= {"arch": subnet.arch.to_dict(), "rewrites": list(subnet.rewrites)}
    write_json(folder / CONFIG, {**config, **(facts or {})})


def load_subnet(folder: Path) -> Subnet:
    """Read what `save_subnet` wrote, ready for inference.

    Whatever the files claim is checked before anything of that size is allocated.

    Raises:
        UserError: when a file is absent, truncated, hostile, or of another kind or arch.
    """
    subnet, found = read_skeleton(folder)
    require_tensors(found, subnet.state_dict(), folder / WEIGHTS)
    # Copies, because what was read are views into the file: some kernels need aligned memory.
    copies = {name: tensor.clone() for name, tensor in read_tensors(folder / WEIGHTS).items()}
    subnet.load_state_dict(copies, assign=True)
    return subnet.eval().requires_grad_(False)


def read_skeleton(folder: Path, form: str = FORMAT) -> tuple[Subnet, dict[str, StoredTensor]]:
    """Return the packed network that a folder describes, on the meta device, and what is stored.

    Args:
        folder: holds a config and a weights file.
        form: what the config must name as its format.

    Raises:
        UserError: when a file is absent, hostile, or of another kind.
    """
    config = read_small_json(folder, CONFIG, "subnetwork config")
    if not isinstance(config, dict) or config.get("format") != form:
        raise UserError(f"{folder} is not an exported subnetwork: its config.json has another form")
    if config.get("version") != VERSION:
        raise UserError(
            f"{folder} has format version {config.get('version')}, this release reads {VERSION}; "
            "export it again"
        )
    found = stored_tensors(folder, WEIGHTS)
    _require_plausible(config.get("arch"), len(found), folder / CONFIG)
    return _skeleton(config, folder), found


def _skeleton(config: Mapping[str, Any], folder: Path) -> Subnet:
    """Build the packed network on the meta device."""
    from searchspace.subnet import Subnet

    rewrites = config.get("rewrites", [])
    if not isinstance(rewrites, list) or not all(isinstance(name, str) for name in rewrites):
        raise UserError(f"{folder / CONFIG}: rewrites={rewrites!r:.40} is no list of names")
    try:
        arch = Arch.from_dict(config["arch"])
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{folder / CONFIG} describes no network: {error}") from None
    with torch.device("meta"):
        subnet = Subnet(arch)
        for name in rewrites:
            rewrite(subnet, name)
        return subnet.pack()


def _require_plausible(arch: object, num_tensors: int, where: Path) -> None:
    """Refuse numbers with which building a network alone would take for ever.

    Sizes of matrices are compared with the file's later; here, what modules are counted by.

    Raises:
        UserError: naming the number.
    """
    counted = max(num_tensors, MOST_MODULES)
    layers = arch.get("layers") if isinstance(arch, dict) else None
    if not isinstance(layers, list) or len(layers) > counted:
        raise UserError(f"{where} has no list of at most {counted} layers; export it again")
    waiting: list[tuple[str, object]] = [("arch", arch)]
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, dict):
            waiting += value.items()
        elif isinstance(value, list):
            waiting += ((name, item) for item in value)
        elif isinstance(value, int):
            most = counted if name in COUNTS else LARGEST
            if not -1 <= value <= most:
                raise UserError(f"{where}: {name}={value} is not between -1 and {most}")
