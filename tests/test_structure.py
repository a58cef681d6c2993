"""The structure of the code itself: which package may import which."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = ["nas_kernels", "searchspace", "hw_profiles", "predictors", "nas"]
FOLDERS = {
    name: ROOT / ("kernels/nas_kernels" if name == "nas_kernels" else name) for name in ORDER
}
ADAPTERS = {
    "optuna": ("nas/samplers/", "nas/study/"),
    "pymoo": ("nas/pareto.py", "nas/samplers/"),
    "ray": ("nas/cluster/",),
    "triton": ("kernels/nas_kernels/", "nas/doctor.py"),
}


def imported(path: Path) -> set[str]:
    """Return the top-level names a file imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("package", ORDER)
def test_imports_point_one_way(package: str) -> None:
    forbidden = set(ORDER[ORDER.index(package) + 1 :])
    for path in FOLDERS[package].rglob("*.py"):
        assert not imported(path) & forbidden, path


@pytest.mark.parametrize("library", list(ADAPTERS))
def test_only_adapters_import_the_big_libraries(library: str) -> None:
    for folder in FOLDERS.values():
        for path in folder.rglob("*.py"):
            name = path.relative_to(ROOT).as_posix()
            if library in imported(path):
                assert name.startswith(ADAPTERS[library]), f"{name} imports {library}"


def test_the_kernels_folder_cannot_shadow_another_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_torchvision_is_never_imported() -> None:
    for folder in FOLDERS.values():
        assert not any("torchvision" in imported(path) for path in folder.rglob("*.py"))


def test_everything_imports_without_triton_and_ray() -> None:
    modules = [
        ".".join(path.relative_to(folder.parent).with_suffix("").parts).removesuffix(".__init__")
        for folder in FOLDERS.values()
        for path in sorted(folder.rglob("*.py"))
        if path.name != "__main__.py" and "triton_kernel" not in path.name
    ]
    program = (
        "import importlib, sys\n"
        "sys.modules['triton'] = sys.modules['ray'] = None\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
