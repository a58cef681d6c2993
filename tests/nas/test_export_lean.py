"""Programs hold weights once and compute once what layers share."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

from nas.export.pt2 import ProgramExporter
from nas.export.pt2.lean import lean
from nas.export.pt2.programs import recording
from tests.nas.export_cases import LLAMA, handover, inputs_of, relative


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    ProgramExporter().write(handover(LLAMA), folder)
    return folder


def test_as_users_load_it_the_decode_program_gets_the_weights_of_the_other(folder: Path) -> None:
    subnet, tokens = handover(LLAMA).subnet, inputs_of(LLAMA, 2, 9)
    expected = subnet(tokens)
    prefill, decode = (torch.export.load(folder / f"{name}.pt2") for name in ("prefill", "decode"))
    held = sum(tensor.untyped_storage().nbytes() for tensor in decode.state_dict.values())
    assert held < 0.02 * subnet.weight_bytes()
    with torch.inference_mode():
        logits, *state = prefill.module()(tokens[:, :8])
        assert relative(logits, expected[:, :8]) < 1e-5
        assert decode.module()(tokens[:, 8:], 8, *state)[0].isnan().all()
        decode.state_dict.update(prefill.state_dict)
        found = decode.module()(tokens[:, 8:], 8, *state)[0]
    assert relative(found, expected[:, 8:]) < 1e-5


def test_what_layers_share_is_computed_once(folder: Path) -> None:
    for name in ("prefill", "decode"):
        program = torch.export.load(folder / f"{name}.pt2")
        calls = Counter(str(node.target) for node in program.graph.nodes)
        assert calls["aten.cos.default"] == calls["aten.sin.default"] == 1
        assert not any("assert" in call for call in calls)
        assert calls["aten.linear.default"] > 8
        assert calls["aten.scaled_dot_product_attention.default"] == 3


class _Repeated(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ones = torch.ones_like(x)
        ones[:1].fill_(2.0)
        others = torch.ones_like(x)
        return x + ones, x + 1.0, x.to(x.dtype), x.add(others), x.double().cos(), x.cos()


def test_results_stay_apart_and_writing_in_place_counts() -> None:
    x = torch.randn(3, generator=torch.Generator().manual_seed(0))
    with recording():
        program = lean(torch.export.export(_Repeated(), (x,)))
    program.validate()
    found = program.module()(x)
    for actual, expected in zip(found, _Repeated()(x), strict=True):
        assert actual.dtype == expected.dtype
        assert torch.equal(actual, expected)
