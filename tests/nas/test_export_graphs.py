"""Programs of torch.export and ExecuTorch: any sizes, no code of ours, and no file but our own."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nas.export import EXPORTERS, Exporter
from nas.export.base import Loaded
from nas.export.executorch import ExecuTorchExporter
from nas.export.pt2 import ProgramExporter
from nas.export.pt2.scans import add_scans
from nas.export.quiet import quiet
from nas_kernels.recurrence import LOG_SUM, MAX, SUM, delta_states, recurrence
from searchspace.arch import Arch, LayerArch
from searchspace.errors import UserError
from searchspace.family import Family
from searchspace.mixers import MIXERS
from searchspace.subnet import Subnet
from tests.nas.export_cases import CASES, LLAMA, VIT, handover, inputs_of, relative

SHAPES = ((1, 1), (2, 16), (3, 11))
ENCODERS = Family("encoder", 3, embedding_position="learned", max_tokens=200, pad_token=39)


def written(exporter: Exporter, arch: Arch, folder: Path) -> tuple[Loaded, Subnet]:
    """What a folder is loaded as, and the network it was made of."""
    given = handover(arch)
    assert exporter.missing() == "" == exporter.refusal(given)
    exporter.write(given, folder)
    return exporter.load(folder), given.subnet


def worst_difference(
    loaded: Loaded, subnet: Subnet, shapes: Sequence[tuple[int, int]] = SHAPES
) -> float:
    """The largest difference at several shapes, of whole inputs and of sessions."""
    found, arch = [], subnet.arch
    with torch.inference_mode():
        for batch, tokens in shapes:
            inputs = inputs_of(arch, batch, tokens)
            expected = subnet(inputs)
            found.append(relative(loaded.logits(inputs), expected))
            if arch.family.causal:
                session, half = loaded.session(batch, tokens), max(1, tokens // 2)
                parts = [session(inputs[:, :half])]
                parts += [session(inputs[:, t : t + 1]) for t in range(half, tokens)]
                found.append(relative(torch.cat(parts, dim=1), expected))
    return max(found)


@pytest.mark.parametrize("name", ["llama", "encoder", "vit"])
def test_programs_compute_what_the_network_does_at_any_shape(name: str, tmp_path: Path) -> None:
    loaded, subnet = written(EXPORTERS["pt2"](), CASES[name], tmp_path)
    assert worst_difference(loaded, subnet) < ProgramExporter.max_difference


def test_programs_name_no_file_of_this_machine_and_no_operator_of_ours(tmp_path: Path) -> None:
    layer = LayerArch(mixer="gla", num_heads=2, num_kv_heads=1)
    loaded, subnet = written(ProgramExporter(), Arch(16, 8, 30, (layer,)), tmp_path)
    assert worst_difference(loaded, subnet) < ProgramExporter.max_difference
    for path in tmp_path.glob("*.pt2"):
        with zipfile.ZipFile(path) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith("models/model.json"))
            text = archive.read(name).decode()
        assert "hwnas" not in text and ".py" not in text
        assert "higher_order.scan" in text or path.stem == "decode"


class _Recurrence(nn.Module):
    """One of the operators that become loops."""

    def __init__(self, run: Callable[..., Any]) -> None:
        super().__init__()
        self.run = run

    def forward(self, *inputs: Tensor) -> Any:
        return self.run(*inputs)


def _delta(*inputs: Tensor) -> tuple[Tensor, Tensor]:
    states, written = delta_states(*inputs)
    return states, written


@pytest.mark.parametrize("kind", [SUM, MAX, LOG_SUM, "delta"])
def test_loops_compute_what_the_operators_do(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    if kind == "delta":
        inputs = draw(2, 1, 5, 3, 4), draw(2, 1, 5, 4, 3), draw(2, 1, 5, 4, 6), draw(2, 1, 3, 6)
        module = _Recurrence(_delta)
    else:
        inputs = draw(2, 5, 3), draw(2, 5, 3), draw(2, 3)  # type: ignore[assignment]
        module = _Recurrence(lambda factor, added, start: recurrence(kind, factor, added, start, 1))
    with quiet():
        program = torch.export.export(module, inputs, strict=False)
        add_scans(program)
    names = {str(node.target) for node in program.graph.nodes}
    assert "scan" in names and not any("hwnas" in name for name in names)
    torch.testing.assert_close(program.module()(*inputs), module(*inputs))


def _changed(source: Path, target: Path, change: Callable[[str, bytes], bytes | None]) -> None:
    """Copy an archive with other contents of its entries."""
    with zipfile.ZipFile(source) as before, zipfile.ZipFile(target, "w") as after:
        for name in before.namelist():
            content = change(name.partition("/")[2], before.read(name))
            if content is not None:
                after.writestr(name, content)


class _Bomb:
    def __reduce__(self) -> Any:
        return print, ("executed",)


def _pickled_weight(name: str, content: bytes) -> bytes:
    if name.endswith("weights_config.json"):
        return content.replace(b'"use_pickle": false', b'"use_pickle": true')
    return content


def _pickled_inputs(name: str, content: bytes) -> bytes:
    buffer = io.BytesIO()
    torch.save(_Bomb(), buffer)
    return buffer.getvalue() if "sample_inputs" in name else content


def _other_call(name: str, content: bytes) -> bytes:
    return content.replace(b"torch.ops.aten.linear.default", b"torch.hub.load")


def _code_as_size(name: str, content: bytes) -> bytes:
    if name != "models/model.json":
        return content
    program = json.loads(content)
    text = json.dumps(program).replace("Symbol('s", "print('executed') or Symbol('s")
    return text.encode()


def _guards(name: str, content: bytes) -> bytes:
    if name != "models/model.json":
        return content
    return json.dumps({**json.loads(content), "guards_code": ["print('executed')"]}).encode()


def _pickled_object(name: str, content: bytes) -> bytes:
    return pickle.dumps(_Bomb()) if name == "models/model.json" else content


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (_pickled_weight, "holds pickled weights"),
        (_pickled_inputs, "holds pickled inputs"),
        (_other_call, "holds a call of 'torch.hub.load"),
        (_code_as_size, "holds a size"),
        (_guards, "holds code of its own"),
        (_pickled_object, "is not a whole program"),
    ],
)
def test_programs_that_could_run_something_are_refused_unread(
    change: Callable[[str, bytes], bytes],
    sentence: str,
    vit_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "programs.json").write_text((vit_folder / "programs.json").read_text())
    _changed(vit_folder / "model.pt2", tmp_path / "model.pt2", change)
    with pytest.raises(UserError, match=sentence):
        ProgramExporter().load(tmp_path)
    assert "executed" not in capsys.readouterr().out


@pytest.fixture(scope="module")
def vit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vit")
    written(ProgramExporter(), VIT, folder)
    return folder


def test_foreign_and_damaged_files_are_refused(vit_folder: Path, tmp_path: Path) -> None:
    exporter = ProgramExporter()
    with pytest.raises(UserError, match="no list of programs"):
        exporter.load(tmp_path)
    (tmp_path / "programs.json").write_text('{"programs": ["../model.pt2"]}')
    with pytest.raises(UserError, match="names no programs of ours"):
        exporter.load(tmp_path)
    (tmp_path / "programs.json").write_text((vit_folder / "programs.json").read_text())
    whole = (vit_folder / "model.pt2").read_bytes()
    for content in (b"", b"nothing", whole[: len(whole) // 2]):
        (tmp_path / "model.pt2").write_bytes(content)
        with pytest.raises(UserError, match="is not a whole program"):
            exporter.load(tmp_path)


def test_what_a_format_cannot_hold_is_refused_with_the_reason() -> None:
    hyena = Arch(16, 8, 30, (LayerArch(mixer="hyena", num_heads=2, num_kv_heads=2),))
    assert "'hyena', whose filters" in ProgramExporter().refusal(handover(hyena))
    assert "'hyena'" in ExecuTorchExporter().refusal(handover(hyena))
    assert "int8 maps" in ExecuTorchExporter().refusal(handover(CASES["low_bit"]))
    assert "'gla'" in ExecuTorchExporter().refusal(handover(CASES["gated"]))
    assert ExecuTorchExporter().refusal(handover(LLAMA)) == ""


@pytest.mark.slow
@pytest.mark.parametrize("arch", [LLAMA, VIT], ids=["llama", "vit"])
def test_executorch_computes_what_the_network_does(arch: Arch, tmp_path: Path) -> None:
    pytest.importorskip("executorch")
    loaded, subnet = written(EXPORTERS["pte"](), arch, tmp_path)
    assert worst_difference(loaded, subnet) < ExecuTorchExporter.max_difference


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gated", "low_bit"])
def test_programs_of_loops_and_low_precisions(name: str, tmp_path: Path) -> None:
    loaded, subnet = written(ProgramExporter(), CASES[name], tmp_path)
    assert worst_difference(loaded, subnet) < (0.02 if name == "low_bit" else 1e-5)


def _layer(mixer: str) -> LayerArch:
    kind = MIXERS[mixer]
    heads = {"num_heads": 4, "num_kv_heads": 4 if kind.heads == "equal" else 2}
    heads = heads if kind.heads != "none" else {}
    return LayerArch(
        mixer=mixer, position=kind.positions[-1], **(heads if kind.heads != "none" else {})
    )


@pytest.mark.slow
@pytest.mark.parametrize("mixer", MIXERS)
def test_every_mixer_has_programs_for_any_sizes_or_a_reason(mixer: str, tmp_path: Path) -> None:
    for family in (Family(max_tokens=200), ENCODERS):
        if ("causal" if family.causal else "bidirectional") not in MIXERS[mixer].directions:
            continue
        arch = Arch(32, 8, 40, (_layer(mixer),), family)
        if ProgramExporter().refusal(handover(arch)):
            continue
        folder = tmp_path / family.kind
        folder.mkdir()
        loaded, subnet = written(ProgramExporter(), arch, folder)
        shapes = (*SHAPES, (2, 64), (1, 129))
        assert worst_difference(loaded, subnet, shapes) < ProgramExporter.max_difference


@pytest.mark.slow
@pytest.mark.parametrize("mixer", ["aft_local", "aft_conv", "sliding_window"])
def test_the_most_tokens_may_need_one_block_more_than_the_recorded(
    mixer: str, tmp_path: Path
) -> None:
    family = Family("encoder", 3, "class_token", "learned", max_tokens=64, pad_token=39)
    arch = Arch(32, 8, 40, (_layer(mixer),), family)
    loaded, subnet = written(ProgramExporter(), arch, tmp_path)
    difference = worst_difference(loaded, subnet, ((2, 5), (1, 53), (2, 63), (2, 64)))
    assert difference < ProgramExporter.max_difference
