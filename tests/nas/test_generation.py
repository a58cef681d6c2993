"""Speculative decoding: the target's own tokens and distribution, whatever the state is made of."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nas.cli import main
from nas.generation import Speculation, find_draft, generate_tokens, speculate_text, speculation
from nas.generation.draft import check_tokenizers
from nas.generation.facts import SpeculationFacts
from nas.generation.ties import NEAR
from nas.generation.verdict import greedy_verdict, sampling_verdict
from nas.tasks.language_model import LanguageModelTask
from nas.tasks.tokenizers import TOKENIZER_FILE
from searchspace.arch import Arch
from searchspace.errors import UserError
from searchspace.family import Family
from searchspace.ffn import FFNS
from searchspace.layer_arch import LayerArch
from searchspace.mixers import MIXERS
from searchspace.space import SearchSpace
from searchspace.specs import FFNSpec, MixerSpec
from searchspace.state_mark import StateMark, can_rewind, rewind
from searchspace.sub_blocks import build_sub_block, reset_sub_block
from searchspace.subnet import Subnet
from searchspace.supernet import Supernet

D_MODEL, HEADS, VOCABULARY, TOKENS = 24, (4, 2), 13, 40
CAUSAL = [name for name, mixer in MIXERS.items() if "causal" in mixer.directions]
STATEFUL_FFNS = [name for name, ffn in FFNS.items() if ffn.stateful]


def mixer_layer(mixer: str, **more: Any) -> LayerArch:
    return LayerArch(
        mixer=mixer,
        num_heads=HEADS[0],
        num_kv_heads=HEADS[1],
        position=MIXERS[mixer].positions[0],
        ffn="swiglu",
        intermediate_size=32,
        **more,
    )


def mixer_spec(name: str) -> MixerSpec:
    heads = (4, 4) if MIXERS[name].heads == "equal" else HEADS
    return MixerSpec(D_MODEL, name, *heads, 8, MIXERS[name].positions[0], max_tokens=160)


def network(*layers: LayerArch, seed: int = 0, vocabulary: int = VOCABULARY) -> Subnet:
    """A network with random weights and logits that differ between tokens."""
    arch = Arch(D_MODEL, 8, vocabulary, layers)
    subnet = Subnet(arch).reset(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        subnet.ends.head.weight.mul_(10.0)
    return subnet.eval().requires_grad_(False)


def disturbed(subnet: Subnet, share: float, seed: int = 1) -> Subnet:
    """A draft that is right now and then: the same network with noise on its weights."""
    other, generator = copy.deepcopy(subnet), torch.Generator().manual_seed(seed)
    for param in other.parameters():
        param.add_(
            share * param.std(unbiased=False) * torch.randn(param.shape, generator=generator)
        )
    return other


def greedy(subnet: Subnet, prompt: list[int], tokens: int = TOKENS) -> list[int]:
    return list(generate_tokens(subnet, prompt, tokens, temperature=0))


@pytest.mark.parametrize("name", [*CAUSAL, *STATEFUL_FFNS])
def test_a_state_comes_back_to_its_mark(name: str) -> None:
    spec = FFNSpec(D_MODEL, name, 16) if name in FFNS else mixer_spec(name)
    block = build_sub_block(spec)
    generator = torch.Generator().manual_seed(0)
    reset_sub_block(block, generator, 1)
    with torch.no_grad():
        for first, then in ((37, 9), (1, 3), (64, 40)):
            x = torch.randn(1, first + 2 * then, D_MODEL, generator=generator)
            state = block.init_state(1, first + 2 * then)
            block(x[:, :first], state)
            mark = StateMark([state])
            expected = block(x[:, first : first + then], state)
            if can_rewind([state]):
                rewind([state], first)
            else:
                mark.restore([state])
            assert state.length == first
            again = block(x[:, first : first + then], state)
            assert torch.equal(again, expected)
            assert state.length == first + then


def test_only_caches_with_a_place_for_every_token_are_set_back() -> None:
    rewinding = set()
    for name in CAUSAL:
        state = build_sub_block(mixer_spec(name)).init_state(1, 8)
        rewinding |= {name} if can_rewind([state]) else set()
    assert {"softmax", "relu_attention", "aft_full"} <= rewinding
    assert not rewinding & {"sliding_window", "gla", "mamba", "rwkv", "hyena", "linear_elu"}
    convolved = MixerSpec(D_MODEL, "softmax", *HEADS, 8, options=(("qkv_dconv", 3),))
    assert not can_rewind([build_sub_block(convolved).init_state(1, 8)])


@pytest.mark.parametrize("name", CAUSAL)
def test_greedy_tokens_are_those_of_the_target_alone(name: str) -> None:
    target = network(mixer_layer(name), mixer_layer(name))
    prompt = [1, 5, 3, 2, 7]
    expected = greedy(target, prompt)
    for draft in (disturbed(target, 0.3), network(mixer_layer("softmax"), seed=9)):
        run = Speculation(target, draft, prompt, TOKENS, temperature=0)
        assert list(run) == expected
        assert run.facts.num_tokens == TOKENS


@pytest.mark.parametrize("draft_tokens", [1, 2, 5, 50])
def test_mixed_networks_any_number_of_drafts_and_any_length(draft_tokens: int) -> None:
    target = network(
        mixer_layer("softmax"), mixer_layer("sliding_window"), mixer_layer("gla", norm="layernorm"),
        mixer_layer("softmax", kv_shared=True),
        LayerArch(mixer="mamba", num_heads=4, ffn="rwkv_channelmix", intermediate_size=16),
    )  # fmt: skip
    draft = disturbed(target, 0.2)
    for tokens in (0, 1, 2, 3, TOKENS):
        run = Speculation(target, draft, [4], tokens, 0, draft_tokens=draft_tokens)
        assert list(run) == greedy(target, [4], tokens)


def test_learned_positions_are_not_left() -> None:
    family = Family(max_tokens=20, embedding_position="learned")
    arch = Arch(D_MODEL, 8, VOCABULARY, (mixer_layer("softmax"),), family)
    target = Subnet(arch).reset(torch.Generator().manual_seed(0)).requires_grad_(False)
    run = Speculation(target, disturbed(target, 0.2), [1, 2], 18, 0)
    assert list(run) == greedy(target, [1, 2], 18)


def test_a_perfect_draft_is_accepted_and_a_useless_one_costs_few_drafts() -> None:
    target = network(mixer_layer("softmax"))
    run = Speculation(target, target, [1], 41, 0, draft_tokens=4)
    assert list(run) == greedy(target, [1], 41)
    facts = run.facts
    assert (facts.num_drafted, facts.num_accepted, facts.target_calls) == (32, 32, 8)
    assert facts.acceptance == 1.0 and facts.tokens_per_target_call == 5.0
    contrary = copy.deepcopy(target)
    contrary.ends.head.weight.neg_()
    run = Speculation(target, contrary, [1], 41, 0, draft_tokens=8)
    assert list(run) == greedy(target, [1], 41)
    assert run.facts.acceptance == 0.0 and run.facts.tokens_per_target_call == 1.0
    assert run.facts.num_drafted < 2 * 41


def test_a_recurrent_target_reads_again_in_few_calls() -> None:
    target = network(mixer_layer("gla"))
    contrary = copy.deepcopy(target)
    contrary.ends.head.weight.neg_()
    lengths: list[int] = []
    target.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    run = Speculation(target, contrary, [1], TOKENS, 0, draft_tokens=1)
    tokens = list(run)
    assert max(lengths) <= speculation.REPLAYED_TOKENS + 2
    assert len(lengths) < 1.1 * TOKENS
    lengths.clear()
    assert tokens == greedy(target, [1])


def test_ties_are_settled_step_by_step() -> None:
    target = network(mixer_layer("softmax"), mixer_layer("gla"))
    with torch.no_grad():
        # Each token has a twin with the same logit.
        target.ends.head.weight[6:12] = target.ends.head.weight[:6]
    expected = greedy(target, [1])
    run = Speculation(target, disturbed(target, 0.1), [1], TOKENS, 0)
    assert list(run) == expected
    assert run.facts.num_recounted > TOKENS // 2


def test_exact_settles_what_rounding_of_activations_might_turn() -> None:
    layer = mixer_layer("softmax", mixer_precision="int8", ffn_precision="int8")
    target = network(layer, layer).pack()
    draft = network(mixer_layer("gla"))
    run = Speculation(target, draft, [1, 2], TOKENS, 0)
    assert list(run) == greedy(target, [1, 2])
    assert run.near > NEAR and not run.facts.near_enough
    loose = Speculation(target, draft, [1, 2], TOKENS, 0, exact=False)
    assert loose.near == NEAR and loose.facts.near_enough
    assert "may differ from decoding without a draft" in loose.facts.sentence()
    drawn = Speculation(target, draft, [1, 2], TOKENS, 0.8, exact=False)
    assert not drawn.facts.near_enough


def test_greedy_verdict_by_hand() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 2.9], [0.0, 0.0, 5.0]])
    never: Callable[[int], int] = lambda place: pytest.fail("no tie is near")  # noqa: E731
    assert greedy_verdict([1, 0], logits, 0.01, never) == (2, 2)
    assert greedy_verdict([1, 2], logits, 0.01, never) == (1, 0)
    assert greedy_verdict([2, 0], logits, 0.01, never) == (0, 1)
    asked: list[int] = []
    turned = greedy_verdict([1, 2], logits, 0.2, lambda place: asked.append(place) or 2)  # type: ignore[func-returns-value]
    assert turned == (2, 2) and asked == [1]


def chi_square(counts: Counter[Any], probs: dict[Any, float], total: int) -> float:
    """Pearson's statistic, which is about as large as there are outcomes where `probs` hold."""
    return sum((counts[k] - total * p) ** 2 / (total * p) for k, p in probs.items())


