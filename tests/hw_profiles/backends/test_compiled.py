from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import torch._inductor
from torch import Tensor, nn
from torch._inductor import config

from hw_profiles.backends import compiled
from hw_profiles.backends.base import UnsupportedError
from hw_profiles.backends.compiled import CompiledBackend
from hw_profiles.backends.compiled.graphs import capture
from hw_profiles.backends.eager import runner
from hw_profiles.targets import build_for_timing, sub_block_inputs
from hw_profiles.workload import Workload, decode, prefill
from searchspace.ends import example_inputs
from searchspace.errors import UserError
from searchspace.space import SearchSpace
from searchspace.specs import FFNSpec, MixerSpec
from searchspace.subnet import Subnet

PHASES = [prefill(2, 21), decode(2, 21)]
FP32_RMS, INT8_RMS = 1e-5, 1e-2
"""Largest differences; a rounding error can move an int8 activation to the next step."""
ATTENTION = MixerSpec(32, "softmax", 4, 2, 8, position="rope")
FFN = FFNSpec(32, "swiglu", 48)


def mixer(name: str, precision: str = "fp32", **fields: Any) -> MixerSpec:
    return MixerSpec(32, name, 4, 2, 8, precision=precision, **fields)


COMPILED_SPECS = [
    *(mixer("softmax", precision, position="rope") for precision in ("fp32", "int8")),
    *(mixer(name, precision) for name in ("linear_elu", "gla") for precision in ("fp32", "int8")),
    *(FFNSpec(32, "swiglu", 48, precision=precision) for precision in ("fp32", "int8")),
]
CAPTURED_SPECS = [
    *COMPILED_SPECS,
    *(FFNSpec(32, "gelu", 48, precision=precision) for precision in ("int4", "ternary", "bf16")),
    mixer("softmax", kv_shared=True),
    mixer("sliding_window"),
    mixer("softmax", options=(("qkv_dconv", 3),)),
    FFNSpec(32, "rwkv_channelmix", 48),
]


