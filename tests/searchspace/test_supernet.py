from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from searchspace.arch import Arch
from searchspace.errors import UserError
from searchspace.space import SearchSpace
from searchspace.specs import EndsSpec
from searchspace.sub_blocks import build_sub_block
from searchspace.subnet import Subnet, block_name
from searchspace.supernet import Supernet

SPACE = SearchSpace.load("decoder-small", 61)
TOKENS = 37  # odd, longer than the smallest window


@pytest.fixture(scope="module")
def supernet() -> Supernet:
    made = Supernet(SPACE, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in made.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return made


def make_tokens(batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randint(0, 61, (batch, TOKENS), generator=torch.Generator().manual_seed(seed))


def random_archs(count: int, seed: int = 0) -> list[Arch]:
    rng = np.random.default_rng(seed)
    return [SPACE.decode(row) for row in SPACE.sample_genotypes(rng, count)]


def sliced(supernet: Supernet, subnet: Subnet) -> dict[str, Tensor]:
    """Return the arch's weights as slices inside the graph of autograd: the obvious way."""
    return {
        name: supernet.params[name][tuple(slice(0, n) for n in value.shape)]
        for name, value in subnet.named_parameters()
    }


@torch.no_grad()
def test_200_archs_equal_their_extracted_networks(supernet: Supernet) -> None:
    tokens, archs = make_tokens(), random_archs(200)
    assert any(layer.skip for arch in archs for layer in arch.layers)
    assert any(layer.num_heads != layer.num_kv_heads for arch in archs for layer in arch.layers)
    assert any(len(set(arch.layers)) >= 5 for arch in archs)
    for arch in archs:
        extracted = supernet.extract(arch)
        own = {p.data_ptr() for p in extracted.parameters()}
        assert not own & {p.data_ptr() for p in supernet.params.values()}
        difference = (supernet.view(arch)(tokens) - extracted(tokens)).abs().max().item()
        assert difference <= 1e-5, arch.to_json()


@torch.no_grad()
def test_views_are_a_plain_subnet_on_sliced_weights(supernet: Supernet) -> None:
    for arch in random_archs(15, seed=1):
        plain = Subnet(arch)
        plain.load_state_dict(sliced(supernet, plain))
        difference = (supernet.view(arch)(make_tokens()) - plain(make_tokens())).abs().max()
        assert difference <= 1e-5, arch.to_json()


@torch.no_grad()
def test_prefill_and_steps_equal_the_full_forward(supernet: Supernet) -> None:
    tokens = make_tokens()
    for arch in random_archs(30, seed=2):
        network = supernet.extract(arch)
        whole = network(tokens)
        state = network.init_state(len(tokens), TOKENS)
        parts = [network(part, state) for part in tokens.split([33, 1, 1, 2], dim=1)]
        error = (torch.cat(parts, dim=1) - whole).square().mean().sqrt() / whole.std()
        int8 = any("int8" in (la.mixer_precision, la.ffn_precision) for la in arch.layers)
        # A difference of 1e-7 can move an int8 activation to the next step.
        assert error <= (2e-2 if int8 else 1e-5), arch.to_json()


def test_gradients_equal_slicing_inside_the_graph(supernet: Supernet) -> None:
    # Two archs into the same shared gradients, as in a training step.
    tokens, archs = make_tokens(), random_archs(8, seed=3)
    for pair in zip(archs[::2], archs[1::2], strict=True):
        supernet.start_step()
        for arch in pair:
            loss_of(supernet.view(arch, train=True)(tokens)).backward()
        supernet.publish_gradients()
        given = {name: p.grad for name, p in supernet.named_parameters()}
        loss = sum(
            loss_of(functional_call(net := Subnet(arch), sliced(supernet, net), tokens))
            for arch in pair
        )
        expected = torch.autograd.grad(loss, list(supernet.params.values()), allow_unused=True)
        for (name, grad), right in zip(given.items(), expected, strict=True):
            if right is None:
                assert grad is None, name
            else:
                assert grad is not None, name
                torch.testing.assert_close(grad, right, rtol=1e-4, atol=1e-6)


def loss_of(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), make_tokens(seed=9).flatten())


def test_a_new_step_forgets_the_old_gradients(supernet: Supernet) -> None:
    arch = SPACE.smallest()
    grads = []
    for _ in range(2):
        supernet.start_step()
        loss_of(supernet.view(arch, train=True)(make_tokens())).backward()
        supernet.publish_gradients()
        grads.append(supernet.params["ends.embedding"].grad.clone())
    assert torch.equal(*grads)
    used = {name for name, p in supernet.named_parameters() if p.grad is not None}
    assert used == {name for name, _ in supernet.view(arch).named_parameters()}
    # Outside the arch's width nothing was touched.
    assert (grads[0][:, arch.d_model :] == 0).all()


def test_views_see_changes_at_once_and_extracts_do_not(supernet: Supernet) -> None:
    arch, tokens = SPACE.largest(), make_tokens()
    view, extracted = supernet.view(arch), supernet.extract(arch)
    with torch.no_grad():
        before = view(tokens)
        supernet.params["ends.head.weight"].mul_(2)
        torch.testing.assert_close(view(tokens), 2 * before)
        torch.testing.assert_close(extracted(tokens), before)
        supernet.params["ends.head.weight"].mul_(0.5)
    assert not any(p.requires_grad for p in view.parameters())


def test_same_seed_same_weights() -> None:
    tiny = SearchSpace.load("decoder-tiny", 11)
    first, again = (Supernet(tiny, torch.Generator().manual_seed(4)) for _ in range(2))
    assert all(torch.equal(p, again.params[name]) for name, p in first.named_parameters())
    assert all(torch.isfinite(p).all() for _, p in first.named_parameters())


def test_mixers_of_a_slot_share_their_projections(supernet: Supernet) -> None:
    slot = {name for name in supernet.params if name.startswith("blocks.layer0_")}
    assert len([name for name in slot if name.endswith("q_proj.weight")]) == 1
    layer = replace(SPACE.largest().layers[0], mixer_options=())
    for mixer in ("softmax", "linear_elu", "gla", "sliding_window"):
        arch = replace(SPACE.largest(), layers=(replace(layer, mixer=mixer),) * 6)
        shared = supernet.view(arch).blocks["layer0_mixer"].op.q_proj.weight
        assert (
            shared.data_ptr() == supernet.params["blocks.layer0_mixer.op.q_proj.weight"].data_ptr()
        )


def test_parameters_are_as_large_as_the_largest_arch_needs(supernet: Supernet) -> None:
    # The space's reachable sub-blocks fit, and none leaves a row or column unused.
    needed: dict[str, tuple[int, ...]] = {}
    for spec in SPACE.sub_blocks():
        if isinstance(spec, EndsSpec):
            continue
        with torch.device("meta"):
            block = build_sub_block(spec)
        for name, value in block.named_parameters():
            full_name = f"blocks.{block_name(0, spec)}.{name}"
            old = needed.get(full_name, (0,) * value.ndim)
            needed[full_name] = tuple(map(max, old, value.shape))
    have = {n: tuple(p.shape) for n, p in supernet.named_parameters() if "layer0" in n}
    assert have == needed


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"d_model": 256},
            r"of shape \(.*256.*which has shape .*'decoder-small'; choose an arch of",
        ),
        ({"vocab_size": 62}, r"ends.embedding of shape \(62, 192\)"),
        ({"layers": SPACE.largest().layers * 2}, "layer6_mixer.* is absent"),
        (
            {"layers": (replace(SPACE.largest().layers[0], intermediate_size=769),)},
            r"up_proj.weight of shape \(769, 192\), which has shape \(768, 192\)",
        ),
        (
            {"layers": (replace(SPACE.largest().layers[0], num_heads=7, num_kv_heads=1),)},
            r"q_proj.weight of shape \(224, 192\)",
        ),
    ],
)
def test_archs_that_do_not_fit_are_refused(
    supernet: Supernet, change: dict[str, object], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        supernet.view(replace(SPACE.largest(), **change))


def test_weights_round_trip_and_foreign_weights_are_refused(supernet: Supernet) -> None:
    tiny = SearchSpace.load("decoder-tiny", 11)
    first, second = (Supernet(tiny, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    arch, tokens = tiny.largest(), make_tokens() % 11
    second.load_state_dict(first.state_dict())
    with torch.no_grad():
        assert torch.equal(first.view(arch)(tokens), second.view(arch)(tokens))
    with pytest.raises(UserError, match=r"not of space 'decoder-tiny': .* is on one side only"):
        second.load_state_dict(supernet.state_dict())
    other = dict(first.state_dict())
    other["ends.embedding"] = torch.zeros(3, 3)
    with pytest.raises(UserError, match=r"ends.embedding has shape \(3, 3\), expected \(11, 64\)"):
        second.load_state_dict(other)
