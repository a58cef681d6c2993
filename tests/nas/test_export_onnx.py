"""ONNX graphs of any batch and length compute what the network computes."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nas.export.base import ExportFailed, Handover
from nas.export.checker import Checker
from nas.export.delivery import ExportSource, export_subnet
from nas.export.onnx import OnnxExporter, OnnxInt4Exporter, OnnxInt8Exporter
from nas.export.onnx.graphs import decode_graph, prefill_graph
from nas.export.onnx.recorder import Sizes, record
from nas.export.onnx.rounding import rounded
from nas.export.onnx.runtime import LoadedOnnx
from nas.tasks.language_model import LanguageModelTask
from nas_kernels.linear_scan import recurrent_linear_scan
from nas_kernels.recurrence import LOG_SUM, MAX, SUM, in_two_levels, recurrence
from searchspace.arch import Arch
from searchspace.ffn import FFNS
from searchspace.layer_arch import LayerArch
from searchspace.mixers import MIXERS
from searchspace.space import SearchSpace
from searchspace.subnet import Subnet
from searchspace.supernet import Supernet

SHAPES = ((1, 1), (2, 64), (3, 23))
BOUND = 1e-4
VOCABULARY = 50
FACTS = {
    "decoder": {},
    "encoder": {"kind": "encoder", "num_classes": 5},
    "vit": {"kind": "vit", "num_classes": 5, "image_size": 8, "channels": 3},
}


def network(arch: Arch, seed: int = 0) -> Subnet:
    """A packed network with logits that are clearly not zero."""
    subnet = Subnet(arch).reset(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        subnet.ends.head.weight.mul_(10.0)
    return subnet.pack().eval().requires_grad_(False)


def some_inputs(arch: Arch, batch: int, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    family = arch.family
    if family.kind == "vit":
        shape = (batch, family.channels, family.image_size, family.image_size)
        return torch.randn(shape, generator=generator)
    return torch.randint(VOCABULARY, (batch, tokens), generator=generator)


def difference(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1.0))


def step_by_step(loaded: LoadedOnnx, inputs_BT: Tensor) -> Tensor:
    half = max(1, inputs_BT.shape[1] // 2)
    session = loaded.session(*inputs_BT.shape)
    steps = [inputs_BT[:, t : t + 1] for t in range(half, inputs_BT.shape[1])]
    return torch.cat([session(part) for part in (inputs_BT[:, :half], *steps)], dim=1)


@torch.inference_mode()
def check(subnet: Subnet, folder: Path, shapes: tuple[tuple[int, int], ...] = SHAPES) -> None:
    """Raise unless the written graphs compute what the network does, at every shape."""
    folder.mkdir(exist_ok=True)
    exporter = OnnxExporter()
    exporter.write(Handover(subnet, {}), folder)
    loaded = exporter.load(folder)
    assert isinstance(loaded, LoadedOnnx)
    for batch, tokens in shapes:
        inputs = some_inputs(subnet.arch, batch, tokens)
        expected = subnet(inputs)
        about = subnet.arch.layers, batch, tokens
        assert difference(loaded.logits(inputs), expected) < BOUND, about
        if subnet.arch.family.causal:
            assert difference(step_by_step(loaded, inputs), expected) < BOUND, about


def load_space(preset: str) -> SearchSpace:
    kind = next((kind for kind in ("encoder", "vit") if preset.startswith(kind)), "decoder")
    return SearchSpace.load(preset, VOCABULARY, FACTS[kind] or None)


def of_layers(space: SearchSpace, *layers: LayerArch) -> Arch:
    return dataclasses.replace(space.smallest(), layers=layers)


@pytest.fixture(scope="module")
def tiny() -> SearchSpace:
    return load_space("decoder-tiny")


def test_a_decoder_reads_any_prompt_and_goes_on_from_it(tiny: SearchSpace, tmp_path: Path) -> None:
    mixers = ("softmax", "sliding_window", "gla")
    layers = [tiny.uniform(d_model=32, mixer=mixer).layers[-1] for mixer in mixers]
    # The window of 32 is passed within a prompt, and step by step.
    check(network(of_layers(tiny, *layers)), tmp_path, (*SHAPES, (1, 80)))


@pytest.mark.parametrize("preset", ["encoder-small", "vit-small"])
def test_other_networks_take_any_batch(preset: str, tmp_path: Path) -> None:
    space = load_space(preset)
    check(network(of_layers(space, space.smallest().layers[-1])), tmp_path)


def test_a_decode_step_has_few_nodes_and_no_loop(tiny: SearchSpace) -> None:
    subnet = network(tiny.uniform(depth=1, d_model=32))
    kinds = [node.op_type for node in decode_graph(subnet).recorded.builder.nodes]
    assert len(kinds) < 70 and "Scan" not in kinds


def test_weights_are_written_once_for_both_graphs(tiny: SearchSpace, tmp_path: Path) -> None:
    import onnx

    subnet = network(tiny.largest())
    OnnxExporter().write(Handover(subnet, {}), tmp_path)
    assert (tmp_path / "weights.data").stat().st_size < 1.1 * subnet.weight_bytes()
    places = []
    for name in ("prefill.onnx", "decode.onnx"):
        model = onnx.load(tmp_path / name, load_external_data=False)
        external = [tensor for tensor in model.graph.initializer if tensor.external_data]
        places.append({(item.value) for t in external for item in t.external_data[1:2]})
        assert (tmp_path / name).stat().st_size < 100_000
    assert places[0] == places[1] != set()


def test_inputs_and_outputs_are_described(tiny: SearchSpace, tmp_path: Path) -> None:
    subnet = network(tiny.uniform(depth=1, d_model=32, heads="4x2"))
    OnnxExporter().write(Handover(subnet, {}), tmp_path)
    about = json.loads((tmp_path / "io.json").read_text())
    decode = about["graphs"]["decode"]
    assert decode["inputs"]["input_ids"] == ["batch", 1]
    assert decode["inputs"]["past_length"] == []
    (pair, *_) = about["state"]
    assert decode["inputs"][pair["input"]] == ["batch", 2, "past", 16]
    assert decode["outputs"][pair["output"]] == ["batch", 2, "past + 1", 16]
    assert about["graphs"]["prefill"]["outputs"]["logits"] == ["batch", "tokens", VOCABULARY]


@pytest.mark.parametrize("exporter", [OnnxInt8Exporter(), OnnxInt4Exporter()])
@torch.inference_mode()
def test_rounded_graphs_compute_what_the_rounded_network_computes(
    exporter: OnnxExporter, tiny: SearchSpace, tmp_path: Path
) -> None:
    subnet = network(tiny.uniform(d_model=64, depth=2, ffn="swiglu"))
    exporter.write(Handover(subnet, {}), tmp_path)
    loaded = exporter.load(tmp_path)
    inputs = some_inputs(subnet.arch, 2, 40)
    exact, expected = subnet(inputs), rounded(subnet, exporter.precision)(inputs)
    error = (loaded.logits(inputs) - expected).norm() / expected.norm()
    # The embedding is rounded too; ONNX Runtime's int4 product may round activations.
    assert error < 0.02 < 0.5 > (expected - exact).norm() / exact.norm() > 0.002
    assert isinstance(loaded, LoadedOnnx)
    steps = step_by_step(loaded, inputs)
    assert (steps - expected).norm() / expected.norm() < 0.03
    size = sum(path.stat().st_size for path in tmp_path.glob("weights.data"))
    assert size < 0.35 * subnet.weight_bytes()


def test_low_precisions_of_the_arch_stay_what_they_are(tiny: SearchSpace) -> None:
    choices = {"mixer_precision": "int8", "ffn_precision": "int8"}
    subnet = network(tiny.uniform(d_model=64, depth=1, **choices))
    kinds = {node.op_type for node in prefill_graph(subnet).recorded.builder.nodes}
    assert {"MatMulInteger", "MatMulIntegerToFloat"} & kinds


def test_operators_without_a_form_are_refused_by_name() -> None:
    space = load_space("decoder-operators")
    subnet = Subnet(space.uniform(depth=2, mixer="hyena"))
    reason = OnnxExporter().refusal(Handover(subnet, {}))
    assert reason.startswith("hyena has no form in ONNX: ")


def test_what_has_no_translation_fails_with_its_name(
    tiny: SearchSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subnet = network(tiny.uniform(depth=1, d_model=32))
    monkeypatch.setattr(subnet.ends, "norm", nn.ReLU6())
    with pytest.raises(ExportFailed, match=r"has no ONNX form: the operator aten\.hardtanh"):
        OnnxExporter().write(Handover(subnet, {}), tmp_path)


def test_a_size_that_is_taken_for_a_number_is_noticed() -> None:
    sizes = Sizes()
    tokens = sizes.free("tokens", 61)
    inputs = {"x": sizes.empty((tokens, 2), torch.float32)}
    for run in (lambda x: [x * float(x.shape[0])], lambda x: [x + torch.ones(61, 2)]):
        with pytest.raises(NotImplementedError, match="not free"):
            record(run, sizes, inputs, lambda b, v: {})


def test_a_write_that_other_tensors_would_see_is_noticed() -> None:
    sizes = Sizes()
    inputs = {"x": sizes.empty((sizes.free("tokens", 61), 2), torch.float32)}

    def run(x: Tensor) -> list[Tensor]:
        y = x + 1
        y[:, 0].zero_()
        return [y]

    with pytest.raises(NotImplementedError, match=r"zero_\.default on a view"):
        record(run, sizes, inputs, lambda b, v: {})


@pytest.mark.parametrize("tokens", [1, 5, 16, 37])
def test_recurrences_in_two_levels_equal_a_loop(tokens: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    decay, added = torch.rand(2, 2, tokens, 3, generator=generator)
    start = torch.rand(2, 3, generator=generator)
    expected, _ = recurrent_linear_scan(decay, added, start)
    torch.testing.assert_close(in_two_levels(SUM, decay, added, start), expected)
    state, peaks = start, []
    for t in range(tokens):
        state = torch.maximum(state - decay[:1, :1][:, 0], added[:, t])
        peaks.append(state)
    found = in_two_levels(MAX, -decay[:1, :1], added, start)
    torch.testing.assert_close(found, torch.stack(peaks, dim=1))


def test_a_running_log_sum_equals_pytorch() -> None:
    added = torch.randn(2, 9, 3, generator=torch.Generator().manual_seed(0))
    start = torch.full((2, 3), -math.inf)
    found = recurrence(LOG_SUM, torch.zeros(1, 1, 1), added, start, 1)
    torch.testing.assert_close(found, added.logcumsumexp(dim=1))


@pytest.mark.slow
def test_a_fresh_process_verifies_every_variant(
    supernet: Supernet, task: LanguageModelTask, space: SearchSpace, tmp_path: Path
) -> None:
    names = ("onnx", "onnx-int8", "onnx-int4")
    source = ExportSource(supernet, task, 512, formats=names)
    arch = space.uniform(mixer="sliding_window", heads="4x2")
    with Checker() as checker:
        content = export_subnet(source, arch, tmp_path / arch.id, {}, checker)
    found = {name: content["formats"][name]["verified"] for name in names}
    assert max(found["onnx"]["differences"]) < BOUND
    assert found["onnx"]["step_difference"] < BOUND
    sizes = [found[name]["file_bytes"] for name in names]
    assert sizes == sorted(sizes, reverse=True)


def has_form(layer: LayerArch) -> bool:
    mixer, ffn = MIXERS.get(layer.mixer), FFNS.get(layer.ffn)
    return not (mixer and mixer.onnx) and not (ffn and ffn.onnx)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["decoder-operators", "encoder-operators"])
def test_every_operator_has_a_form_for_any_size(preset: str, tmp_path: Path) -> None:
    space = load_space(preset)
    for mixer in [name for name in space.mixers if name in MIXERS]:
        layer = space.uniform(mixer=mixer, intermediate_size=0).layers[-1]
        if has_form(layer):
            check(network(of_layers(space, layer)), tmp_path / mixer, ((1, 1), (2, 140)))
    for ffn in space.ffn:
        layer = space.uniform(mixer="none", ffn=ffn).layers[-1]
        if has_form(layer):
            check(network(of_layers(space, layer)), tmp_path / ffn, ((1, 1), (3, 23)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "preset", ["decoder-small", "decoder-operators", "encoder-small", "vit-small"]
)
def test_random_archs(preset: str, tmp_path: Path) -> None:
    space, rng = load_space(preset), np.random.default_rng(7)
    for index in range(2):
        arch = space.sample(rng)
        full = [
            dataclasses.replace(layer, mixer_precision="fp32", ffn_precision="fp32")
            for layer in arch.layers
            if has_form(layer)
        ]
        check(network(dataclasses.replace(arch, layers=tuple(full))), tmp_path / str(index))
