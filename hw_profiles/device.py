"""`Device`: what a latency was measured on, and whether that is where we are."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from hw_profiles.backends.base import Backend
from hw_profiles.backends.eager import EagerBackend
from hw_profiles.process import current_settings, usable_processors
from searchspace.errors import UserError

VECTOR_EXTENSIONS = (
    *("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "avx_vnni"),
    *("amx_int8", "amx_bf16", "amx_fp16"),
    *("asimd", "asimddp", "i8mm", "bf16", "sve", "sve2"),
)
"""Instruction sets that change the speed of matrix products (x86 and Arm names)."""

DESCRIPTIVE = ("memory_gib", "num_processors", "os")
"""Fields that do not change latency and are no part of `Device.id`."""


@dataclass(frozen=True)
class Device:
    """Hardware, libraries and process settings together.

    Args:
        cpu: model name, with family, model and stepping where known.
        isa: the entries of `VECTOR_EXTENSIONS` the processor has.
        num_threads: threads of one operator.
        num_processors: processors this process may use.
        memory_gib: total memory.
        os: system and machine, such as ``"Linux x86_64"``.
        python: major and minor version.
        torch: full version.
        matmul_precision: `torch.get_float32_matmul_precision()`.
        allocator_tuned: see `hw_profiles.process.ProcessSettings`.
        flush_denormals: see `hw_profiles.process.ProcessSettings`.
        backend: how networks are run, a name in `hw_profiles.backends.BACKENDS`.
        backend_version: of its library, where that is not torch.
        accelerator: name and driver; empty for processors.
        dtype: of activations outside quantised layers.
    """

    cpu: str
    isa: tuple[str, ...]
    num_threads: int
    num_processors: int
    memory_gib: float
    os: str
    python: str
    torch: str
    matmul_precision: str
    allocator_tuned: bool
    flush_denormals: bool
    backend: str = "eager"
    backend_version: str = ""
    accelerator: str = ""
    dtype: str = "float32"

    @classmethod
    def current(cls, backend: Backend | None = None) -> Device:
        """Describe this process; call `prepare_process` first.

        Args:
            backend: how networks are run; None is PyTorch, eagerly.
        """
        backend = backend or EagerBackend()
        settings = current_settings()
        name, isa = _cpu()
        return cls(
            cpu=name,
            isa=isa,
            num_threads=torch.get_num_threads(),
            num_processors=usable_processors(),
            memory_gib=_memory_gib(),
            os=f"{platform.system()} {platform.machine()}",
            python=".".join(platform.python_version_tuple()[:2]),
            torch=str(torch.__version__),
            matmul_precision=torch.get_float32_matmul_precision(),
            allocator_tuned=settings.allocator_tuned,
            flush_denormals=settings.flush_denormals,
            backend=backend.name,
            backend_version=backend.version(),
            accelerator=backend.accelerator(),
        )

    @functools.cached_property
    def id(self) -> str:
        """Ten hexadecimal digits that differ when latencies may differ."""
        values = {name: value for name, value in asdict(self).items() if name not in DESCRIPTIVE}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:10]

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON-ready form."""
        return {**asdict(self), "isa": list(self.isa)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Device:
        """Build from `to_dict`'s form.

        Raises:
            UserError: for a missing, unknown or ill-typed field.
        """
        known = {field.name: field.type for field in fields(cls)}
        wrong = sorted(set(known) ^ set(values))
        if wrong:
            raise UserError(
                f"device description has missing or unknown fields ({', '.join(wrong)}); "
                "it was written by another version, so profile again"
            )
        kinds = {
            "str": str,
            "int": int,
            "bool": bool,
            "float": (int, float),
            "tuple[str, ...]": list,
        }
        for name, kind in known.items():
            if not isinstance(values[name], kinds[str(kind)]):  # type: ignore[arg-type]
                raise UserError(f"device field {name}={values[name]!r} is not of type {kind}")
        return cls(**{**values, "isa": tuple(values["isa"])})

    def difference(self, other: Device) -> list[str]:
        """Return one sentence for each field that makes latencies differ; empty if none does."""
        sentences = []
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if mine != theirs and field.name not in DESCRIPTIVE:
                sentences.append(_DIFFERENCES.get(field.name, _plain)(field.name, mine, theirs))
        return sentences

    def require_same(self, other: Device, what: str) -> None:
        """Check that `what`, which was measured on this device, may be used on `other`.

        Raises:
            UserError: saying what differs and that `nas profile` measures here.
        """
        differences = self.difference(other)
        if differences:
            raise UserError(
                f"{what} was measured on device {self.id} but this is device {other.id} "
                f"({'; '.join(differences)}); run `nas profile` here to measure this one"
            )


def _plain(name: str, mine: object, theirs: object) -> str:
    return f"{name.replace('_', ' ')} is {theirs} instead of {mine}"


def _extensions(name: str, mine: Any, theirs: Any) -> str:
    parts = []
    if gone := [x for x in mine if x not in theirs]:
        parts.append(f"lacks {', '.join(gone)}")
    if new := [x for x in theirs if x not in mine]:
        parts.append(f"has {', '.join(new)} in addition")
    return "the processor " + " and ".join(parts)


def _setting(name: str, mine: object, theirs: object) -> str:
    what = {
        "allocator_tuned": "memory allocator tuning",
        "flush_denormals": "flushing of denormal numbers",
    }[name]
    return f"{what} is {'on' if theirs else 'off'} instead of {'on' if mine else 'off'}"


_DIFFERENCES = {"isa": _extensions, "allocator_tuned": _setting, "flush_denormals": _setting}


@functools.cache
def _cpu() -> tuple[str, tuple[str, ...]]:
    """Return the processor's name and vector extensions."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        capability = torch.backends.cpu.get_cpu_capability().lower()
        isa = tuple(x for x in VECTOR_EXTENSIONS if x.startswith(capability))
        return platform.processor() or platform.machine(), isa
    return parse_cpuinfo(path.read_text())


def parse_cpuinfo(text: str) -> tuple[str, tuple[str, ...]]:
    """Read the first processor's name and vector extensions from ``/proc/cpuinfo``'s text."""
    values: dict[str, str] = {}
    for line in text.split("\n\n")[0].splitlines():
        name, _, value = line.partition(":")
        values.setdefault(name.strip().lower(), value.strip())
    name = values.get("model name") or f"{platform.machine()} part {values.get('cpu part', '?')}"
    facts = [f"{key} {values[full]}" for key, full in _CPU_FACTS if full in values]
    flags = (values.get("flags") or values.get("features") or "").split()
    title = f"{name} ({', '.join(facts)})" if facts else name
    return title, tuple(x for x in VECTOR_EXTENSIONS if x in flags)


_CPU_FACTS = (("family", "cpu family"), ("model", "model"), ("stepping", "stepping"))


def _memory_gib() -> float:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return 0.0
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
