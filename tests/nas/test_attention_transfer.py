"""Attention transfer: errors fall, and what is shared with softmax stays as it is."""

from __future__ import annotations

import pytest
import torch

from nas.attention_transfer import TransferError, transfer_attention
from nas.progress import Reporter
from searchspace.errors import UserError
from searchspace.mixers import MIXERS
from searchspace.space import SearchSpace
from searchspace.sub_blocks import MixerBlock
from searchspace.supernet import Supernet

VOCAB = 32


class Notes(Reporter):
    """Keeps what is said."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


class RandomTask:
    """Random tokens."""

    seq_len = 24

    def train_batch(
        self, step: int, batch_size: int, seed: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(1000 * seed + step)
        tokens = torch.randint(VOCAB, (batch_size, self.seq_len + 1), generator=generator)
        return tokens[:, :-1], tokens[:, 1:]


def make_space(mixers: dict[str, object]) -> SearchSpace:
    layers = {
        "heads": [[4, 2], [2, 1]],
        "intermediate_size": [32, 16],
        "mixer": mixers,
    }
    sizes = {"name": "test", "d_model": [32, 16], "head_dim": 8, "num_layers": 2}
    return SearchSpace.from_dict({**sizes, "layers": layers}, VOCAB)


def transfer(supernet: Supernet, steps: int, notes: Reporter) -> dict[str, TransferError]:
    return transfer_attention(
        supernet, RandomTask(), steps=steps, lr=0.01, seed=0, reporter=notes, batch_size=4
    )


WITH_OWN = [name for name in ("gla", "hedgehog") if name in MIXERS]


@pytest.mark.parametrize("mixer", WITH_OWN)
def test_errors_fall_in_every_slot_and_only_own_parameters_move(mixer: str) -> None:
    space = make_space({"softmax": {}, "linear_elu": {}, mixer: {}, "none": {}})
    supernet = Supernet(space, torch.Generator().manual_seed(0))
    before = {name: value.clone() for name, value in supernet.state_dict().items()}
    shared = [n for n, p in Supernet(
        make_space({"softmax": {}, "linear_elu": {}}), torch.Generator()
    ).named_parameters()]  # fmt: skip
    notes = Notes()
    errors = transfer(supernet, 30, notes)
    assert set(errors) == {f"layer0.{mixer}", f"layer1.{mixer}"}
    for error in errors.values():
        assert error.after < 0.9 * error.before
    after = supernet.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and not moved & set(shared)
    own = set(before) - set(shared)
    assert any("layer1" in name for name in moved) and len(moved) >= 0.8 * len(own)
    assert notes.said == [
        "attention transfer: linear_elu has no parameters of its own, left as it is"
    ]
    assert all(param.grad is None for param in supernet.params.values())


def test_errors_are_those_of_the_outputs_on_the_softmax_networks_inputs() -> None:
    space = make_space({"softmax": {}, "gla": {}})
    supernet = Supernet(space, torch.Generator().manual_seed(0))
    network = supernet.view(space.uniform(mixer="softmax"))
    gla = supernet.view(space.uniform(mixer="gla"))
    inputs, _ = RandomTask().train_batch(0, 4, 0)  # the batch after the last of none
    expected = []
    with torch.no_grad():
        x = network.ends.embed(inputs)
        for slot in range(2):
            mixer, other = (net.blocks[f"layer{slot}_mixer"] for net in (network, gla))
            assert isinstance(mixer, MixerBlock) and isinstance(other, MixerBlock)
            target, guess = mixer.op(mixer.norm(x)), other.op(mixer.norm(x))
            expected.append((((target - guess) ** 2).sum() / (target**2).sum()).item())
            x = network.blocks[f"layer{slot}_ffn"](x + target)
    errors = transfer(supernet, 0, Notes())
    assert [e.before for e in errors.values()] == pytest.approx(expected, rel=1e-4)
    assert all(e.before == e.after for e in errors.values())


def test_options_with_parameters_of_their_own_are_trained_too() -> None:
    space = make_space({"softmax": {}, "linear_elu": {"qkv_dconv": [0, 3]}})
    supernet = Supernet(space, torch.Generator().manual_seed(0))
    errors = transfer(supernet, 20, Notes())
    assert set(errors) == {f"layer{slot}.linear_elu_qkv_dconv3" for slot in range(2)}
    assert all(error.after < error.before for error in errors.values())


def test_a_space_without_softmax_is_refused() -> None:
    supernet = Supernet(make_space({"gla": {}}), torch.Generator().manual_seed(0))
    with pytest.raises(UserError, match="needs softmax to learn from"):
        transfer(supernet, 5, Notes())
