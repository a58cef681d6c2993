from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from hw_profiles import calibration, profiler, subnets
from hw_profiles.backends.eager import runner
from hw_profiles.calibration import calibration_archs, raw_sum_us
from hw_profiles.latency_table import INTERPOLATED, LatencyTable
from hw_profiles.memory import MIB, TensorMemory
from hw_profiles.profiler import measure_subnets, peak_mib, profile, without_inner_widths
from hw_profiles.targets import build_for_timing, sub_block_inputs
from hw_profiles.workload import decode, prefill
from searchspace.errors import UserError
from searchspace.space import SearchSpace
from searchspace.specs import FFNSpec
from searchspace.subnet import Subnet, state_bytes

WORKLOADS = (prefill(1, 12), decode(2, 12))
pytestmark = pytest.mark.usefixtures("undisturbed", "one_thread")


@pytest.fixture
def space() -> SearchSpace:
    return SearchSpace(
        name="toy",
        vocab_size=32,
        d_model=(16,),
        head_dim=8,
        num_layers=2,
        mixers={"softmax": {}, "gla": {}, "none": {}},
        heads=((2, 1),),
        intermediate_size=(64, 48, 32, 16),
        mixer_precision=("fp32", "int8"),
        ffn=("gelu",),
    )


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiler, "ROUNDS", 3)
    monkeypatch.setattr(profiler, "GROUP_SIZE", 4)
    monkeypatch.setattr(calibration, "CALIBRATION_POOL", 64)
    monkeypatch.setattr(subnets, "SUBNET_ROUNDS", 2)


def test_every_reachable_sub_block_is_measured(space: SearchSpace, tmp_path: Path) -> None:
    path, seen = tmp_path / "table.json", []
    table = profile(space, WORKLOADS, path, progress=lambda done, text: seen.append(done))
    keys = {(item.name, spec.key) for item in WORKLOADS for spec in space.sub_blocks()}
    assert set(table.entries) == keys
    for entry in table.entries.values():
        assert 0 < entry.latency_us < math.inf
        assert entry.num_samples >= 2
    names = {key: entry.implementation for (_, key), entry in table.entries.items()}
    assert names[space.largest().sub_blocks()[0].key] == "SoftmaxAttention"
    assert names[space.largest().ends.key] == "Ends"
    assert seen == sorted(seen)
    assert seen[-1] == 1.0
    for workload in WORKLOADS:
        fit = table.correction(workload)
        assert fit.num_networks == 24
        assert math.isfinite(fit.mape)
        assert table.latency_ms(space.largest(), workload) > 0
    assert LatencyTable.load(path).entries == table.entries


