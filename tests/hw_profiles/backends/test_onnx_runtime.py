"""ONNX Runtime computes what PyTorch does, from the same state at every call."""

from __future__ import annotations

import gc
import importlib.util
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

import onnx  # noqa: E402

from hw_profiles.backends import UnsupportedError  # noqa: E402
from hw_profiles.backends.eager import runner  # noqa: E402
from hw_profiles.backends.onnx_runtime import OnnxRuntimeBackend, _bound_call  # noqa: E402
from hw_profiles.backends.onnx_runtime.export import Exported, export  # noqa: E402
from hw_profiles.workload import Workload, decode, prefill  # noqa: E402
from searchspace.arch import Arch  # noqa: E402
from searchspace.ends import example_inputs  # noqa: E402
from searchspace.family import Family  # noqa: E402
from searchspace.ffn import FFNS  # noqa: E402
from searchspace.mixers import MIXERS  # noqa: E402
from searchspace.packing import pack  # noqa: E402
from searchspace.precisions import PRECISIONS  # noqa: E402
from searchspace.space import SearchSpace  # noqa: E402
from searchspace.specs import FFNSpec, MixerSpec  # noqa: E402
from searchspace.subnet import Subnet  # noqa: E402
from searchspace.testing import operator_specs  # noqa: E402
from searchspace.testing.operator_checks import (  # noqa: E402
    Spec,
    is_causal,
    is_stateful,
    make_block,
)

pytestmark = pytest.mark.usefixtures("one_thread")

FP32_RMS, ROUNDED_RMS = 1e-5, 1e-2
SOFTMAX = MixerSpec(24, "softmax", num_heads=4, num_kv_heads=2, head_dim=8, position="rope")
WITHOUT_FORM = {"hyena", "fourier"}
"""Mixers with Fourier transforms."""


def packed_block(spec: Spec) -> Any:
    block = make_block(spec)
    pack(block)
    return block.eval().requires_grad_(False)


