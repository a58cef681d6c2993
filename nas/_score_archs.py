"""The archs that `nas score` ranks: drawn from a space, or read from files; and them in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from searchspace.arch import Arch
from searchspace.errors import UserError
from searchspace.files import read_json
from searchspace.space import SearchSpace

MAX_ROUNDS = 20
FORMS = "a JSON list of archs, a front.json, or a folder of exported subnetworks"


def drawn_archs(space: SearchSpace, num: int, seed: int) -> list[Arch]:
    """Return `num` different random archs, or all that were found where a space has fewer.

    Raises:
        UserError: when `num` is not positive.
    """
    if num < 1:
        raise UserError(f"--num {num} asks for no archs; give at least 1")
    rng = np.random.default_rng([seed, 8])
    found: dict[str, Arch] = {}
    for _ in range(MAX_ROUNDS):
        for genotype in space.sample_genotypes(rng, num):
            arch = space.decode(genotype)
            found.setdefault(arch.id, arch)
            if len(found) == num:
                return list(found.values())
    return list(found.values())


def read_archs(path: Path) -> list[Arch]:
    """Return the different archs of a file or folder, in its order.

    Args:
        path: a JSON file with a list of archs (as `Arch.to_dict` writes them, or records with such
            an ``"arch"``), a `front.json`, a run folder, or a folder of exported subnetworks.

    Raises:
        UserError: when there are none, or what is there is of another kind.
    """
    if path.is_dir():
        folder = path / "subnets" if (path / "subnets").is_dir() else path
        files = sorted(folder.glob("[!.]*/config.json"))
        values: Any = [read_json(file, "subnetwork config") for file in files]
    else:
        values = read_json(path, "file of archs")
    archs = {arch.id: arch for arch in (_arch(item, path) for item in _records(values))}
    if not archs:
        raise UserError(f"{path} holds no archs; give {FORMS}")
    return list(archs.values())


def _records(values: Any) -> Iterator[Any]:
    if isinstance(values, Mapping) and isinstance(values.get("groups"), Mapping):
        for members in values["groups"].values():
            yield from members
    elif isinstance(values, list):
        yield from values
    else:
        yield values


def _arch(record: Any, path: Path) -> Arch:
    if isinstance(record, Mapping) and isinstance(record.get("arch"), Mapping):
        record = record["arch"]
    try:
        return Arch.from_dict(record)
    except UserError as error:
        raise UserError(f"{path}: {error}; give {FORMS}") from None


def described(arch: Arch) -> str:
    """Return an arch in a few words: width, mixers from first to last layer, FFN widths."""
    layers = [layer for layer in arch.layers if not layer.skip]
    widths = sorted({layer.intermediate_size for layer in layers if layer.intermediate_size})
    parts = [f"d{arch.d_model}", _run_lengths([layer.mixer for layer in layers])]
    if widths:
        parts.append(f"ffn {widths[0]}" if len(widths) == 1 else f"ffn {widths[0]}-{widths[-1]}")
    return " ".join(part for part in parts if part)


def _run_lengths(names: Sequence[str]) -> str:
    counted = [(name, len(list(group))) for name, group in groupby(names)]
    return " ".join(name if num == 1 else f"{num}x{name}" for name, num in counted)
