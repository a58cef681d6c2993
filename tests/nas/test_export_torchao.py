"""torchao's form of networks: smaller, nearly the same, and nothing else is read as one."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hw_profiles.process import child_environment
from nas.export import EXPORTERS
from nas.export.torchao import FEWEST_INPUTS, SCHEMES, TorchAoExporter
from searchspace.arch import Arch, LayerArch
from searchspace.errors import UserError
from searchspace.linear import Linear
from tests.nas.export_cases import CASES, LLAMA, handover, inputs_of, relative

pytest.importorskip("torchao")


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", CASES)
def test_quantised_networks_are_smaller_and_nearly_the_same(
    name: str, scheme: str, tmp_path: Path
) -> None:
    given = handover(CASES[name])
    inputs = inputs_of(given.arch)
    before = given.subnet(inputs)
    facts = TorchAoExporter(scheme).write(given, tmp_path)
    assert torch.equal(given.subnet(inputs), before), "the network itself was changed"
    loaded = EXPORTERS["torchao"]().load(tmp_path)
    assert 0 < relative(loaded.logits(inputs), before) < 0.02
    simulated = TorchAoExporter(scheme).stands_for(given)
    assert torch.equal(loaded.logits(inputs), simulated(inputs))
    assert facts["scheme"] == scheme and 0 < facts["quantised_maps"] <= facts["maps"]
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size < given.subnet.weight_bytes()
    if given.arch.family.causal:
        session = loaded.session(3, 11)
        parts = [session(inputs[:, :4]), *(session(inputs[:, t : t + 1]) for t in range(4, 11))]
        assert relative(torch.cat(parts, dim=1), loaded.logits(inputs)) < 0.02


def test_the_stored_weights_are_the_rows_rounded_to_127_steps(tmp_path: Path) -> None:
    given = handover(LLAMA)
    TorchAoExporter().write(given, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    maps = {
        name: module
        for name, module in given.subnet.named_modules()
        if isinstance(module, Linear) and module.weight.shape[1] >= FEWEST_INPUTS
    }
    assert len(maps) == 19
    for name, module in maps.items():
        values, scale = stored[f"{name}._weight_qdata"], stored[f"{name}._weight_scale"]
        assert values.dtype == torch.int8
        steps = module.weight.abs().amax(dim=1, keepdim=True) / 127
        assert (values * scale.reshape(-1, 1) - module.weight).abs().le(0.51 * steps).all()
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert set(json.loads(file.metadata()["tensor_names"])) == set(given.subnet.state_dict())


def test_networks_without_fp32_maps_and_unknown_schemes_are_refused() -> None:
    with pytest.raises(UserError, match="unknown torchao scheme 'int9'"):
        TorchAoExporter("int9")
    narrow = Arch(16, 8, 40, (LayerArch(mixer="softmax", num_heads=1, num_kv_heads=1),))
    assert "nothing left to quantise" in TorchAoExporter().refusal(handover(narrow))
    assert TorchAoExporter().refusal(handover(LLAMA)) == ""


def test_changed_files_are_refused_before_they_are_read(tmp_path: Path) -> None:
    exporter = TorchAoExporter()
    exporter.write(handover(LLAMA), tmp_path)
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    facts, whole = json.loads(config.read_text()), weights.read_bytes()
    config.write_text(json.dumps({**facts, "scheme": "pickle"}))
    with pytest.raises(UserError, match="unknown torchao scheme 'pickle'"):
        exporter.load(tmp_path)
    config.write_text(json.dumps({**facts, "format": "hwnas-subnet"}))
    with pytest.raises(UserError, match="is not an exported subnetwork"):
        exporter.load(tmp_path)
    config.write_text(json.dumps(facts))
    weights.write_bytes(whole[:-7])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        exporter.load(tmp_path)
    tensors = load_file_bytes(whole, tmp_path)
    save_file({**tensors, "ends.head._weight_qdata": torch.zeros(3, 3)}, weights)
    with pytest.raises(UserError, match="_weight_qdata is float32"):
        exporter.load(tmp_path)


def load_file_bytes(content: bytes, folder: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a safetensors file's content."""
    path = folder / "again.safetensors"
    path.write_bytes(content)
    return load_file(path)


def test_nothing_is_printed_and_torchao_is_imported_only_when_used(tmp_path: Path) -> None:
    arch = replace(LLAMA, layers=LLAMA.layers[:1])
    TorchAoExporter().write(handover(arch), tmp_path)
    script = (
        "import pathlib, sys; from nas.export import EXPORTERS;"
        "assert 'torchao' not in sys.modules;"
        "exporter = EXPORTERS['torchao'](); assert exporter.missing() == '';"
        f"exporter.load(pathlib.Path({str(tmp_path)!r}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=child_environment()
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
