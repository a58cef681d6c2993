"""Export and generation: what is handed over computes what the supernet computes."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from nas.config import ExportConfig
from nas.export import EXPORTERS, Exporter, ExportFailed, Handover, delivery
from nas.export.checker import Checker
from nas.export.delivery import ExportSource, export_subnet, handover_of
from nas.export.huggingface import HuggingFaceExporter
from nas.export.reference import Reference
from nas.export_stage import check_export, export_subnets
from nas.generation import generate_text, generate_tokens
from nas.progress import Reporter
from nas.tasks import TaskConfig, prepare_task
from nas.tasks.language_model import LanguageModelTask
from searchspace.errors import UserError
from searchspace.precisions import PRECISIONS
from searchspace.space import SearchSpace
from searchspace.subnet import Subnet
from searchspace.supernet import Supernet


@pytest.fixture(scope="module")
def checker() -> Iterator[Checker]:
    with Checker() as checker:
        yield checker


@pytest.fixture
def source(supernet: Supernet, task: LanguageModelTask) -> ExportSource:
    return ExportSource(supernet, task, 512)


def test_exported_folders_load_without_the_supernet_and_say_what_was_verified(
    checker: Checker, source: ExportSource, space: SearchSpace, tmp_path: Path
) -> None:
    rng = np.random.default_rng(1)
    inputs = torch.randint(0, space.vocab_size, (2, 33))
    for arch in [space.largest(), space.smallest(), *(space.sample(rng) for _ in range(6))]:
        folder = tmp_path / arch.id
        content = export_subnet(source, arch, folder, {"measured": {"loss": 1.0}}, checker)
        names = {path.name for path in folder.iterdir()}
        assert {
            "config.json", "export.json", "model.safetensors", "tokenizer.json", "README.md",
        } <= names  # fmt: skip
        assert not any(name.startswith(".") for name in names)
        assert json.loads((folder / "export.json").read_text()) == content
        assert content["formats"]["hf"]["verified"]["loss"] == pytest.approx(
            content["supernet_loss"], rel=1e-5
        )
        loaded = Subnet.load(folder)
        with torch.inference_mode():
            packed = source.supernet.extract(arch).pack()(inputs)
            assert torch.equal(loaded(inputs), packed)
        assert loaded.weight_bytes() == content["weight_bytes"]
        size = (folder / "model.safetensors").stat().st_size
        assert loaded.weight_bytes() <= size < loaded.weight_bytes() + 20_000


class _Wrong(HuggingFaceExporter):
    """Writes another network than it was given."""

    def write(self, handover: Handover, folder: Path) -> Mapping[str, Any]:
        handover.subnet.ends.head.weight.mul_(1.001)
        return super().write(handover, folder)


class _Unloadable(HuggingFaceExporter):
    def write(self, handover: Handover, folder: Path) -> Mapping[str, Any]:
        facts = super().write(handover, folder)
        (folder / "model.safetensors").write_bytes(b"nothing")
        return facts


@pytest.mark.parametrize(
    ("exporter", "sentence"),
    [(_Wrong, "hf of .* differs: logits differ by"), (_Unloadable, "hf does not run when loaded")],
)
def test_a_folder_that_fails_verification_is_not_left_behind(
    exporter: type[Exporter],
    sentence: str,
    source: ExportSource,
    space: SearchSpace,
    checker: Checker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(EXPORTERS, "hf", exporter)
    with pytest.raises(ExportFailed, match=sentence):
        export_subnet(source, space.largest(), tmp_path / "net", {}, checker)
    assert list(tmp_path.iterdir()) == []


def test_a_format_that_ends_its_process_fails_and_the_next_one_is_checked(
    source: ExportSource, space: SearchSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handover, _ = handover_of(source, space.smallest())
    network = source.supernet.view(space.smallest())
    Reference.of(network, source.task, 64).write(tmp_path / "reference")
    HuggingFaceExporter().write(handover, tmp_path)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    with Checker() as checker:
        found = checker.check(HuggingFaceExporter(), tmp_path, tmp_path / "reference")
        assert max(found["differences"]) < 1e-5 and found["decode_ms"] > 0
        assert checker._process is not None
        checker._process.kill()
        checker._process.wait()
        again = checker.check(HuggingFaceExporter(), tmp_path, tmp_path / "reference")
        assert again["differences"] == found["differences"]
        unknown = type("Unknown", (HuggingFaceExporter,), {"name": "unknown"})()
        with pytest.raises(ExportFailed, match=r"process that loads unknown ended: .*KeyError"):
            checker.check(unknown, tmp_path, tmp_path / "reference")
        (scratch,) = (tmp_path / "temporary").glob("hwnas-*")
        assert list(scratch.glob("hwnas-modules-*"))  # of the one that was killed
    assert not list((tmp_path / "temporary").iterdir())


def test_what_is_verified_already_is_not_written_again(
    source: ExportSource, space: SearchSpace, checker: Checker, tmp_path: Path
) -> None:
    source, arch = replace(source, weights="these"), space.smallest()
    first = export_subnet(source, arch, tmp_path / "net", {"measured": {"loss": 1.0}}, checker)
    weights = tmp_path / "net" / "model.safetensors"
    written = weights.stat().st_ino
    again = export_subnet(source, arch, tmp_path / "net", {"measured": {"loss": 2.0}}, checker)
    assert weights.stat().st_ino == written
    assert again == {**first, "measured": {"loss": 2.0}}
    assert json.loads((tmp_path / "net" / "export.json").read_text()) == again
    export_subnet(replace(source, weights="others"), arch, tmp_path / "net", {}, checker)
    assert weights.stat().st_ino != written


def test_one_that_fails_does_not_keep_the_others_back(
    source: ExportSource, space: SearchSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archs = [space.smallest(), space.largest()]
    pipeline: Any = SimpleNamespace(
        config=SimpleNamespace(export=ExportConfig(test_tokens=2048, formats=("hf",))),
        supernet=source.supernet,
        task=source.task,
        folder=SimpleNamespace(supernet=tmp_path / "supernet", subnets=tmp_path / "subnets"),
        reporter=Reporter(quiet=True),
    )
    front = {
        "groups": {"front": [{"arch_id": arch.id, "arch": arch.to_dict()} for arch in archs]},
        "chosen": {"best": archs[1].id},
    }
    written = HuggingFaceExporter.write

    def write(self: HuggingFaceExporter, handover: Handover, folder: Path) -> Mapping[str, Any]:
        if handover.arch == archs[0]:
            raise ExportFailed("no such form")
        return written(self, handover, folder)

    monkeypatch.setattr(HuggingFaceExporter, "write", write)
    with pytest.raises(ExportFailed, match="1 of 2 subnetworks were not exported: no such form"):
        export_subnets(pipeline, front, [])
    assert [path.name for path in (tmp_path / "subnets").iterdir()] == [archs[1].id]
    pipeline.config.export = replace(pipeline.config.export, choose=("best", archs[1].id))
    export_subnets(pipeline, front, [])
    pipeline.config.export = replace(pipeline.config.export, choose=("bets",))
    with pytest.raises(UserError, match=r"export.choose='bets' is neither all, best nor the id"):
        export_subnets(pipeline, front, [])


def test_an_unknown_format_is_refused(source: ExportSource) -> None:
    with pytest.raises(UserError, match=r"unknown export format 'onx'"):
        replace(source, formats=("onx",)).exporters()
    for key, value in (("formats", "onx"), ("rewrites", "none")):
        with pytest.raises(UserError, match=rf"unknown export.{key} '{value}'"):
            check_export(ExportConfig(**{key: (value,)}))


def test_damaged_and_foreign_folders_are_refused(
    checker: Checker, source: ExportSource, space: SearchSpace, tmp_path: Path
) -> None:
    folder = tmp_path / "net"
    export_subnet(source, space.smallest(), folder, {}, checker)
    weights, config = folder / "model.safetensors", folder / "config.json"
    whole, text = weights.read_bytes(), config.read_text()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        Subnet.load(folder)
    other = source.supernet.extract(space.largest())
    other.save(tmp_path / "other")
    weights.write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"has a foreign tensor|the\s+config says"):
        Subnet.load(folder)
    config.write_text("{}")
    with pytest.raises(UserError, match="is not an exported subnetwork"):
        Subnet.load(folder)
    config.write_text(text.replace('"version": 1', '"version": 99'))
    with pytest.raises(UserError, match="format version 99"):
        Subnet.load(folder)
    with pytest.raises(UserError, match="there is no subnetwork config"):
        Subnet.load(tmp_path / "absent")


def test_greedy_generation_equals_the_whole_forward_pass_each_time(
    space: SearchSpace, supernet: Supernet
) -> None:
    subnet = supernet.extract(space.largest())
    prompt = [5, 17, 3]
    found = list(generate_tokens(subnet, prompt, 20, temperature=0))
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(20):
            tokens.append(int(subnet(torch.tensor([tokens]))[0, -1].argmax()))
    assert found == tokens[len(prompt) :]


def test_text_is_streamed_and_reproducible(
    checker: Checker, source: ExportSource, space: SearchSpace, tmp_path: Path
) -> None:
    export_subnet(source, space.smallest(), tmp_path / "net", {}, checker)
    first = list(generate_text(tmp_path / "net", "def ", 12, seed=4))
    assert len(first) >= 12
    assert first == list(generate_text(tmp_path / "net", "def ", 12, seed=4))
    with pytest.raises(UserError, match="prompt is empty"):
        list(generate_text(tmp_path / "net", "", 4))
    with pytest.raises(UserError, match="temperature=-1"):
        list(generate_text(tmp_path / "net", "a", 4, temperature=-1))


FAMILIES = {
    "vit-small": (TaskConfig("digits"), r"classifier of images \(1, 8, 8\) into 10 classes"),
    "encoder-small": (
        TaskConfig("listops", num_examples=64, min_length=8, max_length=30),
        "classifier of token ids below 16 into 10 classes",
    ),
    "decoder-numerics": (TaskConfig("copy", num_items=6), "about token ids below 29 and not about"),
}


@pytest.mark.parametrize("preset", FAMILIES)
def test_networks_of_every_family_and_precision_are_exported_and_say_what_they_are_for(
    preset: str, checker: Checker, tmp_path: Path
) -> None:
    config, sentence = FAMILIES[preset]
    task = prepare_task(config, tmp_path / "task")
    space = SearchSpace.load(preset, task.vocab_size, task.family_facts)
    space = replace(space, mixer_precision=tuple(PRECISIONS), ffn_precision=tuple(PRECISIONS))
    source = ExportSource(Supernet(space, torch.Generator().manual_seed(0)), task, 32)
    norms = itertools.cycle(space.norm)
    for precision in PRECISIONS:
        arch = space.uniform(
            mixer_precision=precision, ffn_precision=precision, norm=next(norms), depth=2
        )
        content = export_subnet(source, arch, tmp_path / "net", {}, checker)
        verified = content["formats"]["hf"]["verified"]
        assert ("decode_ms" in verified) == arch.family.causal
        assert verified["loss"] == pytest.approx(content["supernet_loss"], rel=0.01)
        assert ("state_bytes_per_sequence" in content) == arch.family.causal
    facts = json.loads((tmp_path / "net" / "config.json").read_text())["task"]
    assert facts.get("classes") == (None if arch.family.causal else list("0123456789"))
    files = {"vit-small": "preprocessor_config.json", "encoder-small": "tokenizer.json"}
    for family, name in files.items():
        assert (tmp_path / "net" / name).exists() == (preset == family)
    with pytest.raises(UserError, match=sentence) as error:
        list(generate_text(tmp_path / "net", "def ", 4))
    assert "\n" not in str(error.value)
    subnet = Subnet.load(tmp_path / "net")
    if arch.family.causal:
        assert len(list(generate_tokens(subnet, [1, 2], 3))) == 3
    else:
        with pytest.raises(UserError, match="continues nothing"):
            list(generate_tokens(subnet, [1, 2], 3))


def test_a_low_precision_that_loses_too_much_is_not_handed_over(
    source: ExportSource,
    space: SearchSpace,
    checker: Checker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arch = space.uniform(mixer_precision="int8", ffn_precision="int8")
    found = delivery.held_out_loss
    monkeypatch.setattr(delivery, "held_out_loss", lambda *given: 1.011 * found(*given))
    with pytest.raises(ExportFailed, match=r"the loss is \d\.\d+, in PyTorch"):
        export_subnet(source, arch, tmp_path / "net", {}, checker)


def test_rewrites_are_applied_where_they_fit_and_refused_with_the_reason(
    task: LanguageModelTask, checker: Checker, tmp_path: Path
) -> None:
    space = SearchSpace.load("decoder-tiny", task.vocab_size)
    space = replace(space, family=replace(space.family, final_norm="layernorm"))
    supernet = Supernet(space, torch.Generator().manual_seed(0))
    source = ExportSource(supernet, task, 256, ("layernorm_to_rmsnorm",))
    fitting = space.uniform(depth=2)
    content = export_subnet(source, fitting, tmp_path / "fitting", {}, checker)
    assert content["rewrites"] == ["layernorm_to_rmsnorm"] and not content["rewrites_refused"]
    norms = {type(b.norm).__name__ for b in Subnet.load(tmp_path / "fitting").blocks.values()}
    assert norms == {"RMSNorm"}
    other = space.uniform(depth=2, ffn_precision="int8")
    content = export_subnet(source, other, tmp_path / "other", {}, checker)
    assert content["rewrites"] == []
    assert "int8" in content["rewrites_refused"]["layernorm_to_rmsnorm"]
