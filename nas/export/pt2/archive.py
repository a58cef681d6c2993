"""Saving and loading programs, and what a file must not hold to be loaded.

`torch.export.load` is not made for files from others: it unpickles what an archive says is pickled,
evaluates the symbolic sizes as Python, and calls any function of torch that a node names. So an
archive is read without it first, and refused unless it is as bare as those written here: plain
tensors, sums and products of sizes, and ATen operators.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule

from searchspace.errors import UserError
from searchspace.files import write_file
from searchspace.untrusted import MAX_JSON_BYTES, file_inside

ENTRY = re.compile(
    r"data/weights/(weight_\d+|model_weights_config\.json)"
    r"|data/constants/(tensor_\d+|model_constants_config\.json)"
    r"|data/sample_inputs/model\.pt|models/model\.json"
    r"|archive_format|archive_version|byteorder|version|\.data/(version|serialization_id)"
)
PLAIN_TENSOR = re.compile(r"(weight|tensor)_\d+")
OPERATOR = re.compile(
    r"torch\.ops\.aten\.(?!from_file)(?!__(?!and|or|xor|rshift|lshift))\w+\.\w+|torch\.ops\.higher_order\.scan"
    r"|_operator\.(add|sub|mul|neg|floordiv|mod|truediv|pow|getitem|eq|ne|lt|le|gt|ge|and_|or_)"
    r"|torch\.(sym_(max|min|not|float|int|sum)|_sym_sqrt)"
)
SIZE = re.compile(
    r"((Add|Mul|Pow|PowByNatural|FloatPow|Min|Max|Mod|PythonMod|FloorDiv|CleanDiv|IntTrueDiv"
    r"|FloatTrueDiv|ModularIndexing|ToFloat|TruncToInt|FloorToInt|CeilToInt|OpaqueUnaryFn_sqrt"
    r"|Integer|Rational|Float|Symbol)\("
    r"|\)|,|-?[\d.]+|'[su]\d+'|'-?[\d.]+(e-?\d+)?'|positive=True|integer=True|precision=\d+|\s)*"
)
KEPT_META = ("val",)
"""What is said of nodes; the rest is for debugging, and names files of this machine."""


def save_program(program: ExportedProgram, path: Path) -> None:
    """Write a `.pt2` archive under a temporary name, then rename it into place.

    Raises:
        UserError: when the folder cannot be written to or is full.
    """
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, GraphModule) else ():
            node.meta = {key: value for key, value in node.meta.items() if key in KEPT_META}
    program.example_inputs = None
    write_file(path, lambda stream: torch.export.save(program, stream))


def without_weights(program: ExportedProgram, other: ExportedProgram) -> None:
    """Leave out of a program the weights that another one has under the same names.

    In their place stand tensors of that shape which have a single value: not a number, so that a
    program which was not given its weights says nothing that could be taken for a result.
    """
    for name, tensor in program.state_dict.items():
        if name in other.state_dict and tensor.shape == other.state_dict[name].shape:
            value = torch.nan if tensor.is_floating_point() else 0
            held = torch.full((), value, dtype=tensor.dtype).expand(tensor.shape)
            is_weight = isinstance(tensor, torch.nn.Parameter)
            program.state_dict[name] = torch.nn.Parameter(held, False) if is_weight else held


def load_program(folder: Path, name: str) -> ExportedProgram:
    """Read what `save_program` wrote.

    Raises:
        UserError: when the file is absent, damaged, or holds anything else than such programs do.
    """
    path = file_inside(folder, name, "program")
    try:
        with zipfile.ZipFile(path) as archive:
            _check(archive, folder / name)
    except UserError:
        raise
    except (zipfile.BadZipFile, EOFError, KeyError, ValueError, TypeError, RecursionError):
        raise UserError(
            f"{folder / name} is not a whole program; copy or export it again"
        ) from None
    return torch.export.load(path)


def _check(archive: zipfile.ZipFile, path: Path) -> None:
    names = [name.partition("/")[2] for name in archive.namelist()]
    sizes = {name: info.file_size for name, info in zip(names, archive.infolist(), strict=True)}
    for name in names:
        if not ENTRY.fullmatch(name) or names.count(name) > 1:
            raise _refused(path, f"an entry {name!r}")
        if name.endswith(".json") and sizes[name] > MAX_JSON_BYTES:
            raise _refused(path, f"{sizes[name]} bytes in {name!r}")
    if sizes.get("data/sample_inputs/model.pt"):
        raise _refused(path, "pickled inputs")
    roots = dict(zip(names, archive.namelist(), strict=True))
    for kind in ("weights", "constants"):
        config = json.loads(archive.read(roots[f"data/{kind}/model_{kind}_config.json"]))["config"]
        for entry in config.values():
            if entry["use_pickle"] is not False or not PLAIN_TENSOR.fullmatch(entry["path_name"]):
                raise _refused(path, f"pickled {kind}")
    program = json.loads(archive.read(roots["models/model.json"]))
    if program.get("guards_code"):
        raise _refused(path, "code of its own")
    for key, text in _texts(program):
        if key == "target" and not OPERATOR.fullmatch(text):
            raise _refused(path, f"a call of {text!r:.60}")
        if key == "expr_str" and not SIZE.fullmatch(text):
            raise _refused(path, f"a size {text!r:.60}")


def _texts(value: Any) -> Iterator[tuple[str, str]]:
    """Yield all texts with their keys."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        for key, item in value.items() if isinstance(value, dict) else ():
            if isinstance(item, str):
                yield key, item
        items = value.values() if isinstance(value, dict) else value
        waiting += [item for item in items if isinstance(item, dict | list)]


def _refused(path: Path, what: str) -> UserError:
    return UserError(
        f"{path} holds {what}, which no program written here does; it is not loaded, as it could "
        "run anything"
    )