@dataclass
class FakeCompiler:
    """Runs graphs as they are, and notes what it was told."""

    settings: list[dict[str, Any]] = field(default_factory=list)

    def __call__(self, graph: Any, arguments: list[Tensor]) -> Callable[..., Any]:
        self.settings.append(
            {"freezing": config.freezing, "threads": config.cpp.threads}
            | {"workers": config.compile_threads, "gradients": torch.is_grad_enabled()}
        )
        return graph


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> FakeCompiler:
    fake = FakeCompiler()
    monkeypatch.setattr(torch._inductor, "compile", fake)
    return fake


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def make(spec: MixerSpec | FFNSpec, workload: Workload, seed: int = 0) -> tuple[nn.Module, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return build_for_timing(spec, generator), sub_block_inputs(spec, workload, generator)


def make_network(generator: torch.Generator) -> Subnet:
    space = SearchSpace(
        name="toy",
        vocab_size=40,
        d_model=(32,),
        head_dim=8,
        num_layers=2,
        mixers={"softmax": {}, "gla": {}},
        heads=((4, 2),),
        intermediate_size=(48,),
        mixer_precision=("fp32", "int8"),
        ffn=("swiglu",),
    )
    rng = np.random.default_rng(0)
    archs = (space.sample(rng) for _ in range(200))
    arch = next(arch for arch in archs if {"softmax", "gla"} <= set(names_of_mixers(arch)))
    return Subnet(arch).reset(generator).pack().eval()


def names_of_mixers(arch: Any) -> list[str]:
    return [spec.mixer for spec in arch.sub_blocks() if isinstance(spec, MixerSpec)]


def require_equal(actual: object, expected: object, bound: float) -> None:
    assert isinstance(actual, Tensor) and isinstance(expected, Tensor)
    assert actual.shape == expected.shape
    error = (actual.double() - expected.double()).square().mean().sqrt()
    assert error <= bound * expected.double().square().mean().sqrt()


def bound_of(spec: MixerSpec | FFNSpec) -> float:
    return FP32_RMS if spec.precision == "fp32" else INT8_RMS


@pytest.mark.parametrize("workload", PHASES, ids=lambda workload: workload.phase)
@pytest.mark.parametrize("spec", CAPTURED_SPECS, ids=lambda spec: spec.key)
@torch.no_grad()
def test_the_graph_computes_what_the_module_does(
    spec: MixerSpec | FFNSpec, workload: Workload, compiler: FakeCompiler
) -> None:
    module, inputs = make(spec, workload)
    expected = runner(copy.deepcopy(module), inputs, workload)()
    call = CompiledBackend().prepare(module, inputs, workload)
    with torch.inference_mode():
        first = call()
        require_equal(first, expected, bound_of(spec))
        # A recurrent state that went on, or a cache that grew, would show here.
        assert all(torch.equal(call(), first) for _ in range(3))


@torch.no_grad()
def test_a_step_starts_from_as_many_tokens_as_the_workload_says(compiler: FakeCompiler) -> None:
    module, inputs = make(ATTENTION, decode(2, 9))
    results = [
        CompiledBackend().prepare(module, inputs, decode(2, context))() for context in (9, 10)
    ]
    for result, context in zip(results, (9, 10), strict=True):
        require_equal(result, runner(module, inputs, decode(2, context))(), FP32_RMS)
    with pytest.raises(AssertionError):
        require_equal(results[0], results[1], FP32_RMS)


@pytest.mark.parametrize("workload", PHASES, ids=lambda workload: workload.phase)
@torch.no_grad()
def test_a_whole_network_is_one_graph(
    workload: Workload, compiler: FakeCompiler, generator: torch.Generator
) -> None:
    network = make_network(generator)
    ids = example_inputs(network.arch.ends, workload.batch, workload.new_tokens, generator)
    expected = runner(copy.deepcopy(network), ids, workload)()
    call = CompiledBackend().prepare(network, ids, workload)
    first = call()
    require_equal(first, expected, INT8_RMS)
    assert torch.equal(call(), first)  # type: ignore[arg-type]
    assert len(compiler.settings) == 1


@torch.no_grad()
def test_the_module_is_not_changed(compiler: FakeCompiler) -> None:
    module, inputs = make(mixer("gla", "int8"), PHASES[1])
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    given = inputs.clone()
    CompiledBackend().prepare(module, inputs, PHASES[1])()
    assert torch.equal(inputs, given)
    after = module.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4", "ternary", "bf16", "int8_weight"])
@pytest.mark.parametrize("workload", PHASES, ids=lambda workload: workload.phase)
def test_only_low_bit_weights_are_inputs(precision: str, workload: Workload) -> None:
    module, inputs = make(FFNSpec(32, "gelu", 48, precision=precision), workload)
    graph, arguments = capture(module, inputs, workload)
    assert arguments[0] is inputs
    low_bit = [tensor for tensor in arguments[1:] if tensor.dim() >= 2]
    assert len(low_bit) == len(arguments) - 1
    assert bool(low_bit) == (precision != "fp32")
    constants = {node.target for node in graph.graph.nodes if node.op == "get_attr"}
    for name, parameter in module.named_parameters():
        assert (f"module.{name}" in constants) == (parameter.dtype == torch.float32)


def test_weights_are_frozen_for_the_present_threads(compiler: FakeCompiler) -> None:
    module, inputs = make(FFN, PHASES[0])
    before = config.freezing, config.cpp.threads, config.compile_threads
    with torch.inference_mode():
        CompiledBackend().prepare(module, inputs, PHASES[0])
    (told,) = compiler.settings
    assert told == {
        "freezing": True,
        "threads": torch.get_num_threads(),
        "workers": 1,
        "gradients": False,
    }
    assert (config.freezing, config.cpp.threads, config.compile_threads) == before


def test_what_cannot_be_traced_is_named_with_the_first_line_of_the_reason(
    compiler: FakeCompiler, capsys: pytest.CaptureFixture[str]
) -> None:
    class Branching(nn.Module):
        def forward(self, x_BTD: Tensor) -> Tensor:
            return x_BTD if x_BTD.sum() > 0 else -x_BTD

    inputs = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    with pytest.raises(UnsupportedError, match=r"^Branching cannot be compiled \(\w+: ") as error:
        CompiledBackend().prepare(Branching(), inputs, prefill(2, 3))
    assert "\n" not in str(error.value)
    assert "data-dependent" in str(error.value)
    assert "use the backend 'eager'" in str(error.value)
    assert not compiler.settings
    assert not capsys.readouterr().err


def test_a_failing_compiler_is_reported_with_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(graph: object, arguments: object) -> None:
        raise RuntimeError("C++ compile error\ng++ -O3 and pages more")

    monkeypatch.setattr(torch._inductor, "compile", fail)
    module, inputs = make(FFN, PHASES[0])
    with pytest.raises(UnsupportedError) as error:
        CompiledBackend().prepare(module, inputs, PHASES[0])
    assert str(error.value).startswith(f"{FFN.key} cannot be compiled (RuntimeError: C++ compile")
    assert "pages more" not in str(error.value)


def test_a_mistake_of_the_user_stays_one(compiler: FakeCompiler) -> None:
    spec = MixerSpec(32, "linformer", 4, 2, 8, causal=False, max_tokens=16)
    module, inputs = make(spec, prefill(1, 17))
    with pytest.raises(UserError) as error:
        CompiledBackend().prepare(module, inputs, prefill(1, 17))
    assert not isinstance(error.value, UnsupportedError)


def test_a_machine_without_compiler_or_headers_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_compiler", lambda: "g++ 12.2.0")
    assert CompiledBackend().version() == "inductor, g++ 12.2.0, freezing"
    monkeypatch.setattr(compiled.sysconfig, "get_paths", lambda: {"include": "/nowhere"})
    assert "install python3-dev" in CompiledBackend().unavailable()
    monkeypatch.setattr(compiled, "_compiler", lambda: "")
    assert "install g++" in CompiledBackend().unavailable()


def test_a_compiler_that_does_not_run_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config.cpp, "cxx", ("no-such-compiler",))
    with fresh_compiler_check():
        assert compiled._compiler() == ""


