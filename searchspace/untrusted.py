"""Reading files that come from anywhere: what they claim is checked before anything is allocated.

Weights are safetensors only. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from searchspace.errors import UserError
from searchspace.files import read_json

if TYPE_CHECKING:
    from torch import Tensor

MAX_JSON_BYTES = 64 << 20
MAX_HEADER_BYTES = 100 << 20
PICKLE_STARTS = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")
"""Of pickles, and of the zip archives that PyTorch puts them into."""


@dataclass(frozen=True)
class StoredTensor:
    """What a file says of one tensor.

    Args:
        dtype: in PyTorch's terms, such as ``"float32"``.
        shape: its shape.
    """

    dtype: str
    shape: tuple[int, ...]


DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64",
    "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn",
}  # fmt: skip


def file_inside(folder: Path, name: str, what: str) -> Path:
    """Return the path of an ordinary file of a folder.

    Args:
        folder: given by the user.
        name: relative to it, perhaps read from a file.
        what: it is called so in messages.

    Raises:
        UserError: when it is absent, lies elsewhere, leads elsewhere by a link, or is no file.
    """
    path = folder / name
    try:
        found, root = path.resolve(strict=True), folder.resolve(strict=True)
    except (OSError, RuntimeError):
        raise UserError(f"there is no {what} at {path}") from None
    if not found.is_relative_to(root):
        raise UserError(
            f"{path} leads out of its folder, to {found}; copy the folder with its links followed"
        )
    if not stat.S_ISREG(found.stat().st_mode):
        raise UserError(f"{path} is no ordinary file; a {what} was expected")
    return found


def read_small_json(folder: Path, name: str, what: str) -> Any:
    """Read a JSON file of a folder; see `file_inside`.

    Raises:
        UserError: when it is absent, elsewhere, larger than `MAX_JSON_BYTES`, or no JSON.
    """
    path = file_inside(folder, name, what)
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise UserError(
            f"{folder / name} has {size} bytes; a {what} has at most {MAX_JSON_BYTES}, so it is "
            "something else"
        )
    try:
        return read_json(path, what)
    except RecursionError:
        raise UserError(f"{folder / name} is nested too deeply for a {what}") from None


def stored_tensors(folder: Path, name: str = "model.safetensors") -> dict[str, StoredTensor]:
    """Return what a weights file says it holds, from its header alone.

    Raises:
        UserError: when it is absent, elsewhere, no safetensors file, or contradicts itself.
    """
    path = file_inside(folder, name, "weights file")
    size = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
            if start.startswith(PICKLE_STARTS):
                raise UserError(
                    f"{folder / name} is a pickle, which can run any program when it is read; "
                    "only safetensors files are read"
                )
            raise _not_whole(folder / name, f"its header claims {length} of {size} bytes")
        text = stream.read(length)
    try:
        header = json.loads(text)
        entries = {key: value for key, value in header.items() if key != "__metadata__"}
        found = {key: _stored(value) for key, value in entries.items()}
        spans = {key: _span(value) for key, value in entries.items()}
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError):
        raise _not_whole(folder / name, "its header has another form") from None
    end = 0
    for key, (begin, after) in sorted(spans.items(), key=lambda item: item[1]):
        if begin != end or after - begin != _num_bytes(found[key]):
            raise _not_whole(folder / name, f"tensor {key!r} does not lie where it should")
        end = after
    if end != size - 8 - length:
        raise _not_whole(folder / name, f"its tensors take {end} of {size - 8 - length} bytes")
    return found


def require_tensors(
    found: Mapping[str, StoredTensor], expected: Mapping[str, Tensor], where: Path
) -> None:
    """Raise a `UserError` unless a file holds just the expected tensors (these may be on meta)."""
    for name in sorted(set(expected) ^ set(found)):
        has = "lacks" if name in expected else "has a foreign"
        raise UserError(f"{where} {has} tensor {name!r}; export it again")
    for name, tensor in expected.items():
        dtype, shape = str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
        if (found[name].dtype, found[name].shape) != (dtype, shape):
            raise UserError(
                f"{where}: {name} is {found[name].dtype} {found[name].shape}, the config says "
                f"{dtype} {shape}; export it again"
            )


def num_bytes(tensors: Iterable[StoredTensor]) -> int:
    """Return the bytes of all values."""
    return sum(map(_num_bytes, tensors))


def _stored(value: Mapping[str, Any]) -> StoredTensor:
    shape = tuple(value["shape"])
    if not all(type(length) is int and length >= 0 for length in shape):
        raise ValueError(shape)
    return StoredTensor(DTYPES[value["dtype"]], shape)


def _span(value: Mapping[str, Any]) -> tuple[int, int]:
    begin, end = value["data_offsets"]
    if type(begin) is not int or type(end) is not int:
        raise ValueError(value)
    return begin, end


def _num_bytes(tensor: StoredTensor) -> int:
    count = 1
    for length in tensor.shape:
        count *= length
    widths = {"64": 8, "32": 4, "16": 2}
    return count * widths.get(tensor.dtype[-2:], 1)


def _not_whole(path: Path, reason: str) -> UserError:
    return UserError(f"{path} is not a whole safetensors file: {reason}; copy or export it again")