def test_sampling_keeps_the_distribution_of_the_target() -> None:
    """Tables stand for networks: row i holds the probabilities behind token i."""
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(2, 4, 4, generator=generator) * 1.5).softmax(-1)
    total, first = 4_000, 0
    counts: Counter[tuple[int, ...]] = Counter()
    naive: Counter[tuple[int, ...]] = Counter()
    for _ in range(total):
        tokens = [first]
        while len(tokens) < 4:
            drafted: list[int] = []
            for _ in range(2):
                row = q[[*tokens, *drafted][-1]]
                drafted.append(int(torch.multinomial(row, 1, generator=generator)))
            seen = [tokens[-1], *drafted]
            accepted, last = sampling_verdict(
                drafted, [q[t] for t in seen[:-1]], p[seen], generator
            )
            tokens += [*drafted[:accepted], last]
        counts[tuple(tokens[1:4])] += 1
        naive[(*drafted, last)] += 1
    wanted = {
        (a, b, c): float(p[first, a] * p[a, b] * p[b, c])
        for a in range(4) for b in range(4) for c in range(4)
    }  # fmt: skip
    assert sum(wanted.values()) == pytest.approx(1.0, abs=1e-5)
    # 63 degrees of freedom: above 120 once in 50,000 times.
    assert chi_square(counts, wanted, total) < 120
    assert chi_square(naive, wanted, total) > 300, "keeping every draft would not be noticed"


