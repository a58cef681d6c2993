"""Hostile files are refused with a sentence, before anything is executed or allocated."""

from __future__ import annotations

import json
import os
import pickle
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from searchspace.errors import UserError
from searchspace.space import SearchSpace
from searchspace.subnet import Subnet
from searchspace.untrusted import StoredTensor, file_inside, read_small_json, stored_tensors

TENSORS = {
    "a": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "b": torch.zeros(5, dtype=torch.int8),
    "c": torch.zeros(2, 0, dtype=torch.bfloat16),
    "d": torch.ones((), dtype=torch.bool),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "model.safetensors", {"format": "pt"})
    return tmp_path


def with_header(folder: Path, header: Any, data: bytes = b"", length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = (len(text) if length is None else length).to_bytes(8, "little")
    (folder / "model.safetensors").write_bytes(size + text + data)


def test_a_header_is_read_as_it_is(folder: Path) -> None:
    assert stored_tensors(folder) == {
        name: StoredTensor(str(t.dtype).removeprefix("torch."), tuple(t.shape))
        for name, t in TENSORS.items()
    }


class _Evil:
    def __reduce__(self) -> Any:
        return os._exit, (3,)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_pickle_in_disguise_is_not_run(folder: Path, protocol: int) -> None:
    (folder / "model.safetensors").write_bytes(pickle.dumps(_Evil(), protocol))
    with pytest.raises(UserError, match="is a pickle, which can run any program"):
        stored_tensors(folder)


def test_a_checkpoint_of_torch_save_is_refused(folder: Path) -> None:
    torch.save(TENSORS, folder / "model.safetensors")
    with pytest.raises(UserError, match="is a pickle"):
        stored_tensors(folder)


def entry(shape: list[Any], span: list[Any], dtype: str = "F32") -> dict[str, Any]:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": span}}


HEADERS = {
    "longer than the file": (b"{}", b"", 1 << 40),
    "another form": (b"[]", b"", None),
    "no JSON": (b"\xff\xfe{{", b"", None),
    "a tensor beyond the end": (entry([1 << 20], [0, 4 << 20]), b"1234", None),
    "a negative span": (entry([1], [4, 0]), b"1234", None),
    "a span of another size": (entry([2], [0, 4]), b"1234", None),
    "an unknown dtype": (entry([1], [0, 4], "F9"), b"1234", None),
    "a negative length": (entry([-1, -1], [0, 4]), b"1234", None),
    "a fractional length": (entry([1.0], [0, 4]), b"1234", None),
    "a length that is true": (entry([True], [0, 4]), b"1234", None),
    "bytes that nobody claims": (entry([1], [0, 4]), b"12345678", None),
    "too deep": (b"[" * 200_000, b"", None),
}


@pytest.mark.parametrize("what", HEADERS)
def test_a_header_that_lies_is_refused(folder: Path, what: str) -> None:
    with_header(folder, *HEADERS[what])
    with pytest.raises(UserError, match="is not a whole safetensors file"):
        stored_tensors(folder)


def test_a_huge_header_is_not_even_read(folder: Path) -> None:
    path = folder / "model.safetensors"
    size = 8 << 30
    with path.open("wb") as stream:
        stream.write((size - 8).to_bytes(8, "little"))
        stream.truncate(size)  # sparse: no disk is used
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match="its header claims"):
        stored_tensors(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB


def test_links_may_stay_inside_but_not_lead_out(folder: Path) -> None:
    (folder / "inner").mkdir()
    (folder / "inner" / "model.safetensors").symlink_to(folder / "model.safetensors")
    with pytest.raises(UserError, match="leads out of its folder"):
        stored_tensors(folder / "inner")
    (folder / "link.safetensors").symlink_to("model.safetensors")
    assert stored_tensors(folder, "link.safetensors").keys() == TENSORS.keys()
    (folder / "loop").symlink_to("loop")
    for name in ("loop", "absent", "../model.safetensors/x"):
        with pytest.raises(UserError, match="there is no weights file at"):
            stored_tensors(folder, name)
    with pytest.raises(UserError, match="leads out of its folder"):
        file_inside(folder / "inner", "../model.safetensors", "weights file")


def test_a_pipe_is_not_waited_for(folder: Path) -> None:
    os.mkfifo(folder / "config.json")
    with pytest.raises(UserError, match="is no ordinary file"):
        read_small_json(folder, "config.json", "config")


def test_a_config_is_small_and_flat(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(UserError, match="nested too deeply"):
        read_small_json(folder, "config.json", "config")
    with path.open("wb") as stream:
        stream.truncate(1 << 33)
    with pytest.raises(UserError, match="8589934592 bytes; a config has at most"):
        read_small_json(folder, "config.json", "config")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_damaged_file_is_either_read_alike_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    save_file(TENSORS, folder / "model.safetensors")
    whole = bytearray((folder / "model.safetensors").read_bytes())
    place = data.draw(st.integers(0, len(whole) - 1))
    whole[place] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(whole)))
    (folder / "model.safetensors").write_bytes(whole[:cut])
    try:
        found = stored_tensors(folder)
    except UserError as error:
        assert "safetensors" in str(error)
        return
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()} == {  # noqa: SIM118
            name: tensor.shape for name, tensor in found.items()
        }


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    space = SearchSpace.load("decoder-tiny", 64)
    Subnet(space.smallest()).reset(torch.Generator().manual_seed(0)).pack().save(folder)
    return folder


