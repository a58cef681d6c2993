"""Padded Llamas: the same function in a form that needs no code of ours."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from nas.export.huggingface import HuggingFaceExporter
from nas.export.padded_llama import PaddedLlamaExporter
from nas.export.padded_llama.layout import Heads
from searchspace.arch import Arch, LayerArch
from searchspace.family import Family
from searchspace.space import SearchSpace
from searchspace.subnet import Subnet
from tests.nas.export_cases import (
    CASES,
    LLAMA,
    VOCAB,
    handover,
    inputs_of,
    random_subnet,
    relative,
    run_elsewhere,
    write,
)

pytest.importorskip("transformers")
BIASED = {"mixer_options": {"bias": "qkv"}, "ffn_options": {"bias": "all"}}


def every_layer(arch: Arch, **values: Any) -> Arch:
    """The arch with values changed in all layers that have both halves."""
    layers = (
        replace(x, **values) if x.num_heads and x.intermediate_size else x for x in arch.layers
    )
    return replace(arch, layers=tuple(layers))


FITTING = {
    "plain": LLAMA,
    "tied": replace(LLAMA, family=Family(tied_head=True)),
    "biases": every_layer(LLAMA, **BIASED),
    "another base": replace(
        LLAMA,
        layers=tuple(
            replace(x, position="rope_b500000") if x.num_heads else x for x in LLAMA.layers
        ),
    ),
    "reglu": replace(
        LLAMA,
        layers=tuple(replace(x, ffn="reglu") if x.intermediate_size else x for x in LLAMA.layers),
    ),
    "only FFNs": replace(LLAMA, layers=LLAMA.layers[1:2]),
    "only attention": replace(LLAMA, layers=LLAMA.layers[3:4]),
}


@pytest.mark.parametrize("name", list(FITTING))
def test_a_plain_llama_computes_what_the_network_does(name: str, tmp_path: Path) -> None:
    given, exporter = handover(FITTING[name]), PaddedLlamaExporter()
    assert exporter.missing() == exporter.refusal(given) == ""
    facts = exporter.write(given, tmp_path)
    assert facts["keeps"] == "function, not speed"
    assert facts["parameters"] == sum(p.numel() for p in given.subnet.parameters())
    tensors = load_file(tmp_path / "model.safetensors")
    assert facts["padded_parameters"] == sum(t.numel() for t in tensors.values())
    loaded, tokens = exporter.load(tmp_path), inputs_of(given.arch, 2, 12)
    assert type(loaded.model).__name__ == "LlamaForCausalLM"  # type: ignore[attr-defined]
    with torch.inference_mode():
        expected = given.subnet(tokens)
        assert relative(loaded.logits(tokens), expected) < 2e-6
        session = loaded.session(2, 12)
        steps = [session(tokens[:, :5]), *(session(tokens[:, t : t + 1]) for t in range(5, 12))]
        assert relative(torch.cat(steps, dim=1), expected) < 2e-6


def test_padding_is_exact_where_sums_are_taken_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A matrix product of another width may be summed in another order; zeros change nothing."""

    def in_order(x: Tensor, weight_NK: Tensor, bias: Tensor | None = None) -> Tensor:
        out = torch.zeros(*x.shape[:-1], weight_NK.shape[0])
        for k in range(weight_NK.shape[1]):
            out = out + x[..., k : k + 1] * weight_NK[:, k]
        return out if bias is None else out + bias

    PaddedLlamaExporter().write(handover(LLAMA), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    padded = _as_subnet(config, load_file(tmp_path / "model.safetensors"))
    tokens = inputs_of(LLAMA, 2, 9)
    monkeypatch.setattr(F, "linear", in_order)
    with torch.inference_mode():
        assert torch.equal(padded(tokens), random_subnet(LLAMA)(tokens))


def _as_subnet(config: dict[str, Any], tensors: dict[str, Tensor]) -> Subnet:
    """A padded folder as a network of ours."""
    layer = LayerArch(
        "softmax", config["num_attention_heads"], config["num_key_value_heads"], "rope",
        ffn="swiglu", intermediate_size=config["intermediate_size"],
    )  # fmt: skip
    layers = (layer,) * config["num_hidden_layers"]
    subnet = Subnet(Arch(config["hidden_size"], config["head_dim"], VOCAB, layers)).eval()
    names = {"model.embed_tokens.weight": "ends.embedding", "lm_head.weight": "ends.head.weight"}
    names["model.norm.weight"] = "ends.norm.weight"
    parts = {"self_attn": "mixer.op", "mlp": "ffn.op", "input_layernorm": "mixer.norm"}
    parts["post_attention_layernorm"] = "ffn.norm"
    for name in tensors.keys() - names:
        _, _, slot, part, rest = name.split(".", 4)
        names[name] = f"blocks.layer{slot}_{parts[part]}.{rest}"
    subnet.load_state_dict({names[name]: tensor for name, tensor in tensors.items()})
    return subnet


def test_halves_share_layers_and_heads_are_as_few_as_can_be(tmp_path: Path) -> None:
    PaddedLlamaExporter().write(handover(LLAMA), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    # Attention and FFN; an FFN alone; attention alone; attention and FFN: the empty slot is gone.
    assert config["num_hidden_layers"] == 4
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (4, 2)
    assert Heads.for_layers([(6, 2), (6, 1)], 96) == Heads(2, 3)
    assert Heads.for_layers([(6, 6), (3, 1)], 96) == Heads(6, 1)
    # 6 heads do not divide 64, which transformers asks for; 8 do.
    assert Heads.for_layers([(6, 2)], 64) == Heads(2, 4)
    assert Heads.for_layers([(4, 4)], 7 * 5) == Heads(5, 1)
    assert Heads.for_layers([(4, 4)], 3) is None


def test_heads_go_to_the_group_of_their_key_value_head() -> None:
    queries, groups, sources = Heads(groups=4, per_group=2).places(num_heads=6, num_kv_heads=2)
    # Three query heads of a key/value head fill one group and half of the next, its copy.
    assert queries.tolist() == [0, 1, 2, 4, 5, 6]
    assert groups.tolist() == [0, 1, 2, 3]
    assert sources.tolist() == [0, 0, 1, 1]


ODD = {
    r"layer0_mixer has mixer='gla', not 'softmax'": CASES["gated"],
    r"has precision='int8', not 'fp32'": CASES["low_bit"],
    r"a Llama is a decoder, this is a network of family 'encoder'": CASES["encoder"],
    r"family 'vit'": CASES["vit"],
    r"has norm_placement='peri', not 'pre'": every_layer(LLAMA, norm_placement="peri"),
    r"has norm='layernorm', not 'rmsnorm'": every_layer(LLAMA, norm="layernorm"),
    r"has position='nope', not 'rope'": every_layer(LLAMA, position="nope"),
    r"has position='rope_f50', not 'rope'": every_layer(LLAMA, position="rope_f50"),
    r"the same position, these have rope, rope_b500": every_layer(LLAMA, position="rope_b500"),
    r"the same ffn, these have geglu, swiglu": every_layer(LLAMA, ffn="geglu"),
    r"has ffn='relu2', not one of swiglu": every_layer(LLAMA, ffn="relu2"),
    r"has the option qkv_dconv=3": every_layer(LLAMA, mixer_options={"qkv_dconv": 3}),
    r"has the option similarity='weighted'": every_layer(
        LLAMA, mixer_options={"similarity": "weighted"}
    ),
    r"eps=1e-06, the final norm another": every_layer(LLAMA, norm="rmsnorm_e6"),
    r"ends in an RMS norm, not in final_norm='none'": replace(
        LLAMA, family=Family(final_norm="none")
    ),
    r"has no embedding_position='learned'": replace(
        LLAMA, family=Family(embedding_position="learned")
    ),
    r"neither a norm nor a linear map behind": replace(LLAMA, family=Family(embedding_size=16)),
    r"the same head width, these have 16, 8": replace(LLAMA, head_dim=0),
    r"shares keys and values": replace(
        LLAMA, layers=(LLAMA.layers[4], replace(LLAMA.layers[4], kv_shared=True))
    ),
}


@pytest.mark.parametrize("reason", list(ODD))
def test_other_networks_are_refused_with_the_reason(reason: str) -> None:
    import re

    assert re.search(re.escape(reason), PaddedLlamaExporter().refusal(handover(ODD[reason])))


def test_gguf_knows_every_tensor_of_the_folder(tmp_path: Path) -> None:
    """Its names are what llama.cpp's converter goes by."""
    gguf = pytest.importorskip("gguf")
    PaddedLlamaExporter().write(handover(every_layer(LLAMA, **BIASED)), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 4)
    found = {name: names.get_name(name, (".weight", ".bias")) for name in tensors}
    assert None not in found.values()
    assert len(set(found.values())) == len(tensors)


PRESETS: dict[str, tuple[int, dict[str, Any]]] = {
    "decoder-small": (VOCAB, {}),
    "decoder-operators": (VOCAB, {}),
    "encoder-small": (40, {"kind": "encoder", "num_classes": 3, "max_tokens": 16, "pad_token": 39}),
    "vit-small": (0, {"kind": "vit", "num_classes": 4, "image_size": 8, "channels": 1}),
}


@pytest.mark.slow
@pytest.mark.parametrize("preset", list(PRESETS))
def test_random_networks_of_a_preset_load_elsewhere(preset: str, tmp_path: Path) -> None:
    vocab, facts = PRESETS[preset]
    space, rng = SearchSpace.load(preset, vocab, facts), np.random.default_rng(7)
    folders, expected, padded = [], [], PaddedLlamaExporter()
    for number in range(20):
        given = handover(space.sample(rng), number)
        folders.append(write(HuggingFaceExporter(), given, tmp_path / f"hf{number}"))
        with torch.inference_mode():
            expected.append(given.subnet(inputs_of(given.arch)))
        if not padded.refusal(given):
            folders.append(write(padded, given, tmp_path / f"padded{number}"))
            expected.append(expected[-1])
    found = run_elsewhere(folders, tmp_path)
    assert max(map(relative, found, expected)) < 1e-5


@pytest.mark.slow
def test_random_llamas_load_elsewhere(tmp_path: Path) -> None:
    rng, folders, expected = np.random.default_rng(3), [], []
    shapes = [(4, 4), (4, 2), (4, 1), (6, 2), (6, 3), (2, 1), (3, 3), (0, 0)]
    for number in range(20):
        layers: list[LayerArch] = []
        for _ in range(int(rng.integers(1, 5))):
            heads, kv_heads = shapes[rng.integers(len(shapes))]
            width = int(rng.choice([0, 16, 40, 100]))
            mixer: dict[str, Any] = {"mixer": "softmax", "position": "rope"} if heads else {}
            ffn: dict[str, Any] = {"ffn": "swiglu", "intermediate_size": width} if width else {}
            layers.append(LayerArch(num_heads=heads, num_kv_heads=kv_heads, **mixer, **ffn))
        given = handover(Arch(int(rng.choice([32, 96])), 8, VOCAB, tuple(layers)), number)
        folders.append(write(PaddedLlamaExporter(), given, tmp_path / str(number)))
        with torch.inference_mode():
            expected.append(given.subnet(inputs_of(given.arch)))
    assert max(map(relative, run_elsewhere(folders, tmp_path), expected)) < 1e-5
