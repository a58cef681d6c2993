from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from hw_profiles import process
from hw_profiles.device import DESCRIPTIVE, Device, parse_cpuinfo
from hw_profiles.process import prepare_process, single_threaded, usable_processors
from hw_profiles.workload import Workload, decode, prefill
from searchspace.errors import UserError

INTEL = """processor\t: 0
cpu family\t: 6
model\t\t: 143
model name\t: Some Xeon
stepping\t: 8
flags\t\t: fpu sse2 avx2 avx512f avx512_vnni amx_int8 made_up

processor\t: 1
model name\t: Another
flags\t\t: sse2
"""
ARM = "processor : 0\nFeatures : fp asimd asimddp i8mm bf16 sve\nCPU part : 0xd4f\n"

DEVICE = Device(
    cpu="Some Xeon",
    isa=("avx2", "avx512f"),
    num_threads=2,
    num_processors=8,
    memory_gib=31.2,
    os="Linux x86_64",
    python="3.11",
    torch="2.13.0+cpu",
    matmul_precision="highest",
    allocator_tuned=True,
    flush_denormals=True,
)


def test_cpuinfo_of_the_first_processor_is_read() -> None:
    name, isa = parse_cpuinfo(INTEL)
    assert name == "Some Xeon (family 6, model 143, stepping 8)"
    assert isa == ("avx2", "avx512f", "avx512_vnni", "amx_int8")
    name, isa = parse_cpuinfo(ARM)
    assert "0xd4f" in name
    assert isa == ("asimd", "asimddp", "i8mm", "bf16", "sve")


def test_current_device_describes_this_process() -> None:
    device = Device.current()
    assert device.num_threads == torch.get_num_threads()
    assert device.num_processors == usable_processors()
    assert device.torch == torch.__version__
    assert device.memory_gib > 0
    assert Device.current() == device


def test_round_trip_through_json() -> None:
    again = Device.from_dict(json.loads(json.dumps(DEVICE.to_dict())))
    assert again == DEVICE
    assert again.id == DEVICE.id


CHANGES: dict[str, object] = {
    "cpu": "Other", "isa": ("avx2", "amx_bf16"), "num_threads": 1, "num_processors": 4,
    "memory_gib": 8.0, "os": "Linux aarch64", "python": "3.12", "torch": "2.11.0",
    "matmul_precision": "medium", "allocator_tuned": False, "flush_denormals": False,
    "backend": "compile", "dtype": "bfloat16",
}  # fmt: skip


@pytest.mark.parametrize("field", CHANGES)
def test_id_changes_exactly_with_what_changes_latency(field: str) -> None:
    other = replace(DEVICE, **{field: CHANGES[field]})
    assert (other.id == DEVICE.id) == (field in DESCRIPTIVE)
    assert (DEVICE.difference(other) == []) == (field in DESCRIPTIVE)


def test_differences_are_sentences() -> None:
    other = replace(DEVICE, num_threads=1, isa=("avx2", "amx_int8"), allocator_tuned=False)
    assert DEVICE.difference(other) == [
        "the processor lacks avx512f and has amx_int8 in addition",
        "num threads is 1 instead of 2",
        "memory allocator tuning is off instead of on",
    ]


def test_another_device_is_refused_with_what_to_do() -> None:
    other = replace(DEVICE, num_threads=1)
    DEVICE.require_same(DEVICE, "the table")
    with pytest.raises(UserError) as caught:
        DEVICE.require_same(other, "the latency table x.json")
    message = str(caught.value)
    for part in ("the latency table x.json", DEVICE.id, other.id, "threads is 1", "nas profile"):
        assert part in message


@pytest.mark.parametrize("change", [{"num_threads": "2"}, {"extra": 1}, {"cpu": None}])
def test_damaged_descriptions_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(UserError):
        Device.from_dict({**DEVICE.to_dict(), **change})
    with pytest.raises(UserError, match="isa"):
        Device.from_dict({k: v for k, v in DEVICE.to_dict().items() if k != "isa"})


def test_preparing_twice_changes_nothing(one_thread: None) -> None:
    first = process.current_settings()
    assert prepare_process() == first
    assert first.num_threads == 1
    assert torch.get_num_threads() == 1


def test_too_many_threads_are_refused(one_thread: None) -> None:
    for wrong in (0, usable_processors() + 1):
        with pytest.raises(UserError, match=f"num_threads={wrong}"):
            prepare_process(wrong)
    assert torch.get_num_threads() == 1


def test_single_threaded_restores_the_number_of_threads() -> None:
    before = torch.get_num_threads()
    with single_threaded():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_settings_hold_in_a_fresh_process() -> None:
    script = (
        "from hw_profiles.process import prepare_process, denormals_are_flushed\n"
        "settings = prepare_process()\n"
        "assert settings.flush_denormals == denormals_are_flushed()\n"
        "print(settings.num_threads, len(settings.notes), settings.allocator_tuned)\n"
    )
    command = [sys.executable, "-c", script]
    paths = {"PYTHONPATH": ":".join(sys.path)}

    result = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, **paths}
    )
    threads, notes, allocator = result.stdout.split()
    assert int(threads) == usable_processors()
    assert (int(notes) == 0) <= (allocator == "True")


@pytest.mark.parametrize("workload", [prefill(1, 256), decode(4, 17)])
def test_workload_names_round_trip(workload: Workload) -> None:
    assert Workload.parse(workload.name) == workload


def test_workload_facts() -> None:
    assert prefill(2, 64).name == "prefill_b2_t64"
    assert (prefill(2, 64).new_tokens, prefill(2, 64).max_tokens) == (64, 64)
    assert (decode(2, 64).new_tokens, decode(2, 64).max_tokens) == (1, 65)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prefil_b1_t2", "did you mean 'prefill'"),
        ("prefill_b0_t2", "batch=0"),
        ("decode_b1", "decode_b1_t256"),
        ("prefill_b1_t2x", "not understood"),
    ],
)
def test_wrong_workloads_are_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Workload.parse(text)