def test_a_finished_table_is_not_measured_again(
    space: SearchSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "table.json"
    first = profile(space, WORKLOADS, path)
    text = path.read_text()

    def never(*_: object, **__: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(profiler, "time_interleaved", never)
    monkeypatch.setattr(profiler, "calibrate", never)
    again = profile(space, WORKLOADS, path)
    assert again.entries == first.entries
    assert path.read_text() == text


def test_an_interrupted_profile_goes_on(space: SearchSpace, tmp_path: Path) -> None:
    path = tmp_path / "table.json"

    def interrupt(done: float, text: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        profile(space, WORKLOADS, path, progress=interrupt)
    partial = LatencyTable.load(path)
    assert len(partial.entries) == profiler.GROUP_SIZE * len(WORKLOADS)
    assert not partial.corrections
    table = profile(space, WORKLOADS, path)
    assert len(table.entries) == len(space.sub_blocks()) * len(WORKLOADS)
    assert partial.entries.items() <= table.entries.items()
    assert table.sentinel_us == partial.sentinel_us


def test_another_workload_is_added_to_a_table(space: SearchSpace, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    first = profile(space, WORKLOADS[:1], path)
    both = profile(space, WORKLOADS[1:], path)
    assert both.workloads == WORKLOADS
    assert first.entries.items() <= both.entries.items()
    assert set(both.corrections) == {item.name for item in WORKLOADS}
    assert both.correction(WORKLOADS[0]) == first.correction(WORKLOADS[0])


def test_a_table_of_another_device_is_refused_untouched(space: SearchSpace, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    table = profile(space, WORKLOADS[:1], path)
    table.device = replace(table.device, cpu="Another processor")
    table.save(path)
    text = path.read_text()
    with pytest.raises(UserError, match=r"Another processor.*nas profile"):
        profile(space, WORKLOADS, path)
    assert path.read_text() == text


def test_too_short_a_budget_interpolates_inner_widths_and_says_so(
    space: SearchSpace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("WARNING"):
        table = profile(space, WORKLOADS[:1], tmp_path / "t.json", time_budget_s=1e-6)
    assert "interpolated" in caplog.text
    specs = space.sub_blocks()
    measured = {key for _, key in table.entries}
    essential = {spec.key for spec in without_inner_widths(specs)}
    assert essential <= measured
    inner = [spec for spec in specs if spec.key not in measured]
    assert inner
    assert all(isinstance(spec, FFNSpec) for spec in inner)
    assert table.entry(WORKLOADS[0], inner[0].key).source == INTERPOLATED
    genotypes = space.sample_genotypes(np.random.default_rng(0), 20)
    assert all(table.latency_ms(space.decode(row), WORKLOADS[0]) > 0 for row in genotypes)


def test_a_busy_machine_is_said(
    space: SearchSpace,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(profiler, "TOLERATED_MAPE", math.inf)
    with caplog.at_level("WARNING"):
        profile(space, WORKLOADS[:1], tmp_path / "quiet.json")
    assert "busy" not in caplog.text
    monkeypatch.setattr(profiler, "TOLERATED_MAPE", 0.0)
    with caplog.at_level("WARNING"):
        profile(space, WORKLOADS[:1], tmp_path / "busy.json")
    assert "prefill_b1_t12" in caplog.text
    assert "the machine was busy" in caplog.text


def test_widths_that_are_kept(space: SearchSpace) -> None:
    kept = [
        s.intermediate_size
        for s in without_inner_widths(space.sub_blocks())
        if isinstance(s, FFNSpec)
    ]
    assert kept == [64, 48, 16]


def test_widths_are_kept_for_every_placement() -> None:
    widths = {"pre": (128, 96, 64, 32, 16), "post": (80, 48), "peri": (72, 56, 40, 24)}
    specs = [
        FFNSpec(16, "gelu", width, placement=placement)
        for placement, some in widths.items()
        for width in some
    ]
    kept = [(s.placement, s.intermediate_size) for s in without_inner_widths(specs)]  # type: ignore[union-attr]
    assert kept == [
        *(("pre", width) for width in (128, 64, 16)),
        *(("post", width) for width in (80, 48)),
        *(("peri", width) for width in (72, 56, 24)),
    ]


def test_calibration_networks_are_spread(space: SearchSpace, tmp_path: Path) -> None:
    table = profile(space, WORKLOADS[:1], tmp_path / "t.json")
    archs = calibration_archs(table, space, WORKLOADS[:1], seed=0)
    assert len({arch.id for arch in archs}) == len(archs) == 24
    sums = [raw_sum_us(table, arch, WORKLOADS[0]) for arch in archs]
    rows = space.sample_genotypes(np.random.default_rng(0), calibration.CALIBRATION_POOL)
    pool = [raw_sum_us(table, space.decode(row), WORKLOADS[0]) for row in rows]
    assert (min(sums), max(sums)) == (min(pool), max(pool))


def test_whole_networks_are_timed(space: SearchSpace) -> None:
    generator = torch.Generator().manual_seed(0)
    archs = {"large": space.largest(), "small": space.smallest()}
    networks = {n: Subnet(a).reset(generator).pack().eval() for n, a in archs.items()}
    timings = measure_subnets(networks, WORKLOADS, reference_us=500.0)
    assert set(timings) == {"large", "small"}
    for by_workload in timings.values():
        assert set(by_workload) == {item.name for item in WORKLOADS}
        for timing in by_workload.values():
            assert timing.latency_us == pytest.approx(500.0 * timing.ratio)


def test_runs_repeat_from_the_same_state(space: SearchSpace) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for spec in space.sub_blocks():
            block = build_for_timing(spec, generator)
            assert not any(
                child.weight.dtype == torch.float32
                for child in block.modules()
                if getattr(child, "precision", "fp32") == "int8"
            )
            for workload in WORKLOADS:
                inputs = sub_block_inputs(spec, workload, generator)
                assert inputs.shape[:2] == (workload.batch, workload.new_tokens)
                run = runner(block, inputs, workload)
                shapes = {tuple(run().shape) for _ in range(4)}
                assert len(shapes) == 1


def test_decode_step_sees_its_whole_context(space: SearchSpace) -> None:
    workload = decode(1, 20)
    network = Subnet(space.uniform(mixer="softmax")).reset(torch.Generator().manual_seed(0)).eval()
    states: list[object] = []
    original = network.init_state

    def remember(batch: int, max_tokens: int) -> object:
        states.append(original(batch, max_tokens))
        return states[-1]

    network.init_state = remember  # type: ignore[assignment,method-assign]
    with torch.inference_mode():
        run = runner(network, torch.zeros(1, 1, dtype=torch.long), workload)
        for _ in range(3):
            run()
            lengths = {part.length for part in states[0] if part is not None}  # type: ignore[attr-defined]
            assert lengths == {21}


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


def test_peak_memory_holds_weights_state_and_activations(space: SearchSpace) -> None:
    network = Subnet(space.largest()).reset(torch.Generator().manual_seed(0)).eval()
    weights = sum(p.numel() * p.element_size() for p in network.parameters())
    tokens = 12 * 8
    logits = 12 * space.vocab_size * 4
    short = peak_mib(network, prefill(1, 12)) * MIB
    assert short >= weights + tokens + logits
    longer = peak_mib(network, prefill(1, 48)) * MIB
    assert longer - short >= 36 * 4 * (space.vocab_size + network.arch.d_model)
    assert peak_mib(network, prefill(1, 48)) * MIB == longer
    state = state_bytes(network.init_state(1, 301))
    assert peak_mib(network, decode(1, 300)) * MIB >= weights + state
    packed = peak_mib(Subnet(network.arch).reset(torch.Generator()).pack().eval(), prefill(1, 12))
    assert packed * MIB <= short


def test_table_files_hold_plain_json(space: SearchSpace, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    profile(space, WORKLOADS[:1], path)
    values = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert values["workloads"] == ["prefill_b1_t12"]
    assert values["device_id"] == LatencyTable.load(path).device.id
