"""A checkpoint's tensors: safetensors only, checked by their headers before anything is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from searchspace.errors import UserError
from searchspace.untrusted import StoredTensor, file_inside, read_small_json, stored_tensors

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
FLOATS = ("float32", "float16", "bfloat16", "float64")
MAX_SHARDS = 4096


@dataclass(frozen=True)
class Weights:
    """Where the tensors of a folder lie.

    Args:
        folder: the checkpoint.
        files: name of the file of every tensor.
        stored: what the files say of them.
    """

    folder: Path
    files: Mapping[str, str]
    stored: Mapping[str, StoredTensor]

    @staticmethod
    def of(folder: Path) -> Weights:
        """Read the headers of a folder's weights.

        Raises:
            UserError: when there are none, only pickles, or they contradict themselves.
        """
        if (folder / INDEX).exists() and not (folder / SINGLE).exists():
            return _sharded(folder)
        if not (folder / SINGLE).exists() and any((folder / name).exists() for name in PICKLES):
            raise UserError(
                f"{folder} holds its weights as a pickle, which can run any program when it is "
                "read; save the model again as safetensors (save_pretrained does)"
            )
        stored = stored_tensors(folder, SINGLE)
        return Weights(folder, dict.fromkeys(stored, SINGLE), stored)

    def check(self, expected: Mapping[str, tuple[int, ...]], meaningless: tuple[str, ...]) -> None:
        """Refuse weights other than the expected ones.

        Args:
            expected: the shape of every tensor that is needed.
            meaningless: further names may end like this.

        Raises:
            UserError: naming a tensor that is absent, foreign, or of another shape or type.
        """
        for name, shape in expected.items():
            if name not in self.stored:
                raise UserError(f"{self.folder} lacks tensor {name!r}, which its config.json needs")
            found = self.stored[name]
            if found.shape != shape:
                raise UserError(
                    f"{self.folder}: {name} has shape {found.shape}, its config.json says {shape}"
                )
            if found.dtype not in FLOATS:
                raise UserError(
                    f"{self.folder}: {name} holds {found.dtype}; plain floating-point weights are "
                    "needed, quantized ones cannot be trained on"
                )
        for name in self.stored:
            if name not in expected and not name.endswith(meaningless or ("\0",)):
                raise UserError(
                    f"{self.folder} holds tensor {name!r}, which a network of its config.json does "
                    "not have; only plain checkpoints can be brought in"
                )

    def read(self, name: str) -> Tensor:
        """Return a tensor in fp32.

        Raises:
            UserError: when the file changed or breaks off.
        """
        from safetensors import SafetensorError, safe_open

        path = file_inside(self.folder, self.files[name], "weights file")
        try:
            with safe_open(path, framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} cannot be read ({error}); copy it again") from None
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{path}: {name} holds values that are not finite")
        return tensor.to(torch.float32)


def _sharded(folder: Path) -> Weights:
    """Read the headers of all shards that an index names."""
    index = read_small_json(folder, INDEX, "index of weights files")
    files = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise UserError(f"{folder / INDEX} has no weight_map from tensors to files")
    names = sorted(set(files.values()))
    if len(names) > MAX_SHARDS:
        raise UserError(f"{folder / INDEX} names {len(names)} files; at most {MAX_SHARDS} are read")
    shards = {name: stored_tensors(folder, name) for name in names}
    found: dict[str, StoredTensor] = {}
    for tensor, name in files.items():
        if tensor not in shards[name]:
            raise UserError(f"{folder / name} lacks tensor {tensor!r}, which {INDEX} says it holds")
        found[tensor] = shards[name][tensor]
    for name, shard in shards.items():
        for tensor in shard:
            if files.get(tensor) != name:
                raise UserError(f"{folder / name} holds {tensor!r}, which {INDEX} does not say")
    return Weights(folder, files, found)
