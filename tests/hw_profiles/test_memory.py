"""Peak memory, weights and states: predicted to the byte."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hw_profiles.memory import (
    MIB,
    TensorMemory,
    hollow_network,
    kept_tensors,
    measured_peak_mib,
    network_peak_bytes,
    peak_mib,
)
from hw_profiles.memory.blocks import arch_peak_bytes
from hw_profiles.memory.dry_run import DryRun
from hw_profiles.workload import decode, prefill
from searchspace.arch import Arch
from searchspace.cost import CostTable, arch_cost, state_bytes, weight_bytes
from searchspace.errors import UserError
from searchspace.family import Family
from searchspace.mixers.attention import causal_mask, key_age
from searchspace.precisions import PRECISIONS
from searchspace.space import SearchSpace
from searchspace.specs import FFNSpec, MixerSpec
from searchspace.subnet import Subnet
from searchspace.subnet import state_bytes as bytes_of_state

FACTS: dict[str, dict[str, Any]] = {
    "encoder": {"kind": "encoder", "num_classes": 5, "max_tokens": 64},
    "vit": {"kind": "vit", "num_classes": 10, "image_size": 12, "channels": 3},
}
REPOSITORY = Path(__file__).parents[2]


def load(preset: str) -> SearchSpace:
    kind = preset.split("-")[0]
    return SearchSpace.load(preset, 0 if kind == "vit" else 67, FACTS.get(kind))


def made(arch: Arch) -> Subnet:
    network = Subnet(arch).reset(torch.Generator().manual_seed(0)).pack()
    return network.eval().requires_grad_(False)


def uniform(**choices: Any) -> Arch:
    space = SearchSpace(
        name="toy",
        vocab_size=19,
        d_model=(32,),
        head_dim=16,
        num_layers=2,
        mixers={"softmax": {}},
        heads=((2, 1),),
        intermediate_size=(512,),
        ffn=("gelu",),
        norm=("layernorm",),
        ffn_precision=("fp32", "int4", "ternary"),
        family=Family(),
    )
    return space.uniform(**choices)


def test_tensor_memory_counts_what_is_alive() -> None:
    with TensorMemory() as memory:
        x = torch.zeros(1000, 25)
        y = x + 1
        view = y.view(-1)[10:]
        assert memory.live_bytes == 200_000
        del y
        assert memory.live_bytes == 200_000
        del view
        assert memory.live_bytes == 100_000
        x = (x * 2) * 3
        assert memory.live_bytes == 100_000
    assert memory.peak_bytes == 300_000


def test_what_was_there_before_counts_from_the_beginning() -> None:
    early, late = torch.zeros(100), torch.zeros(1000)
    with TensorMemory() as memory:
        (early + early).sum()
        late[:3].exp()
        assert [tensor.shape[0] for tensor in memory.found] == [100, 1000]
        assert memory.live_bytes == 4400
    assert memory.peak_bytes == 4400 + 400 + 4


@pytest.mark.parametrize(
    ("preset", "num"),
    [
        ("decoder-small", 2),
        ("decoder-attention", 2),
        ("decoder-numerics", 3),
        ("decoder-operators", 5),
        ("encoder-operators", 5),
        ("encoder-small", 2),
        ("nas-bench-bert", 2),
        ("vit-small", 2),
    ],
)
def test_the_predicted_peak_is_that_of_a_run(preset: str, num: int) -> None:
    rng, space = np.random.default_rng(5), load(preset)
    workloads = (
        [prefill(3, 37)] if space.family.kind != "decoder" else [prefill(1, 37), decode(2, 37)]
    )
    for _ in range(num):
        arch = space.sample(rng)
        network = made(arch)
        for workload in workloads:
            composed = arch_peak_bytes(arch, workload)
            assert composed == measured_peak_mib(network, workload) * MIB
            assert composed == network_peak_bytes(hollow_network(arch), workload, hollow=True)
            assert composed == peak_mib(network, workload) * MIB == peak_mib(arch, workload) * MIB


@pytest.mark.parametrize(
    "options",
    [{}, {"softmax.vo": "identity"}, {"softmax.qk": "collapsed"}, {"mixer": "sliding_window"}],
)
def test_keys_that_layers_share_outlive_their_layer(options: dict[str, Any]) -> None:
    arch = load("decoder-attention").uniform(kv_shared=True, **options)
    shared = [layer.kv_shared for layer in arch.layers]
    assert shared == ([False] + [True] * 5 if options.get("mixer") is None else [False] * 6)
    network = made(arch)
    for workload in (prefill(1, 70), decode(1, 70)):
        assert arch_peak_bytes(arch, workload) == measured_peak_mib(network, workload) * MIB


def test_the_peak_of_a_small_network_is_what_one_counts_by_hand() -> None:
    arch = uniform(intermediate_size=512)
    weights = int(arch_cost(arch, weight_bytes))
    batch, tokens = 4, 11
    rows = 4 * batch * tokens
    table = 2 * 64 * 16 * 4 if arch.layers[0].position == "rope" else 0
    # The residual stream, keys and values that a later layer might share, the norm's result, and
    # before and after the activation.
    expected = weights + 8 * batch * tokens + rows * (32 + 2 * 16 + 32 + 512 + 512) + table
    assert arch_peak_bytes(arch, prefill(batch, tokens)) == expected


def test_more_tokens_a_longer_state_and_packing_show() -> None:
    network = made(uniform())
    weights = network.weight_bytes()
    short, longer = (peak_mib(network, prefill(1, tokens)) * MIB for tokens in (12, 48))
    assert short >= weights + 12 * 8 + 12 * 19 * 4
    assert longer - short >= 36 * 4 * (19 + 32)
    state = bytes_of_state(network.init_state(1, 301))
    assert peak_mib(network, decode(1, 300)) * MIB >= weights + state
    int4 = uniform(ffn_precision="int4")
    assert peak_mib(made(int4), prefill(1, 48)) * MIB < longer
    unpacked = Subnet(int4).reset(torch.Generator().manual_seed(0)).eval()
    assert peak_mib(unpacked, prefill(1, 12)) == measured_peak_mib(unpacked, prefill(1, 12))


@pytest.mark.parametrize("precision", ["int4", "ternary"])
def test_what_kernels_keep_is_held(precision: str) -> None:
    network = made(uniform(ffn_precision=precision))
    assert kept_tensors(network) == []
    peak = peak_mib(network, decode(1, 4)) * MIB
    kept = sum(t.numel() * t.element_size() for t in kept_tensors(network))
    assert kept >= 2 * 2 * 512 * 32 // 2
    stored = network.weight_bytes() + bytes_of_state(network.init_state(1, 5))
    assert peak >= stored + kept
    assert peak == arch_peak_bytes(network.arch, decode(1, 4))


def test_nothing_that_is_kept_is_spoilt_by_a_prediction() -> None:
    arch = uniform(ffn_precision="int4")
    network, untouched = made(arch), made(arch)
    peak_mib(arch, prefill(1, 23))
    peak_mib(network, prefill(1, 23))
    peak_mib(network, decode(1, 23))
    tokens = torch.randint(19, (1, 23), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert torch.equal(network(tokens), untouched(tokens))
        assert torch.equal(network(tokens[:, :1]), untouched(tokens[:, :1]))
    age = key_age(0, 23, 23, torch.device("cpu"))
    x = torch.ones(2, 3)
    with DryRun([x]):
        mask = causal_mask(0, 23, 23, torch.device("cpu"))
        x.add_(1.0)
        x.view(-1)[:2].zero_()
        out = (x @ x.t()).relu()
    assert torch.equal(mask, age >= 0)
    assert torch.equal(x, torch.ones(2, 3))
    assert out.shape == (2, 2)


def test_what_is_written_from_hollow_tensors_is_hollow() -> None:
    x, buffer = torch.full((3,), 7.0), torch.zeros(5)
    dry = DryRun([x])
    with dry:
        buffer[1:4] = x
        assert not dry.is_hollow(torch.zeros(2) + 1)
        assert dry.is_hollow(buffer[:1] * 2)
    assert torch.equal(buffer, torch.zeros(5))


def test_shapes_that_depend_on_values_are_refused() -> None:
    x = torch.ones(3)
    with DryRun([x]), pytest.raises(UserError, match=r"nonzero.* needs values"):
        x.nonzero()


def checkpoint_bytes(network: Subnet, folder: Path) -> int:
    network.save(folder)
    content = (folder / "model.safetensors").read_bytes()
    return len(content) - 8 - int.from_bytes(content[:8], "little")


@pytest.mark.parametrize(
    "preset", ["decoder-numerics", "decoder-small", "encoder-small", "vit-small"]
)
def test_weight_bytes_are_those_of_the_file(preset: str, tmp_path: Path) -> None:
    rng, space = np.random.default_rng(2), load(preset)
    seen = set()
    for _ in range(16 if preset == "decoder-numerics" else 3):
        arch = space.sample(rng)
        network = made(arch)
        real = checkpoint_bytes(network, tmp_path)
        assert real == arch_cost(arch, weight_bytes) == network.weight_bytes()
        assert real == Subnet(arch).weight_bytes()
        seen |= {spec.precision for _, spec in arch.named_sub_blocks()}  # type: ignore[union-attr]
    assert preset != "decoder-numerics" or seen == set(PRECISIONS)


@pytest.mark.parametrize("preset", ["decoder-small", "decoder-operators", "decoder-attention"])
def test_state_bytes_are_those_of_the_state(preset: str) -> None:
    space = load(preset)
    genotypes = space.sample_genotypes(np.random.default_rng(4), 14)
    for batch, tokens in ((1, 33), (3, 90)):
        cost = partial(state_bytes, batch=batch, max_tokens=tokens)
        for row, priced in zip(genotypes, CostTable(space, cost).of(genotypes), strict=True):
            arch = space.decode(row)
            network = made(arch)
            state = network.init_state(batch, tokens)
            assert bytes_of_state(state) == priced == arch_cost(arch, cost)
            with torch.inference_mode():
                network(torch.zeros(batch, 7, dtype=torch.long), state)
                network(torch.zeros(batch, 1, dtype=torch.long), state)
            assert bytes_of_state(state) == priced


def test_layers_without_a_state_of_their_own_hold_nothing() -> None:
    spec = MixerSpec(32, "softmax", 2, 2, 16, kv_shared=True)
    assert state_bytes(spec, 1, 100) == 0
    assert state_bytes(FFNSpec(32, "gelu", 64), 1, 100) == 0
    with pytest.raises(UserError, match="bidirectional has no state"):
        state_bytes(MixerSpec(32, "softmax", 2, 2, 16, causal=False), 1, 100)


def test_a_longer_context_costs_its_state() -> None:
    arch = uniform()
    small, large = (arch_peak_bytes(arch, decode(2, context)) for context in (9, 90))
    long, short = (
        arch_cost(arch, partial(state_bytes, batch=2, max_tokens=tokens)) for tokens in (91, 10)
    )
    assert large - small >= long - short > 0


@pytest.mark.skipif(
    sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="reads glibc's counters"
)
def test_the_process_grows_by_what_is_predicted() -> None:
    command = [sys.executable, "-m", "tests.benchmarks.memory", "--json", "--num", "1"]
    done = subprocess.run(
        [*command, "--presets", "decoder-small"],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env={"PYTHONPATH": ".:kernels", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for values in json.loads(done.stdout)["decoder-small"]["summary"].values():
        assert values["max_diff_bytes"] == 0
        assert values["heap_max_pct"] < 10


def test_inference_mode_changes_no_prediction() -> None:
    arch, workload = load("encoder-small").largest(), prefill(2, 41)
    with torch.inference_mode():
        network = made(arch)
        inside = arch_peak_bytes(arch, workload), measured_peak_mib(network, workload) * MIB
    assert inside == (measured_peak_mib(made(arch), workload) * MIB,) * 2
