"""Encoders, ViTs, and sub-blocks that depend on what stands around them in a network."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hw_profiles import subnets
from hw_profiles.backends.eager import runner
from hw_profiles.memory import MIB, peak_mib
from hw_profiles.profiler import calibration, filling, profile
from hw_profiles.subnets import measure_subnets
from hw_profiles.targets import build_for_timing, sub_block_inputs
from hw_profiles.workload import Workload, decode, prefill
from searchspace.arch import LayerArch, mixer_spec
from searchspace.errors import UserError
from searchspace.family import Family
from searchspace.mixers import MIXERS
from searchspace.space import SearchSpace
from searchspace.specs import EndsSpec, MixerSpec
from searchspace.subnet import Subnet, state_bytes

pytestmark = pytest.mark.usefixtures("undisturbed", "one_thread")

CAUSAL = [name for name, mixer in MIXERS.items() if "causal" in mixer.directions]
FIXED_STATE = [name for name in CAUSAL if MIXERS[name].fixed_state]
VIT = Family(
    kind="vit",
    num_classes=5,
    pooling="class_token",
    embedding_position="learned",
    image_size=6,
    channels=3,
    patch_size=2,
    final_norm="layernorm",
)
ENCODER = Family(kind="encoder", num_classes=3, embedding_position="learned", max_tokens=11)
FAMILIES = {"vit": VIT, "encoder": ENCODER}


def space_of(family: Family, **changes: Any) -> SearchSpace:
    return SearchSpace(
        **{
            "name": "toy",
            "vocab_size": 0 if family.kind == "vit" else 19,
            "d_model": (16,),
            "head_dim": 8,
            "num_layers": 2,
            "mixers": {"softmax": {}, "pool": {}, "none": {}},
            "heads": ((2, 1),),
            "intermediate_size": (24, 0),
            "ffn": ("gelu",),
            "norm": ("layernorm", "prepbn"),
            "family": family,
            **changes,
        }
    )


def network(space: SearchSpace, **choices: Any) -> Subnet:
    arch = space.uniform(**choices)
    return Subnet(arch).reset(torch.Generator().manual_seed(0)).pack().eval()


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filling, "ROUNDS", 2)
    monkeypatch.setattr(filling, "PASS_ROUNDS", 2)
    monkeypatch.setattr(filling, "SAMPLE_MS", 0.05)
    monkeypatch.setattr(calibration, "DEFAULT_NETWORKS", 4)
    monkeypatch.setattr(calibration, "ROUNDS", 2)
    monkeypatch.setattr(subnets, "SUBNET_ROUNDS", 2)


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_sub_block_of_a_family_is_profiled(kind: str, tmp_path: Path) -> None:
    space = space_of(FAMILIES[kind])
    workload = prefill(1, FAMILIES[kind].max_tokens)
    table = profile(space, [workload], tmp_path / "table.json")
    assert set(table.entries) == {(workload.name, spec.key) for spec in space.sub_blocks()}
    assert table.latency_ms(space.largest(), workload) > 0
    assert table.correction(workload).num_networks > 0


@pytest.mark.parametrize("kind", FAMILIES)
def test_whole_networks_of_a_family_are_timed(kind: str) -> None:
    space = space_of(FAMILIES[kind])
    workload = prefill(2, FAMILIES[kind].max_tokens)
    networks = {norm: network(space, norm=norm) for norm in space.norm}
    shapes = []
    for net in networks.values():
        net.register_forward_hook(lambda _, args, out: shapes.append((args[0].shape, out.shape)))
    timings = measure_subnets(networks, [workload], reference_us=100.0)
    assert all(timings[norm][workload.name].latency_us > 0 for norm in networks)
    inputs = (2, 3, 6, 6) if kind == "vit" else (2, 11)
    assert set(shapes) == {(torch.Size(inputs), torch.Size((2, FAMILIES[kind].num_classes)))}


@pytest.mark.parametrize("kind", FAMILIES)
def test_sub_blocks_of_a_family_get_its_inputs(kind: str) -> None:
    space = space_of(FAMILIES[kind])
    generator = torch.Generator().manual_seed(0)
    workload = prefill(2, space.family.max_tokens)
    for spec in space.sub_blocks():
        inputs = sub_block_inputs(spec, workload, generator)
        out = build_for_timing(spec, generator)(inputs)
        if isinstance(spec, EndsSpec):
            assert out.shape == (2, space.family.num_classes)
        else:
            assert inputs.shape == out.shape == (2, workload.tokens, 16)
            assert not isinstance(spec, MixerSpec) or not spec.causal


def test_peak_memory_of_a_vit_holds_weights_and_images() -> None:
    net = network(space_of(VIT))
    weights = sum(p.numel() * p.element_size() for p in net.parameters())
    image, tokens = 3 * 6 * 6 * 4, 10 * 16 * 4
    small, large = (peak_mib(net, prefill(batch, 9)) * MIB for batch in (1, 33))
    assert small >= weights + image + tokens
    assert large - small >= 32 * (image + tokens)
    assert peak_mib(net, prefill(1, 9)) * MIB == small


def shared_block() -> tuple[Any, MixerSpec]:
    layer = LayerArch(
        mixer="softmax", num_heads=4, num_kv_heads=2, position="rope", norm="rmsnorm",
        kv_shared=True,
    )  # fmt: skip
    spec = mixer_spec(layer, 16, 8, Family())
    return build_for_timing(spec, torch.Generator().manual_seed(0)), spec


@pytest.mark.parametrize("workload", [prefill(2, 13), decode(2, 13)])
def test_a_layer_with_shared_keys_attends_to_the_whole_context(workload: Workload) -> None:
    block, spec = shared_block()
    assert not hasattr(block.op, "k_proj")
    seen: list[tuple[int, ...]] = []
    attend = block.op.attend

    def watched(q: Tensor, k: Tensor, v: Tensor, start: int, visible: None) -> Tensor:
        seen.append((q.shape[2], k.shape[2], v.shape[2], k.shape[1], start))
        return attend(q, k, v, start, visible)

    block.op.attend = watched
    inputs = sub_block_inputs(spec, workload, torch.Generator().manual_seed(0))
    run = runner(block, inputs, workload)
    with torch.inference_mode():
        outs = [run() for _ in range(3)]
    keys = workload.max_tokens
    expected = (workload.new_tokens, keys, keys, 2, keys - workload.new_tokens)
    assert seen == [expected] * 3
    assert all(torch.equal(out, outs[0]) for out in outs)  # type: ignore[arg-type]


def test_networks_with_shared_keys_are_timed_and_hold_one_cache() -> None:
    space = space_of(Family(), mixers={"softmax": {}}, norm=("rmsnorm",), kv_shared=(True, False))
    nets = {"shared": network(space), "own": network(space, kv_shared=False)}
    workload = decode(1, 30)
    assert [layer.kv_shared for layer in nets["shared"].arch.layers] == [False, True]
    timings = measure_subnets(nets, [prefill(1, 30), workload], reference_us=100.0)
    assert all(len(by_workload) == 2 for by_workload in timings.values())
    sizes = {name: state_bytes(net.init_state(1, 31)) for name, net in nets.items()}
    assert sizes["own"] == 2 * sizes["shared"] == 2 * 2 * 31 * 8 * 4


@pytest.mark.parametrize("mixer", CAUSAL)
def test_decoding_stays_finite_and_at_its_context(mixer: str) -> None:
    heads = (4, 2 if MIXERS[mixer].heads == "grouped" else 4)
    layer = LayerArch(mixer, *heads, position="rope", norm="rmsnorm")
    spec = mixer_spec(layer, 16, 8, Family(max_tokens=41))
    block: Any = build_for_timing(spec, torch.Generator().manual_seed(0))
    states: dict[int, Any] = {}
    original = block.init_state

    def remembered(batch: int, max_tokens: int) -> Any:
        states[max_tokens] = original(batch, max_tokens)
        return states[max_tokens]

    block.init_state = remembered
    for context in (10, 40):
        inputs = sub_block_inputs(spec, decode(1, context), torch.Generator().manual_seed(0))
        run = runner(block, inputs, decode(1, context))
        with torch.inference_mode():
            for _ in range(20):
                out = run()
        assert isinstance(out, Tensor)
        assert bool(out.isfinite().all())
        assert states[context + 1].length == context + 1
    sizes = [state_bytes([state]) for state in states.values()]
    if mixer in FIXED_STATE:
        assert sizes[0] == sizes[1]


def test_learned_positions_are_timed_where_the_context_ends() -> None:
    family = Family(embedding_position="learned", max_tokens=9)
    space = space_of(family, mixers={"softmax": {}}, norm=("rmsnorm",), position=("nope",))
    net = network(space)
    starts = []
    embed = net.ends.embed

    def watched(inputs: Tensor, start: int = 0) -> Tensor:
        starts.append(start)
        return embed(inputs, start)

    net.ends.embed = watched  # type: ignore[method-assign]
    with torch.inference_mode():
        run = runner(net, torch.zeros(1, 1, dtype=torch.long), decode(1, 8))
        run(), run()
    assert starts == [8, 8]
    with torch.inference_mode(), pytest.raises(UserError, match="max_tokens=9"):
        runner(net, torch.zeros(1, 1, dtype=torch.long), decode(1, 9))()
    assert measure_subnets({"x": net}, [decode(1, 8), prefill(1, 9)], reference_us=100.0)


def test_folded_norms_leave_nothing_to_time() -> None:
    space = space_of(Family(), norm=("prepbn", "unified_norm", "rmsnorm"))
    for spec in space.sub_blocks():
        if isinstance(spec, EndsSpec) or getattr(spec, "mixer", "") == "pool":
            continue
        block = build_for_timing(spec, torch.Generator().manual_seed(0))
        identity = isinstance(block.norm, torch.nn.Identity)
        assert identity == (spec.norm != "rmsnorm")


def test_placements_are_measured_apart(tmp_path: Path) -> None:
    space = replace(space_of(Family()), norm=("rmsnorm",), norm_placement=("pre", "post", "peri"))
    table = profile(space, [prefill(1, 8)], tmp_path / "table.json")
    keys = {key for _, key in table.entries}
    assert keys == {spec.key for spec in space.sub_blocks()}
    for placement in ("post", "peri"):
        assert sum(key.endswith(f"/{placement}") for key in keys) == 3
