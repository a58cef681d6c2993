"""Hugging Face folders: they need no hwnas, and do what users of transformers expect."""

from __future__ import annotations

import ast
import importlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from nas.export.huggingface import HuggingFaceExporter, row_groups
from nas.export.huggingface import bundle as bundling
from nas.export.huggingface.bundle import bundle, definer
from nas.export.huggingface.config_keys import layer_keys
from nas.export.huggingface.row_groups import RowGroups, run_rows
from nas.export.huggingface.tokenizer_files import save_tokenizer
from nas.tasks.tokenizers import BytePairTokenizer, ByteTokenizer, load_tokenizer
from searchspace.arch import Arch, LayerArch
from searchspace.ffn import FFNS
from searchspace.mixers import MIXERS
from searchspace.precisions import PRECISIONS
from searchspace.subnet import Subnet
from tests.nas.export_cases import (
    CASES,
    ENCODER,
    GATED,
    LLAMA,
    LOW_BIT,
    VIT,
    VOCAB,
    handover,
    inputs_of,
    random_subnet,
    relative,
    run_elsewhere,
    write,
)

transformers = pytest.importorskip("transformers")
OURS = {"nas", "nas_kernels", "searchspace", "hw_profiles", "predictors"}
TEXTS = [
    "",
    "def f(x):\n    return x\n\n",
    "naïve Σ 日本語 🙂\r\n\tend",
    "a<|endoftext|>b",
    "\x00 \x7f",
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("folders")
    exporter = HuggingFaceExporter()
    return {name: write(exporter, handover(arch), root / name) for name, arch in CASES.items()}


@pytest.fixture(scope="module")
def models(folders: dict[str, Path]) -> dict[str, Any]:
    from nas.export.huggingface.exporter import load_model

    return {name: load_model(folder) for name, folder in folders.items()}


@pytest.mark.slow
def test_folders_load_where_none_of_our_packages_is_installed(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    found = run_elsewhere(list(folders.values()), tmp_path)
    for logits, arch in zip(found, CASES.values(), strict=True):
        with torch.inference_mode():
            expected = random_subnet(arch)(inputs_of(arch))
        assert relative(logits, expected) < 1e-6


@pytest.mark.parametrize("name", list(CASES))
def test_our_own_loader_reads_the_same_folder(name: str, folders: dict[str, Path]) -> None:
    arch = CASES[name]
    with torch.inference_mode():
        loaded = Subnet.load(folders[name])
        assert torch.equal(loaded(inputs_of(arch)), random_subnet(arch)(inputs_of(arch)))


@pytest.mark.parametrize("name", list(CASES))
def test_a_saved_model_is_the_same_to_both_loaders(
    name: str, models: dict[str, Any], tmp_path: Path
) -> None:
    from nas.export.huggingface.exporter import load_model

    model, inputs = models[name], inputs_of(CASES[name])
    model.save_pretrained(tmp_path / "again")
    again = load_model(tmp_path / "again")
    with torch.inference_mode():
        expected = model(inputs).logits
        assert torch.equal(again(inputs).logits, expected)
        assert torch.equal(Subnet.load(tmp_path / "again")(inputs), expected)


def test_packed_weights_survive_loading_in_another_dtype(folders: dict[str, Path]) -> None:
    from nas.export.huggingface.exporter import load_model

    stored = load_file(folders["low_bit"] / "model.safetensors")
    plain = load_model(folders["low_bit"]).state_dict()
    assert all(torch.equal(plain[name], tensor) for name, tensor in stored.items())
    half = load_model(folders["low_bit"], dtype=torch.bfloat16).state_dict()
    packed = [name for name, tensor in random_subnet(LOW_BIT).named_buffers()]
    assert len(packed) > 30
    assert all(torch.equal(half[name], stored[name]) for name in packed)
    assert half["ends.embedding"].dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["llama", "gated", "low_bit"])
def test_generation_with_a_cache_is_generation_without(name: str, models: dict[str, Any]) -> None:
    model, prompt = models[name], inputs_of(CASES[name], 2, 7)
    options: dict[str, Any] = {"max_new_tokens": 9, "min_new_tokens": 9}
    options["attention_mask"] = torch.ones_like(prompt)
    for how in ({"do_sample": False}, {"do_sample": True}, {"num_beams": 3}):
        texts = []
        for use_cache in (True, False):
            torch.manual_seed(5)
            texts.append(model.generate(prompt, **options, **how, use_cache=use_cache))
        assert texts[0].shape == (2, 16)
        assert torch.equal(*texts)


@pytest.mark.parametrize("how", [{"do_sample": False}, {"num_beams": 2}])
def test_a_padded_batch_says_what_each_prompt_says_alone(
    how: dict[str, Any], models: dict[str, Any]
) -> None:
    model, prompts = models["gated"], inputs_of(GATED, 3, 9)
    mask = torch.ones_like(prompts)
    mask[0, :5], mask[2, :5] = 0, 0
    options = {"max_new_tokens": 8, "min_new_tokens": 8, **how}
    together = model.generate(prompts, attention_mask=mask, **options)
    for row, start in enumerate((5, 0, 5)):
        alone = model.generate(prompts[row : row + 1, start:], **options)
        assert torch.equal(together[row, start:], alone[0])


def test_a_text_is_gone_on_with_where_it_was_left(models: dict[str, Any]) -> None:
    model, prompt = models["gated"], inputs_of(GATED, 1, 5)
    options = {"do_sample": False, "min_new_tokens": 6, "max_new_tokens": 6}
    first = model.generate(prompt, return_dict_in_generate=True, **options)
    second = model.generate(first.sequences, past_key_values=first.past_key_values, **options)
    assert torch.equal(second, model.generate(first.sequences, **options))


def test_the_loss_is_that_of_the_next_tokens_and_not_of_padding(models: dict[str, Any]) -> None:
    model, tokens = models["llama"], inputs_of(LLAMA, 2, 9)
    subnet = random_subnet(LLAMA)
    losses = []
    for row, start in ((0, 0), (1, 4)):
        part = tokens[row : row + 1, start:]
        logits = subnet(part)[0, :-1].log_softmax(-1)
        losses += [-float(logits[t, part[0, t + 1]]) for t in range(part.shape[1] - 1)]
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    found = model(tokens, attention_mask=mask, labels=tokens)
    assert float(found.loss.detach()) == pytest.approx(np.mean(losses), rel=1e-5)
    found.loss.backward()
    assert model.ends.embedding.grad.abs().sum() > 0
    model.zero_grad()
    as_tuple = model(tokens, labels=tokens, return_dict=False)
    assert as_tuple[1].shape == (2, 9, VOCAB)


def test_logits_to_keep_are_the_last_ones(models: dict[str, Any]) -> None:
    tokens = inputs_of(LLAMA, 2, 9)
    mask = torch.ones_like(tokens)
    for start in (0, 3):
        mask[0, :start] = 0
        whole = models["llama"](tokens, attention_mask=mask).logits
        kept = models["llama"](tokens, attention_mask=mask, logits_to_keep=2).logits
        assert relative(kept, whole[:, -2:]) < 1e-6


def test_an_encoder_gets_padding_as_it_was_trained_with(models: dict[str, Any]) -> None:
    model, tokens = models["encoder"], inputs_of(ENCODER, 2, 9)
    mask = torch.ones_like(tokens)
    mask[0, 5:], mask[1, :2] = 0, 0
    trained_on = torch.full((2, 16), ENCODER.family.pad_token)
    trained_on[0, :5], trained_on[1, :7] = tokens[0, :5], tokens[1, 2:]
    expected = random_subnet(ENCODER)(trained_on)
    found = model(tokens, attention_mask=mask, labels=torch.tensor([1, 2]))
    assert relative(found.logits, expected) < 1e-6
    wanted = -(expected.log_softmax(-1)[0, 1] + expected.log_softmax(-1)[1, 2]) / 2
    assert float(found.loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    assert model.config.id2label == {i: f"class {i}" for i in range(3)}


def test_an_encoder_without_a_pad_token_gets_no_padding(tmp_path: Path) -> None:
    from dataclasses import replace

    from nas.export.huggingface.exporter import load_model

    arch = replace(ENCODER, family=replace(ENCODER.family, pad_token=-1))
    model = load_model(write(HuggingFaceExporter(), handover(arch), tmp_path / "net"))
    tokens = inputs_of(arch, 3, 9)
    mask = torch.ones_like(tokens)
    mask[0, 5:], mask[2, 5:] = 0, 0
    found, subnet = model(tokens, attention_mask=mask).logits, random_subnet(arch)
    for row, end in enumerate((5, 9, 5)):
        assert relative(found[row], subnet(tokens[row : row + 1, :end])[0]) < 1e-6


def test_images_have_a_loss_too(models: dict[str, Any]) -> None:
    images, labels = inputs_of(VIT), torch.tensor([0, 3, 1])
    found = models["vit"](pixel_values=images, labels=labels)
    wanted = torch.nn.functional.cross_entropy(random_subnet(VIT)(images), labels)
    assert float(found.loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)


def test_what_cannot_be_is_refused_in_a_sentence(
    models: dict[str, Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    from nas.export.huggingface.exporter import load_model

    tokens = inputs_of(LLAMA, 2, 9)
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 3\)"):
        models["llama"](tokens, attention_mask=torch.ones(2, 3))
    with pytest.raises(ValueError, match="past_key_values is a DynamicCache"):
        models["llama"](tokens, past_key_values=transformers.DynamicCache())
    with pytest.raises(ValueError, match="stateful"):
        models["llama"].generate(tokens[:1], assistant_model=models["gated"], max_new_tokens=4)
    shutil.copytree(folders["llama"], tmp_path / "net")
    weights = tmp_path / "net" / "model.safetensors"
    tensors = load_file(weights)
    del tensors["ends.head.weight"]
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(ValueError, match=r"missing_keys ends\.head\.weight"):
        load_model(tmp_path / "net")


def test_a_model_made_from_a_config_is_initialised(models: dict[str, Any]) -> None:
    config = models["llama"].config
    fresh = type(models["llama"])(config)
    assert all(torch.isfinite(p).all() for p in fresh.parameters())
    assert 0.5 < float(fresh.ends.embedding.detach().std()) < 2.0


def test_the_layers_are_told_as_transformers_names_them(models: dict[str, Any]) -> None:
    keys = layer_keys(LLAMA)["per_layer_config"]
    assert keys["1"]["skip"] == ["self_attn"]
    assert keys["2"]["skip"] == ["mlp", "self_attn"]
    config = models["llama"].config
    layers = config.per_layer_config
    assert [layer.intermediate_size for layer in layers] == [48, 16, 0, 0, 40]
    assert [layer.num_key_value_heads for layer in layers] == [2, 0, 0, 1, 2]
    assert [layer.skip for layer in layers][3] == ["mlp"]
    same = Arch(32, 8, VOCAB, LLAMA.layers[:1] * 2)
    assert layer_keys(same) == {
        "mixer": "softmax", "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "ffn": "swiglu", "intermediate_size": 48,
    }  # fmt: skip


def test_only_the_code_that_is_used_is_copied(folders: dict[str, Path]) -> None:
    assert (folders["llama"] / "hwnas_mixers_softmax.py").exists()
    assert not (folders["llama"] / "hwnas_mixers_gla.py").exists()
    assert not (folders["llama"] / "hwnas_rewrites_centring.py").exists()
    assert (folders["gated"] / "hwnas_mixers_gla.py").exists()
    registry = (folders["gated"] / "hwnas_mixers.py").read_text()
    assert '"qrnn": QRNN' in registry and "mamba" not in registry
    for path in folders["low_bit"].glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                assert str(node.module).partition(".")[0] not in OURS
    expected = "searchspace.mixers.softmax", "SoftmaxAttention"
    assert definer("searchspace.mixers", "SoftmaxAttention") == expected
    with pytest.raises(ValueError, match="does not define Nonsense"):
        definer("searchspace.mixers", "Nonsense")


MADE_UP = {
    "__init__": "from made_up.one import f as g\nTABLE = {'a': g, 'b': 2}\n",
    "one": """
import torch
from torch import Tensor
from typing import TYPE_CHECKING, Any
if TYPE_CHECKING:
    from made_up import two
@torch.library.custom_op(
    'made_up::f', mutates_args=())
def f(x: Tensor) -> Tensor:
    return x + 1
@f.register_fake
def _(x):
    return x
""",
    "two": """
from made_up import TABLE, three, g
__all__ = ['run']
def run(x):
    from made_up.three import h
    return TABLE['a'](x) + three.h(x) + g(x) + h(x)
""",
    "three": "def h(x):\n    return 2 * x\n",
}


def test_imports_are_rewritten_and_operators_of_pytorch_are_not_defined_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "made_up"
    package.mkdir()
    for name, text in MADE_UP.items():
        (package / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(bundling.PREFIXES, "made_up", "flat")
    files = bundle("made_up.two", "root", {"TABLE": {"a"}})
    assert sorted(files) == ["flat.py", "flat_one.py", "flat_three.py", "root.py"]
    assert "'b'" not in files["flat.py"] and "TYPE_CHECKING" not in files["flat_one.py"]
    written = tmp_path / "written"
    written.mkdir()
    for name, text in {**files, "__init__.py": ""}.items():
        (written / name).write_text(text)
    found = importlib.import_module("written.root").run(torch.ones(1))
    assert float(found) == 2 + 2 + 2 + 2
    from transformers.dynamic_module_utils import get_relative_import_files

    copied = {Path(path).name for path in get_relative_import_files(written / "root.py")}
    assert copied == set(files) - {"root.py"}
    (package / "three.py").write_text("import made_up.one\n")
    bundling._source.cache_clear()
    with pytest.raises(ValueError, match="write 'from"):
        bundle("made_up.two", "root", {})


def test_folders_of_the_same_name_are_not_mixed_up(tmp_path: Path) -> None:
    from nas.export.huggingface.exporter import load_model

    for parent, arch in (("a", LLAMA), ("b", GATED)):
        model = load_model(write(HuggingFaceExporter(), handover(arch), tmp_path / parent / "net"))
        with torch.inference_mode():
            assert torch.equal(model(inputs_of(arch)).logits, random_subnet(arch)(inputs_of(arch)))
    home = str(Path.home())
    places = [getattr(m, "__file__", None) or "" for n, m in sys.modules.items() if "net." in n]
    assert places and not any(place.startswith(home) for place in places)


def test_every_operator_can_be_copied() -> None:
    used = {"MIXERS": MIXERS, "FFNS": FFNS, "NORMS": ("rmsnorm",), "PRECISIONS": ("fp32",)}
    files = bundle("searchspace.subnet", "net", {**used, "REWRITES": ()})
    for name, text in files.items():
        compile(text, name, "exec")
    assert len(files) > 60


def test_kernels_stay_behind() -> None:
    used = {"MIXERS": MIXERS, "FFNS": FFNS, "NORMS": ("rmsnorm",), "PRECISIONS": PRECISIONS}
    files = bundle("searchspace.subnet", "net", {**used, "REWRITES": ()})
    imported = {
        name.split(".")[0]
        for text in files.values()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in (
            [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
        )
    }
    assert "torch" in imported
    assert "triton" not in imported
    assert "_installed = False" in files["hwnas_kernels_dispatch.py"]


def test_rewritten_networks_are_rebuilt(tmp_path: Path) -> None:
    from nas.export.huggingface.exporter import load_model

    layer = LayerArch("softmax", 4, 2, "rope", ffn="swiglu", intermediate_size=16, norm="layernorm")
    from searchspace.family import Family

    arch = Arch(32, 8, VOCAB, (layer, layer), Family(final_norm="layernorm"))
    given = handover(arch, rewrites=("layernorm_to_rmsnorm",))
    model = load_model(write(HuggingFaceExporter(), given, tmp_path / "net"))
    with torch.inference_mode():
        found = model(inputs_of(arch)).logits
        assert torch.equal(found, given.subnet(inputs_of(arch)))
        assert relative(found, random_subnet(arch)(inputs_of(arch))) < 1e-5


@pytest.mark.parametrize("kind", ["bytes", "pairs"])
def test_the_tokenizer_is_ours(kind: str, tmp_path: Path) -> None:
    ours: Any = ByteTokenizer()
    if kind == "pairs":
        documents = [Path(__file__).read_bytes(), "naïve 日本語 🙂".encode()]
        ours = BytePairTokenizer.train(documents, 400)
    save_tokenizer(ours, tmp_path, 64)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert theirs.eos_token_id == theirs.pad_token_id == ours.end_of_text == again.end_of_text
    assert len(theirs) == ours.vocab_size == again.vocab_size
    for text in TEXTS:
        ids = ours.encode(text)
        assert theirs(text)["input_ids"] == ids == again.encode(text)
        assert theirs.decode(ids) == ours.decode(ids) == text
    some = [200, 255, ours.end_of_text, 65, 130]
    assert theirs.decode(some, skip_special_tokens=True) == ours.decode(some) == again.decode(some)


RAGGED = torch.tensor(
    [
        [0, 0, 1, 1, 1, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 1, 0, 1, 1, 1],
        [1] * 10,
        [0, 1, 1, 1, 1, 1, 1, 1, 1, 0],
    ]
)


@pytest.mark.parametrize("name", sorted(n for n, m in MIXERS.items() if "causal" in m.directions))
def test_rows_are_computed_as_if_alone_with_every_operator(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_groups, "MIN_ROOM", 4)
    heads = {"num_heads": 2, "num_kv_heads": 2} if MIXERS[name].heads != "none" else {}
    layer = LayerArch(mixer=name, **heads, ffn="rwkv_channelmix", intermediate_size=8)  # type: ignore[arg-type]
    arch = Arch(16, 8, 20, (layer, layer))
    network, tokens = random_subnet(arch), inputs_of(arch, 4, 10)
    with torch.inference_mode():
        past = RowGroups()
        parts = [
            past.logits(network, tokens[:, a:b], RAGGED[:, :b]) for a, b in ((0, 5), (5, 8), (8, 9))
        ]
        order = torch.tensor([2, 0, 3, 3])
        past.reorder_cache(order)
        tokens, mask = tokens[order], RAGGED[order]
        found = torch.cat(
            [torch.cat(parts, dim=1)[order], past.logits(network, tokens[:, 9:], mask)], 1
        )
        stateless = run_rows(network, tokens, mask)
        for row in range(4):
            there = mask[row] != 0
            alone = network(tokens[row : row + 1, there])[0]
            assert relative(found[row, there], alone) < 1e-4
            assert relative(stateless[row, there], alone) < 1e-5
            assert not found[row, ~there].any()