@contextlib.contextmanager
def fresh_compiler_check() -> Any:
    from torch._inductor import cpp_builder

    cached = [compiled._compiler, cpp_builder.cpp_compiler_search]
    for function in cached:
        function.cache_clear()
    try:
        yield
    finally:
        for function in cached:
            function.cache_clear()


def test_long_compilation_is_said_once(
    compiler: FakeCompiler, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compiled, "MANY_MODULES", 2)
    module, inputs = make(FFN, PHASES[0])
    backend = CompiledBackend()
    with caplog.at_level(logging.WARNING, logger=compiled.__name__):
        for _ in range(4):
            backend.prepare(module, inputs, PHASES[0])
    (record,) = [record for record in caplog.records if record.name == compiled.__name__]
    assert record.getMessage().startswith("compiling 2 modules took ")


def forbid_eager(module: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every module of a network raise when it is called."""

    def forward(*args: object, **kwargs: object) -> None:
        raise AssertionError("ran eagerly")

    for part in module.modules():
        monkeypatch.setattr(part, "forward", forward)


@pytest.mark.slow
@pytest.mark.parametrize("workload", PHASES, ids=lambda workload: workload.phase)
@pytest.mark.parametrize("spec", COMPILED_SPECS, ids=lambda spec: spec.key)
@torch.no_grad()
def test_compiled_equals_eager(
    spec: MixerSpec | FFNSpec, workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, inputs = make(spec, workload)
    expected = runner(copy.deepcopy(module), inputs, workload)()
    call = CompiledBackend().prepare(module, inputs, workload)
    forbid_eager(module, monkeypatch)
    with torch.inference_mode():
        first = call()
        require_equal(first, expected, bound_of(spec))
        assert all(torch.equal(call(), first) for _ in range(3))


@pytest.mark.slow
@pytest.mark.parametrize("workload", PHASES, ids=lambda workload: workload.phase)
@torch.no_grad()
def test_a_compiled_network_equals_eager(
    workload: Workload, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = make_network(generator)
    ids = example_inputs(network.arch.ends, workload.batch, workload.new_tokens, generator)
    expected = runner(copy.deepcopy(network), ids, workload)()
    call = CompiledBackend().prepare(network, ids, workload)
    forbid_eager(network, monkeypatch)
    first = call()
    require_equal(first, expected, INT8_RMS)
    assert torch.equal(call(), first)  # type: ignore[arg-type]


@pytest.mark.slow
@torch.no_grad()
def test_more_modules_of_a_class_than_dynamo_keeps_are_all_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backend, workload = CompiledBackend(), prefill(1, 8)
    made = [make(FFNSpec(16, "gelu", 16 + 8 * index), workload, index) for index in range(12)]
    expected = [runner(copy.deepcopy(module), inputs, workload)() for module, inputs in made]
    calls = [backend.prepare(module, inputs, workload) for module, inputs in made]
    for module, _ in made:
        forbid_eager(module, monkeypatch)
    for call, wanted in zip(calls, expected, strict=True):
        require_equal(call(), wanted, FP32_RMS)


@pytest.mark.slow
@torch.no_grad()
def test_int8_runs_no_reference_kernel_at_one_token() -> None:
    """oneDNN's product of int8 and int8 with a scalar scale takes a hundred times as long."""
    module, inputs = make(FFNSpec(192, "swiglu", 512, precision="int8"), decode(1, 8))
    call = CompiledBackend().prepare(module, inputs, decode(1, 8))
    with torch.profiler.profile() as profile:
        call()
    names = {event.key for event in profile.key_averages()}
    assert "aten::_int_mm" in names
    assert not any("qlinear" in name for name in names)
