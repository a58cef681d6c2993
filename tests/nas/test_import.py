"""`nas import`: what comes in computes what transformers computes, and the rest is refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from nas.importing.checkpoint import read_checkpoint
from nas.importing.spaces import Choices, space_around, space_toml
from nas.importing.verify import MAX_DIFFERENCE, difference_from_transformers, require_equal
from searchspace.errors import UserError
from searchspace.space import SearchSpace
from searchspace.subnet import Subnet
from searchspace.supernet import Supernet
from tests.nas.import_models import KINDS, VOCAB, model_of, save_checkpoint

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = save_checkpoint(kind, tmp_path_factory.mktemp(kind))
        return made[kind]

    return folder


@pytest.fixture
def copy_of(folders: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """Copies a checkpoint, with some keys of its config changed."""

    def copied(kind: str, **changes: Any) -> Path:
        folder = tmp_path / "copy"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(folders(kind), folder)
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        return folder

    return copied


@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_those_of_transformers(kind: str, folders: Callable[[str], Path]) -> None:
    checkpoint = read_checkpoint(folders(kind))
    found = difference_from_transformers(checkpoint, checkpoint.subnet())
    assert found is not None and found <= MAX_DIFFERENCE / 5


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_subnets_of_the_supernet_equal_their_extracted_networks(
    kind: str, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint = read_checkpoint(folders(kind))
    (tmp_path / "space.toml").write_text(
        space_toml(space_around(checkpoint.recipe, kind, Choices(width=(100, 75)), 64))
    )
    space = SearchSpace.load(str(tmp_path / "space.toml"), VOCAB)
    assert space.largest() == checkpoint.recipe.arch
    supernet = Supernet(space, torch.Generator().manual_seed(1))
    checkpoint.fill(supernet)
    inputs = torch.randint(1, VOCAB, (2, 33), generator=torch.Generator().manual_seed(2))
    original = checkpoint.subnet()(inputs)
    assert torch.equal(supernet.view(space.largest())(inputs), original)
    rng = np.random.default_rng(0)
    archs = [space.smallest(), space.sample(rng), space.sample(rng)]
    for arch in archs:
        extracted = supernet.extract(arch).eval()
        assert torch.equal(supernet.view(arch)(inputs), extracted(inputs))
        extracted.pack().save(tmp_path / arch.id)
        torch.testing.assert_close(Subnet.load(tmp_path / arch.id)(inputs), extracted(inputs))
        for name, value in extracted.named_parameters():
            assert not name.startswith("ends.head") or not checkpoint.recipe.family.tied_head
            assert value.is_floating_point()


def test_smaller_networks_keep_the_key_value_head_that_a_query_head_reads(
    folders: Callable[[str], Path],
) -> None:
    recipe = read_checkpoint(folders("llama")).recipe
    assert space_around(recipe, "s", Choices(), 64).heads == ((4, 2), (2, 1))
    recipe = read_checkpoint(folders("gpt2")).recipe
    assert space_around(recipe, "s", Choices(), 64).heads == ((4, 4), (3, 3), (2, 2), (1, 1))


def test_weights_may_lie_in_several_files_in_half_precision_and_under_short_names(
    copy_of: Callable[..., Path], folders: Callable[[str], Path]
) -> None:
    folder = copy_of("gpt2")
    tensors = load_file(folder / "model.safetensors")
    expected = read_checkpoint(folder).subnet()
    (folder / "model.safetensors").unlink()
    short = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    short["h.0.attn.bias"] = torch.ones(1, 1, 128, 128)
    places = {name: f"part-{number % 2}.safetensors" for number, name in enumerate(short)}
    for file in set(places.values()):
        save_file({n: v.clone() for n, v in short.items() if places[n] == file}, folder / file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    found = read_checkpoint(folder).subnet()
    for name, value in expected.named_parameters():
        assert torch.equal(found.get_parameter(name), value)
    llama = copy_of("llama")
    model_of("llama").to(torch.bfloat16).save_pretrained(llama)
    checkpoint = read_checkpoint(llama)
    assert checkpoint.subnet().ends.embedding.dtype == torch.float32
    assert require_equal(checkpoint, checkpoint.subnet()) is not None


def test_a_difference_from_transformers_is_refused(folders: Callable[[str], Path]) -> None:
    checkpoint = read_checkpoint(folders("qwen2"))
    network = checkpoint.subnet()
    network.ends.norm.weight.mul_(1.001)
    with pytest.raises(UserError, match="differ by"):
        require_equal(checkpoint, network)


@pytest.mark.parametrize(
    ("kind", "changes", "sentence"),
    [
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "scaled or partial"),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "scaled or partial"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("llama", {"rope_theta": 0, "rope_parameters": None}, "rope_theta=0"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("llama", {"rms_norm_eps": 1e-4}, "0.0001 under the root"),
        ("llama", {"attention_bias": True}, "lacks tensor"),
        ("llama", {"num_hidden_layers": 3}, "lacks tensor"),
        ("llama", {"num_hidden_layers": 1}, "holds tensor"),
        ("llama", {"num_hidden_layers": 10**9}, "claims 1000000000 layers"),
        ("llama", {"hidden_size": 64}, "its config.json says"),
        ("llama", {"num_key_value_heads": 4}, "its config.json says"),
        ("llama", {"vocab_size": -1}, "vocab_size=-1"),
        ("llama", {"logit_softcapping": 30.0}, "logit_softcapping=30.0"),
        ("llama", {"auto_map": {"AutoModel": "evil.Model"}}, "auto_map"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantized"),
        ("llama", {"architectures": ["MixtralForCausalLM"]}, "MixtralForCausalLM cannot be"),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "different attention"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "all layers scale scores alike"),
        ("gpt2", {"activation_function": "gelu_fast"}, "unknown activation"),
        ("bert", {"position_embedding_type": "relative_key"}, "positions are added"),
        ("bert", {"architectures": ["BertForMaskedLM"]}, "predicts masked tokens"),
        ("bert", {"id2label": {"0": "score"}}, "1 labels"),
    ],
)
def test_what_would_compute_something_else_is_refused(
    kind: str, changes: dict[str, Any], sentence: str, copy_of: Callable[..., Path]
) -> None:
    with pytest.raises(UserError, match=sentence):
        read_checkpoint(copy_of(kind, **changes))


def test_old_names_of_the_same_are_understood(copy_of: Callable[..., Path]) -> None:
    old = {"rope_parameters": None, "rope_theta": 500_000.0, "rope_scaling": None}
    checkpoint = read_checkpoint(copy_of("llama_tied", **old, torch_dtype="float16"))
    assert checkpoint.recipe.layer.position == "rope_b500000"
    found = difference_from_transformers(checkpoint, checkpoint.subnet())
    assert found is not None and found < MAX_DIFFERENCE
    assert read_checkpoint(copy_of("mistral", sliding_window=None)).recipe.layer.mixer == "softmax"
    assert read_checkpoint(copy_of("mistral", sliding_window=128)).recipe.layer.mixer == "softmax"


def test_hostile_folders_are_refused_before_anything_is_read(
    copy_of: Callable[..., Path], tmp_path: Path
) -> None:
    folder = copy_of("llama")
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.unlink()
    with pytest.raises(UserError, match="no weights file"):
        read_checkpoint(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02cos\nsystem\n")
    with pytest.raises(UserError, match="as a pickle"):
        read_checkpoint(folder)
    (folder / "pytorch_model.bin").rename(path)
    with pytest.raises(UserError, match="is a pickle"):
        read_checkpoint(folder)
    for content in (b"\xff" * 7 + b"\x7f" + b"{}", whole[:-8], whole[:5], b""):
        path.write_bytes(content)
        with pytest.raises(UserError, match="not a whole safetensors file"):
            read_checkpoint(folder)
    path.unlink()
    (tmp_path / "elsewhere").write_bytes(whole)
    os.symlink(tmp_path / "elsewhere", path)
    with pytest.raises(UserError, match="leads out of its folder"):
        read_checkpoint(folder)
    path.unlink()
    tensors = load_file(tmp_path / "elsewhere")
    save_file({**tensors, "model.norm.weight": torch.full((32,), torch.nan)}, path)
    with pytest.raises(UserError, match="not finite"):
        read_checkpoint(folder).subnet()
    save_file({**tensors, "model.norm.weight": torch.ones(32, dtype=torch.int8)}, path)
    with pytest.raises(UserError, match="holds int8"):
        read_checkpoint(folder)
    save_file({**tensors, "adapter.weight": torch.ones(1)}, path)
    with pytest.raises(UserError, match=r"adapter\.weight"):
        read_checkpoint(folder)


def test_an_index_cannot_lead_out_of_the_folder(copy_of: Callable[..., Path]) -> None:
    folder = copy_of("llama")
    names = list(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "../outside.safetensors")}))
    with pytest.raises(UserError, match="leads out of its folder"):
        read_checkpoint(folder)
    index.write_text(json.dumps({"weight_map": 3}))
    with pytest.raises(UserError, match="no weight_map"):
        read_checkpoint(folder)
