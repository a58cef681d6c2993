from __future__ import annotations

import logging
import os
import subprocess
import sys
import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from nas_kernels import dispatch
from nas_kernels.dispatch import interpreting, reference_only, triton_available, use_triton
from nas_kernels.norms import rms_norm

X = torch.ones(2)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_logged", set())
    monkeypatch.setattr(dispatch, "_without_kernels", set())
    monkeypatch.delenv("NAS_KERNELS", raising=False)


def installed(monkeypatch: pytest.MonkeyPatch, there: bool, interpret: str) -> None:
    monkeypatch.setattr(dispatch, "_installed", there)
    monkeypatch.setattr(dispatch, "_INTERPRETABLE", there)
    monkeypatch.setenv("TRITON_INTERPRET", interpret)


def test_cpu_tensors_take_the_reference_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, True, "1")
    assert not use_triton("op", X)
    assert use_triton("op", X, None, implementation="triton")
    assert not use_triton("op", X, implementation="reference")


def test_the_variable_decides_where_the_argument_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, True, "1")
    monkeypatch.setenv("NAS_KERNELS", "triton")
    assert use_triton("op", X)
    assert not use_triton("op", X, implementation="reference")
    monkeypatch.setenv("NAS_KERNELS", "reference")
    assert use_triton("op", X, implementation="triton")


def test_what_cannot_be_had_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, True, "0")
    with pytest.raises(RuntimeError, match=r"op cannot run as a Triton kernel: .* are on cpu"):
        use_triton("op", X, implementation="triton")
    installed(monkeypatch, False, "1")
    with pytest.raises(RuntimeError, match="triton is not installed"):
        use_triton("op", X, implementation="triton")
    installed(monkeypatch, True, "1")
    with pytest.raises(RuntimeError, match="float64"):
        use_triton("op", X, X.double(), implementation="triton")
    with pytest.raises(RuntimeError, match="only 16 columns"):
        use_triton("op", X, implementation="triton", unsupported="only 16 columns")
    with pytest.raises(RuntimeError, match="on cpu and on meta"):
        use_triton("op", X, X.to("meta"), implementation="triton")


def test_pytorch_may_be_preferred(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, True, "1")
    assert use_triton("op", X, implementation="triton", prefer_reference="it is faster")
    monkeypatch.setattr(dispatch, "_obstacle", lambda tensors, asked: None)
    assert use_triton("op", X)
    assert not use_triton("op", X, prefer_reference="it is faster")


def test_the_variable_is_a_wish(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, True, "1")
    monkeypatch.setenv("NAS_KERNELS", "triton")
    assert use_triton("op", X, prefer_reference="it is faster")
    assert not use_triton("op", X, unsupported="only 16 columns")
    assert not use_triton("op", X.double())


def test_within_a_context_only_pytorch_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, True, "1")
    with reference_only():
        assert not use_triton("op", X, implementation="triton")
    assert use_triton("op", X, implementation="triton")


def test_nobody_may_miss_what_kernels_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, True, "1")
    monkeypatch.setenv("NAS_KERNELS", "triton")
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(X)
    assert not use_triton("op", fake)
    assert not use_triton("op", X, fake)
    assert use_triton("op", torch.nn.Parameter(X))
    found = []

    def watched(x: torch.Tensor) -> torch.Tensor:
        found.append(use_triton("op", x))
        return x + 1

    torch.func.vmap(watched)(X)
    torch.func.functionalize(watched)(X)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.trace(watched, X, check_trace=False)
    make_fx(watched)(X)
    with FlopCounterMode(display=False):
        watched(X)
    assert not any(found)
    with pytest.raises(RuntimeError, match="one of its tensors is a FakeTensor"):
        use_triton("op", fake, implementation="triton")


def test_a_compiled_graph_has_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, True, "1")
    monkeypatch.setenv("NAS_KERNELS", "triton")

    def run(x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, x) + 2.0 * use_triton("op", x)

    compiled = torch.compile(run, backend="eager", fullgraph=True)
    assert torch.equal(compiled(X), torch.nn.functional.rms_norm(X, (2,), X, 1e-5))


def test_fake_tensors_on_a_gpu_that_is_not_there() -> None:
    with FakeTensorMode():
        assert not use_triton("op", torch.empty(3, device="cuda"))


def test_where_kernels_are_out_of_the_question_little_is_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dispatch, "_INTERPRETABLE", False)
    assert not use_triton("op", X)
    monkeypatch.setattr(dispatch, "_choice", None)
    assert not use_triton("op", X)


def test_unknown_choices_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="implementation='cuda' is unknown; choose one of auto"):
        use_triton("op", X, implementation="cuda")
    monkeypatch.setenv("NAS_KERNELS", "fast")
    with pytest.raises(ValueError, match="NAS_KERNELS='fast'"):
        use_triton("op", X)


def test_the_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="nas_kernels"):
        for _ in range(3):
            use_triton("op", X)
            use_triton("other", X)
    assert caplog.messages == [
        "op runs as PyTorch: its tensors are on cpu",
        "other runs as PyTorch: its tensors are on cpu",
    ]


def test_asking_does_not_import_triton() -> None:
    program = (
        "import sys, torch\n"
        "from nas_kernels.dispatch import triton_available, use_triton\n"
        "triton_available(), use_triton('op', torch.ones(1))\n"
        "assert 'triton.language' not in sys.modules\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled for the GPU")
@pytest.mark.skipif(not triton_available(), reason="triton is not installed")
def test_this_suite_interprets_kernels() -> None:
    assert interpreting()
    import triton

    assert "Interpreted" in type(triton.jit(lambda: None)).__name__
