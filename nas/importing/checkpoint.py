"""A checkpoint folder: what it is, and its weights in our terms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nas.importing import bert, gpt2, llama
from nas.importing.config_keys import CheckpointConfig
from nas.importing.recipe import Recipe
from nas.importing.weights import Weights
from searchspace.errors import UserError
from searchspace.subnet import Subnet
from searchspace.supernet import Supernet
from searchspace.untrusted import read_small_json

BERT, GPT2 = "BertForSequenceClassification", "GPT2LMHeadModel"
ARCHITECTURES = (*llama.KINDS, GPT2, BERT)
OF_MODEL_TYPE = {
    "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM", "gpt2": GPT2, "bert": BERT,
}  # fmt: skip
"""What a config that names no class means."""


@dataclass(frozen=True)
class Checkpoint:
    """A folder that has been looked through: everything fits, and no weight has been read.

    Args:
        folder: of config.json and weights.
        recipe: what it is.
        weights: where its tensors lie.
    """

    folder: Path
    recipe: Recipe
    weights: Weights

    @property
    def cls_token(self) -> int:
        """Id of the token that stands first in every input of a BERT."""
        found = _token_id(self.folder, "[CLS]")
        assert found is not None
        return found

    def labels(self) -> list[str]:
        """Return the names of a classifier's classes in order; empty where it has none."""
        number, given = self.recipe.family.num_classes, _config(self.folder).get("id2label")
        if not number or not isinstance(given, Mapping):
            return []
        return [str(given.get(str(index), "")) for index in range(number)]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield our name and fp32 values of every parameter, one after another."""
        for name, part in self.recipe.parts.items():
            yield name, part.make(*(self.weights.read(source) for source in part.sources))

    @torch.no_grad()
    def fill(self, supernet: Supernet) -> None:
        """Copy the weights into a supernet, whose largest network then is this checkpoint.

        Args:
            supernet: of a space whose largest arch is the recipe's, with a shorter table of
                positions at most.

        Raises:
            UserError: when the space's largest arch is another network.
        """
        subnet = supernet.view(supernet.space.largest())
        params = dict(subnet.named_parameters())
        if set(params) != set(self.recipe.parts):
            odd = sorted(set(params) ^ set(self.recipe.parts))[0]
            raise UserError(
                f"the largest network of space {supernet.space.name!r} is not {self.folder}: "
                f"{odd!r} is on one side only"
            )
        for name, values in self.tensors():
            target = params[name]
            if name == "ends.positions":
                values = values[: len(target)]
            if values.shape != target.shape:
                raise UserError(
                    f"the largest network of space {supernet.space.name!r} is not {self.folder}: "
                    f"{name} has shape {tuple(target.shape)}, the checkpoint {tuple(values.shape)}"
                )
            target.copy_(values)

    def subnet(self) -> Subnet:
        """Return the network itself, ready for inference."""
        with torch.device("meta"):
            subnet = Subnet(self.recipe.arch)
        tensors = {name: values.contiguous() for name, values in self.tensors()}
        subnet.load_state_dict(tensors, assign=True)
        return subnet.eval().requires_grad_(False)


def read_checkpoint(folder: Path) -> Checkpoint:
    """Look through a Hugging Face folder; nothing in it is executed, and no weight is read yet.

    Args:
        folder: with `config.json`, safetensors files, and perhaps `tokenizer.json`.

    Raises:
        UserError: saying why it cannot be brought in.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; give one with config.json and model.safetensors")
    values = _config(folder)
    architecture = _architecture(values)
    config, weights = CheckpointConfig(values), Weights.of(folder)
    if architecture == BERT:
        recipe = bert.recipe(architecture, config, _token_id(folder, "[CLS]"))
    elif architecture == GPT2:
        recipe = gpt2.recipe(architecture, config, "wte.weight" not in weights.stored)
    else:
        recipe = llama.recipe(architecture, config)
    config.finish()
    weights.check(recipe.sources(), recipe.meaningless)
    recipe.arch  # noqa: B018  (sizes that do not fit together are said here)
    return Checkpoint(folder, recipe, weights)


def _config(folder: Path) -> dict[str, Any]:
    values = read_small_json(folder, "config.json", "config of a checkpoint")
    if not isinstance(values, dict):
        raise UserError(f"{folder / 'config.json'} is no config of a checkpoint: it holds no keys")
    return values


def _architecture(values: Mapping[str, Any]) -> str:
    """Return the class of transformers that a config names.

    Raises:
        UserError: when it is none that can be brought in.
    """
    if "quantization_config" in values:
        raise UserError("the checkpoint is quantized; bring in the one it was made from")
    named = values.get("architectures")
    model_type = values.get("model_type")
    if isinstance(named, list) and len(named) == 1:
        name = str(named[0])
    else:
        name = OF_MODEL_TYPE.get(str(model_type), str(model_type))
    if name in ("BertForMaskedLM", "BertForPreTraining", "BertModel"):
        raise UserError(
            f"{name} predicts masked tokens, which no task here trains or judges; bring in a "
            "BertForSequenceClassification, such as one fine-tuned from it"
        )
    if name not in ARCHITECTURES:
        raise UserError(
            f"{name} cannot be brought in; choose a checkpoint of {', '.join(ARCHITECTURES)}"
        )
    return name


def _token_id(folder: Path, token: str) -> int | None:
    """Return the id of a token in the folder's tokenizer.json; None where there is none."""
    if not (folder / "tokenizer.json").exists():
        return None
    values = read_small_json(folder, "tokenizer.json", "tokenizer")
    model = values.get("model") if isinstance(values, dict) else None
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    found = vocabulary.get(token) if isinstance(vocabulary, dict) else None
    return found if type(found) is int else None