def test_networks_draw_from_the_distribution_of_the_target() -> None:
    target = network(mixer_layer("softmax"), vocabulary=3)
    draft = disturbed(target, 0.8)
    generator = torch.Generator().manual_seed(0)
    total, temperature = 400, 1.5
    counts: Counter[tuple[int, ...]] = Counter()
    accepted = drafted = 0
    for _ in range(total):
        run = Speculation(target, draft, [1, 2], 3, temperature, generator)
        counts[tuple(run)] += 1
        accepted, drafted = accepted + run.facts.num_accepted, drafted + run.facts.num_drafted
    assert 0.2 < accepted / drafted < 0.98

    def chance(tokens: tuple[int, ...]) -> float:
        logits: Tensor = target(torch.tensor([[1, 2, *tokens]]))[0] / temperature
        rows = logits.softmax(-1)
        return float(torch.stack([rows[1 + i, t] for i, t in enumerate(tokens)]).prod())

    wanted = {(a, b, c): chance((a, b, c)) for a in range(3) for b in range(3) for c in range(3)}
    # 26 degrees of freedom: above 65 once in 30,000 times.
    assert chi_square(counts, wanted, total) < 65


def test_a_seed_gives_the_same_text() -> None:
    target = network(mixer_layer("gla"))
    draft = disturbed(target, 0.3)
    runs = [
        list(Speculation(target, draft, [1], 30, 0.8, torch.Generator().manual_seed(seed)))
        for seed in (5, 5, 6)
    ]
    assert runs[0] == runs[1] != runs[2]


