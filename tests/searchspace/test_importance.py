"""Importance ordering: the largest network stays the same, smaller ones get better."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from searchspace.arch import Arch
from searchspace.errors import UserError
from searchspace.importance import order_by_importance
from searchspace.mixers import MIXERS
from searchspace.space import SearchSpace
from searchspace.supernet import Supernet

VOCAB = 24


def make_space(**layers: Any) -> SearchSpace:
    values = {
        "heads": [[4, 2], [2, 2], [2, 1]],
        "intermediate_size": [48, 16],
        "mixer": {"softmax": {}, "gla": {}, "linear_elu": {}},
        **layers,
    }
    sizes = {"name": "test", "d_model": [32, 16], "head_dim": 8, "num_layers": 2}
    return SearchSpace.from_dict({**sizes, "layers": values}, VOCAB)


def make_batch(step: int, size: int = 8) -> tuple[Tensor, Tensor]:
    """Sequences that count up by 1 to 3 per token."""
    generator = torch.Generator().manual_seed(step)
    first = torch.randint(VOCAB, (size, 1), generator=generator)
    pace = torch.randint(1, 4, (size, 1), generator=generator)
    tokens = (first + pace * torch.arange(17)) % VOCAB
    return tokens[:, :-1], tokens[:, 1:]


def loss_fn(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def trained(space: SearchSpace, steps: int = 60) -> Supernet:
    """Train the largest network alone."""
    supernet = Supernet(space, torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(supernet.params.values(), lr=5e-3)
    for step in range(steps):
        supernet.start_step()
        inputs, targets = make_batch(step)
        loss_fn(supernet.view(space.largest(), train=True)(inputs), targets).backward()
        supernet.publish_gradients()
        optimizer.step()
    return supernet


def shaken(space: SearchSpace) -> Supernet:
    """A supernet with nothing left at ones or zeros."""
    generator = torch.Generator().manual_seed(0)
    supernet = Supernet(space, generator)
    with torch.no_grad():
        for tensor in supernet.state_dict().values():
            if tensor.ndim == 1 and tensor.is_floating_point():
                tensor.add_(0.3 * torch.rand(tensor.shape, generator=generator))
    return supernet


def order(supernet: Supernet) -> Supernet:
    return order_by_importance(supernet, [make_batch(100 + i) for i in range(4)], loss_fn)


@torch.no_grad()
def loss(supernet: Supernet, **choices: Any) -> float:
    inputs, targets = make_batch(999, 64)
    return loss_fn(supernet.view(supernet.space.uniform(**choices))(inputs), targets).item()


@torch.no_grad()
def logits(supernet: Supernet, arch: Arch, inputs: Tensor) -> Tensor:
    out: Tensor = supernet.view(arch)(inputs)
    return out


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).square().mean().sqrt() / expected.square().mean().sqrt())


@pytest.mark.parametrize(
    "layers",
    [
        {},
        {"mixer": {"gla": {}, "softmax": {}}, "ffn": ["gelu", "swiglu"], "norm": ["layernorm"]},
        {"heads": [[4, 4], [4, 2]], "norm": ["prepbn", "rmsnorm"], "position": ["nope"]},
        {"norm_placement": ["peri", "post"]},
    ],
    ids=["gqa", "gla", "prepbn", "peri"],
)
def test_networks_of_full_width_compute_the_same(layers: dict[str, Any]) -> None:
    space = make_space(**layers)
    supernet = shaken(space)
    # Those with the largest one's heads, whatever their mixer.
    archs = [space.uniform(mixer=mixer) for mixer in space.mixers]
    inputs, _ = make_batch(7)
    before = {name: value.clone() for name, value in supernet.state_dict().items()}
    expected = [logits(supernet, arch, inputs) for arch in archs]
    assert order(supernet) is supernet
    actual = [logits(supernet, arch, inputs) for arch in archs]
    for a, b in zip(actual, expected, strict=True):
        assert relative_rms(a, b) <= 1e-5
    after = supernet.state_dict()
    for name in ("ends.embedding", "blocks.layer1_ffn.op.up_proj.weight"):
        assert not torch.equal(before[name], after[name])
        assert torch.equal(before[name].flatten().sort()[0], after[name].flatten().sort()[0])
    assert all(param.grad is None for param in supernet.params.values())


def test_slices_of_a_trained_network_get_better() -> None:
    supernet = trained(make_space())
    before = {
        "largest": loss(supernet),
        "ffn": loss(supernet, intermediate_size=16),
        "d_model": loss(supernet, d_model=16),
        "smallest": loss(supernet, d_model=16, heads="2x1", intermediate_size=16),
    }
    order(supernet)
    assert loss(supernet) == pytest.approx(before["largest"], abs=1e-5)
    assert loss(supernet, intermediate_size=16) < before["ffn"]
    assert loss(supernet, d_model=16) < before["d_model"]
    assert loss(supernet, d_model=16, heads="2x1", intermediate_size=16) < before["smallest"]


def test_units_of_no_use_go_last() -> None:
    space = make_space()
    supernet = Supernet(space, torch.Generator().manual_seed(0))
    with torch.no_grad():
        # The first key/value head of layer 0 with its two query heads, query head 2 of layer 1,
        # and the first 16 channels of an FFN do nothing.
        o_proj = [supernet.params[f"blocks.layer{i}_mixer.op.o_proj.weight"] for i in range(2)]
        o_proj[0][:, :16] = 0.0
        o_proj[1][:, 16:24] = 0.0
        supernet.params["blocks.layer0_ffn.op.down_proj.weight"][:, :16] = 0.0
    dead = supernet.params["blocks.layer0_mixer.op.k_proj.weight"][:8].clone()
    order(supernet)
    assert not o_proj[0][:, :16].eq(0).any() and o_proj[0][:, 16:].eq(0).all()
    moved = supernet.params["blocks.layer0_mixer.op.k_proj.weight"][8:]
    torch.testing.assert_close(moved.norm(dim=1), dead.norm(dim=1))
    # Heads 2 and 3 stay side by side; the useless one of them comes second.
    assert o_proj[1].view(32, 4, 8).abs().sum(dim=(0, 2)).eq(0).tolist() in (
        [False, True, False, False],
        [False, False, False, True],
    )
    assert supernet.params["blocks.layer0_ffn.op.down_proj.weight"][:, 32:].eq(0).all()


def test_an_order_that_the_largest_network_depends_on_is_kept() -> None:
    space = make_space(position=["alibi", "nope"])
    supernet = shaken(space)
    name = "blocks.layer0_mixer.op.o_proj.weight"
    heads = supernet.params[name].detach().view(32, 4, 8).norm(dim=(0, 2))
    inputs, _ = make_batch(7)
    expected = logits(supernet, space.largest(), inputs)
    order(supernet)
    assert relative_rms(logits(supernet, space.largest(), inputs), expected) <= 1e-5
    # Biases differ per head, so heads stay in place; features and channels were still ordered.
    torch.testing.assert_close(supernet.params[name].view(32, 4, 8).norm(dim=(0, 2)), heads)


def test_features_stay_where_an_operator_gives_them_a_meaning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(MIXERS["linear_elu"], "feature_order", True, raising=False)
    supernet = shaken(make_space())
    before = {name: value.clone() for name, value in supernet.state_dict().items()}
    order(supernet)
    after = supernet.state_dict()
    assert torch.equal(before["ends.embedding"], after["ends.embedding"])
    name = "blocks.layer0_ffn.op.up_proj.weight"
    assert not torch.equal(before[name], after[name])


def test_no_batches_are_refused() -> None:
    supernet = Supernet(make_space(), torch.Generator().manual_seed(0))
    with pytest.raises(UserError, match="at least one batch"):
        order_by_importance(supernet, [], loss_fn)