def replaced(value: Any, name: str, new: Any) -> Any:
    """Return a JSON value in which every entry of this name is another."""
    if isinstance(value, dict):
        return {k: new if k == name else replaced(v, name, new) for k, v in value.items()}
    return [replaced(item, name, new) for item in value] if isinstance(value, list) else value


CONFIGS = {
    "heads without end": ("num_heads", 10**12, "num_heads=1000000000000 is not between"),
    "many heads": ("num_heads", 1 << 20, "num_heads=1048576 is not between -1 and 4096"),
    "a width without end": ("d_model", 10**15, "d_model=1000000000000000 is not between"),
    "another width": ("d_model", 1 << 22, "is float32 .*, the config says float32"),
    "a wider layer": ("intermediate_size", 1 << 20, "is float32 .*, the config says float32"),
    "a negative width": ("vocab_size", -5, "vocab_size=-5 is not between"),
    "no layers": ("layers", {}, "has no list of at most 4096 layers"),
    "layers without end": ("layers", [{"skip": True}] * 5000, "has no list of at most 4096"),
    "layers that are none": ("layers", [7], "a layer is a mapping of its fields"),
    "no arch": ("arch", None, "has no list of at most 4096 layers"),
    "an unknown mixer": ("mixer", "__import__", "unknown mixer '__import__'"),
    "an unknown rewrite": ("rewrites", ["os.system"], "unknown rewrite 'os.system'"),
    "rewrites that are none": ("rewrites", {"a": 1}, "is no list of names"),
}


@pytest.mark.parametrize("what", CONFIGS)
def test_a_config_that_claims_too_much_is_refused(
    exported: Path, tmp_path: Path, what: str
) -> None:
    name, value, sentence = CONFIGS[what]
    config = replaced(json.loads((exported / "config.json").read_text()), name, value)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((exported / "model.safetensors").read_bytes())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=sentence) as error:
        Subnet.load(tmp_path)
    assert "\n" not in str(error.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


def test_an_exported_folder_with_a_link_out_of_it_is_refused(
    exported: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_bytes((exported / "config.json").read_bytes())
    (tmp_path / "model.safetensors").symlink_to(exported / "model.safetensors")
    with pytest.raises(UserError, match="leads out of its folder"):
        Subnet.load(tmp_path)
    Subnet.load(exported)