def test_networks_that_do_not_fit_are_refused() -> None:
    target = network(mixer_layer("softmax"))
    with pytest.raises(UserError, match="the draft knows 5 tokens and the target 13"):
        Speculation(target, network(mixer_layer("softmax"), vocabulary=5), [1], 4)
    with pytest.raises(UserError, match="draft_tokens=0 drafts nothing"):
        Speculation(target, target, [1], 4, draft_tokens=0)
    with pytest.raises(UserError, match="the prompt is empty"):
        Speculation(target, target, [], 4)
    encoder = Arch(
        D_MODEL, 8, VOCABULARY, (mixer_layer("softmax"),), Family(kind="encoder", num_classes=2)
    )
    with pytest.raises(UserError, match="only a decoder can draft"):
        Speculation(target, Subnet(encoder), [1], 4)


@pytest.fixture(scope="module")
def folders(
    tmp_path_factory: pytest.TempPathFactory, space: SearchSpace, task: LanguageModelTask
) -> Path:
    supernet = Supernet(space, torch.Generator().manual_seed(0))
    place = tmp_path_factory.mktemp("subnets")
    for name, arch in (("large", space.largest()), ("small", space.smallest())):
        supernet.extract(arch).pack().save(place / name)
        assert task.tokenizer is not None
        task.tokenizer.save(place / name / TOKENIZER_FILE)
    return place


def test_a_draft_is_a_folder_or_an_arch_beside(folders: Path, tmp_path: Path) -> None:
    assert find_draft(folders / "large", "small").samefile(folders / "small")
    assert find_draft(folders / "large", str(folders / "small")) == folders / "small"
    with pytest.raises(UserError, match=r"draft 'smal' is neither .* there are small"):
        find_draft(folders / "large", "smal")
    with pytest.raises(UserError, match="different tokenizers"):
        check_tokenizers(folders / "large", tmp_path)


def test_the_command_prints_the_same_text_and_what_drafting_brought(
    folders: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hw_profiles.process.prepare_process", lambda: None)
    command = ["generate", str(folders / "large"), "--prompt", "def ", "--temperature", "0"]
    command += ["--max-tokens", "20"]
    assert main(command) == 0
    plain = capsys.readouterr()
    assert main([*command, "--draft", "small", "--draft-tokens", "3"]) == 0
    drafted = capsys.readouterr()
    assert drafted.out == plain.out and len(plain.out) > 10
    assert "drafted tokens accepted" in drafted.err and "as fast as the target" in drafted.err
    assert main([*command, "--draft", "none"]) == 2
    assert "neither an exported folder nor an arch id" in capsys.readouterr().err


def test_facts_add_up(folders: Path) -> None:
    pieces, run = speculate_text(folders / "large", "small", "import ", 24, temperature=0)
    assert "".join(pieces)
    facts = run.timed()
    assert facts.num_tokens == 24
    assert facts.num_accepted + facts.target_calls >= 23
    assert 0 <= facts.draft_seconds < facts.seconds
    assert facts.speedup == pytest.approx(facts.plain_seconds_per_token * 23 / facts.seconds)
    assert facts.to_dict()["acceptance"] == facts.acceptance
    assert SpeculationFacts().speedup == 0.0