def inputs_of(spec: Spec, workload: Workload, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(workload.batch, workload.new_tokens, spec.d_model, generator=generator)


def rms(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.double(), expected.double()
    return float((actual - expected).square().mean().sqrt() / expected.square().mean().sqrt())


def bound_of(precision: str) -> float:
    return FP32_RMS if precision == "fp32" else ROUNDED_RMS


def run(module: nn.Module, inputs: Tensor, workload: Workload) -> Tensor:
    """Run twice, as timing does, and return the result."""
    call: Any = OnnxRuntimeBackend().prepare(module, inputs, workload)
    with torch.inference_mode():
        first, second = call().clone(), call()
    assert torch.equal(first, second)
    return first


@torch.inference_mode()
def check_block(spec: Spec, workload: Workload) -> None:
    block, x_BTD = packed_block(spec), inputs_of(spec, workload)
    expected = runner(block, x_BTD, workload)()
    assert isinstance(expected, Tensor)
    assert rms(run(block, x_BTD, workload), expected) < bound_of(spec.precision)


@pytest.mark.parametrize("name", [*MIXERS, *FFNS])
def test_every_operator_equals_eager(name: str) -> None:
    spec = next(operator_specs(name))
    if name in WITHOUT_FORM:
        with pytest.raises(UnsupportedError, match=f"{name}/.*_fft_r2c.*backend 'eager'"):
            check_block(spec, prefill(2, 19))
        return
    check_block(spec, prefill(2, 19))
    if is_causal(spec) and is_stateful(spec):
        check_block(spec, decode(2, 40))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("workload", [prefill(1, 37), decode(3, 9)], ids=lambda w: w.name)
@pytest.mark.parametrize("sizes", [(64, 96), (37, 51)])
def test_every_precision_equals_eager(
    precision: str, workload: Workload, sizes: tuple[int, int]
) -> None:
    check_block(FFNSpec(sizes[0], "swiglu", sizes[1], precision), workload)
    check_block(replace(SOFTMAX, d_model=sizes[0], precision=precision), workload)


@pytest.mark.parametrize(
    "spec",
    [
        replace(SOFTMAX, position="alibi"),
        replace(SOFTMAX, num_heads=3, num_kv_heads=1, placement="peri"),
        replace(SOFTMAX, causal=False, norm="layernorm"),
        replace(SOFTMAX, options=(("qkv_dconv", 3),)),
        replace(SOFTMAX, kv_shared=True),
        FFNSpec(24, "gelu", 17, norm="prepbn", placement="post"),
    ],
    ids=lambda spec: spec.key,
)
def test_forms_of_sub_blocks_equal_eager(spec: Spec) -> None:
    check_block(spec, prefill(2, 33))
    if is_causal(spec):
        check_block(spec, decode(2, 33))


def filled_state(block: Any, workload: Workload) -> Any:
    """Return a state that holds random numbers."""
    generator = torch.Generator().manual_seed(3)
    state = block.init_state(workload.batch, workload.max_tokens)
    for tensor in state.tensors().values():
        tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    state.length = workload.tokens
    return state


@pytest.mark.parametrize("mixer", ["softmax", "sliding_window", "linear_elu", "gla", "mamba"])
@torch.inference_mode()
def test_a_decode_step_reads_and_updates_the_state(mixer: str) -> None:
    spec, workload = next(operator_specs(mixer)), decode(2, 40)
    assert isinstance(spec, MixerSpec)
    block, x_BTD = packed_block(spec), inputs_of(spec, workload)
    state = filled_state(block, workload)
    exported = export(block, x_BTD, workload)
    held = list(exported.inputs.values())[1:]
    for tensor, start in zip(held, state.tensors().values(), strict=True):
        tensor.copy_(start)
    expected = block(x_BTD, state)
    call: Any = _bound_call(exported)
    call(), call()
    actual = list(exported.outputs.values())
    after = [expected, *state.tensors().values()]
    assert len(actual) == len(after)
    assert max(map(rms, actual, after)) < FP32_RMS


@torch.inference_mode()
def test_caches_are_written_in_place() -> None:
    workload = decode(1, 12)
    block = packed_block(SOFTMAX)
    exported = export(block, inputs_of(SOFTMAX, workload), workload)
    caches = list(exported.inputs.values())[1:]
    assert [t.data_ptr() for t in list(exported.outputs.values())[1:]] == [
        cache.data_ptr() for cache in caches
    ]
    _bound_call(exported)()
    for cache_BGSK in caches:
        assert not bool(cache_BGSK[:, :, :12].any())
        assert bool(cache_BGSK[:, :, 12].any())


def space_of(family: Family, **changes: Any) -> SearchSpace:
    return SearchSpace(
        **{
            "name": "toy",
            "vocab_size": 0 if family.kind == "vit" else 19,
            "d_model": (32,),
            "head_dim": 8,
            "num_layers": 3,
            "mixers": {"softmax": {}, "pool": {}},
            "heads": ((4, 2),),
            "intermediate_size": (48,),
            "ffn": ("swiglu",),
            "norm": ("rmsnorm",),
            "mixer_precision": ("fp32", "int8"),
            "ffn_precision": ("fp32", "int4"),
            "family": family,
            **changes,
        }
    )


def network(arch: Arch) -> Subnet:
    net = Subnet(arch).reset(torch.Generator().manual_seed(0)).pack().eval()
    return net.requires_grad_(False)


NETWORKS = {
    "decoder": (space_of(Family(), position=("rope",)), prefill(2, 21)),
    "learned": (
        space_of(Family(embedding_position="learned", max_tokens=30)),
        decode(2, 21),
    ),
    "shared": (space_of(Family(), mixers={"softmax": {}}, kv_shared=(True, False)), decode(1, 9)),
    "encoder": (
        space_of(
            Family(
                kind="encoder",
                num_classes=3,
                embedding_position="learned",
                max_tokens=21,
                pad_token=0,
            )
        ),
        prefill(3, 21),
    ),
    "vit": (
        space_of(
            Family(
                kind="vit",
                num_classes=5,
                pooling="class_token",
                embedding_position="learned",
                image_size=6,
                channels=3,
                patch_size=2,
                final_norm="layernorm",
            )
        ),
        prefill(2, 9),
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
@torch.inference_mode()
def test_whole_networks_equal_eager(name: str) -> None:
    space, workload = NETWORKS[name]
    generator = torch.Generator().manual_seed(1)
    choices = {"mixer": "softmax"} | ({"kv_shared": True} if name == "shared" else {})
    for precision in (("fp32", "fp32"), ("int8", "int4")):
        chosen = dict(zip(("mixer_precision", "ffn_precision"), precision, strict=True))
        net = network(space.uniform(**choices, **chosen))
        inputs = example_inputs(net.arch.ends, workload.batch, workload.new_tokens, generator)
        actual, expected = run(net, inputs, workload), runner(net, inputs, workload)()
        assert isinstance(expected, Tensor)
        assert rms(actual, expected) < (FP32_RMS if precision[0] == "fp32" else 5 * ROUNDED_RMS)


def operators_of(exported: Exported) -> list[str]:
    return [node.op_type for node in onnx.load_from_string(exported.model).graph.node]


def test_quantised_maps_use_the_operators_made_for_them() -> None:
    workload = prefill(1, 40)
    wanted = {
        "int8": ("QuantizeLinear", "MatMulIntegerToFloat"),
        "ternary": ("QuantizeLinear", "MatMulIntegerToFloat"),
        "int4": ("MatMulNBits",),
        "int8_weight": ("MatMulNBits",),
    }
    for precision, kinds in wanted.items():
        spec = FFNSpec(32, "swiglu", 64, precision)
        found = operators_of(export(packed_block(spec), inputs_of(spec, workload), workload))
        # Gate and up projection read the same rounded input.
        assert [found.count(kind) for kind in kinds] == ([2, 3] if len(kinds) == 2 else [3])
        assert not {"Round", "Cast", "MatMulInteger"} & set(found)


def test_the_module_stays_as_it_was_and_may_be_freed() -> None:
    block: Any = packed_block(FFNSpec(32, "gelu", 64, "ternary"))
    x_BTD, workload = inputs_of(block.spec, prefill(1, 8)), prefill(1, 8)
    before = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    kinds = [type(module) for module in block.modules()]
    call: Any = OnnxRuntimeBackend().prepare(block, x_BTD, workload)
    assert [type(module) for module in block.modules()] == kinds
    assert all(torch.equal(before[name], t) for name, t in block.state_dict().items())
    assert all(linear._runtime == {} for linear in block.op.children())
    assert not torch.compiler.is_compiling()
    expected = block(x_BTD)
    del block
    gc.collect()
    assert rms(call(), expected) < ROUNDED_RMS


def test_nothing_of_a_recording_is_kept() -> None:
    spec = replace(SOFTMAX, position="alibi", options=())
    block, workload = packed_block(spec), prefill(1, 53)
    x_BTD = inputs_of(spec, workload)
    run(block, x_BTD, workload)
    block.requires_grad_(True)
    block(x_BTD).sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in block.parameters())


def test_sessions_have_as_many_threads_as_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    original = onnxruntime.InferenceSession

    def session(model: bytes, options: Any, **others: Any) -> Any:
        made.append(options)
        return original(model, options, **others)

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    OnnxRuntimeBackend().sentinel()
    assert made[0].intra_op_num_threads == torch.get_num_threads() == 1
    assert made[0].get_session_config_entry("session.set_denormal_as_zero") == "1"


def test_the_sentinel_is_a_matrix_product() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, 512, 512, generator=generator)
    out = OnnxRuntimeBackend().sentinel()()
    assert isinstance(out, Tensor)
    assert rms(out, left.double() @ right.double()) < FP32_RMS


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = OnnxRuntimeBackend()
    assert backend.unavailable() == ""
    assert onnxruntime.__version__ in backend.version()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert backend.unavailable() == "install onnx and onnxruntime"
