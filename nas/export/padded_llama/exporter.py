"""A plain Llama with the same function: unequal layers padded with zeros to equal ones.

It loads wherever a Llama loads, and needs no code of its own. It keeps the function, not the speed:
every layer has the size of the largest one.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from nas.export.base import Handover, Loaded, Session, WeightsAsStored
from nas.export.huggingface.tokenizer_files import save_tokenizer
from nas.export.padded_llama.layout import (
    EMPTY_WIDTH,
    Heads,
    Layer,
    attention_tensors,
    ffn_tensors,
    paired,
)
from nas.export.padded_llama.reasons import ACTIVATIONS, reasons
from searchspace.arch import Arch
from searchspace.files import write_json, write_tensors
from searchspace.norms import RMSNorm
from searchspace.position_names import Rope, parse_rope
from searchspace.sub_blocks import FFNBlock, MixerBlock
from searchspace.subnet import Subnet


class PaddedLlamaExporter(WeightsAsStored):
    """A folder for `LlamaForCausalLM`, without remote code."""

    name = "padded"
    summary = "a plain Llama folder, padded with zeros; keeps the function, not the speed"
    folder = "padded"
    max_difference = 1e-5

    def missing(self) -> str:
        """Return what to install; it is written without, but not verified."""
        if importlib.util.find_spec("transformers") is not None:
            return ""
        return "transformers is not installed; pip install 'hwnas[export]'"

    def refusal(self, handover: Handover) -> str:
        """Return why the network is no Llama, whatever is padded; see `Exporter.refusal`."""
        return next(reasons(handover.subnet), "")

    def write(self, handover: Handover, folder: Path) -> Mapping[str, Any]:
        """Write the padded folder; see `Exporter.write`."""
        subnet = handover.subnet
        tensors, sizes = padded_tensors(subnet)
        write_tensors(folder / "model.safetensors", tensors)
        config = _config(subnet.arch, sizes) | {
            "max_position_embeddings": int(handover.task["seq_len"])
        }
        if handover.tokenizer is not None:
            end = handover.tokenizer.end_of_text
            config |= {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
            save_tokenizer(handover.tokenizer, folder, int(handover.task["seq_len"]))
        write_json(folder / "config.json", config)
        return {
            "keeps": "function, not speed",
            "parameters": sum(p.numel() for p in subnet.parameters()),
            "padded_parameters": sum(tensor.numel() for tensor in tensors.values()),
        }

    def load(self, folder: Path) -> Loaded:
        """Return the folder as a plain Llama; see `Exporter.load`."""
        from transformers import LlamaForCausalLM

        return LoadedLlama(LlamaForCausalLM.from_pretrained(folder, local_files_only=True).eval())


class LoadedLlama:
    """A Llama of transformers."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def logits(self, inputs: Tensor) -> Tensor:
        """Return the logits; see `Loaded.logits`."""
        logits: Tensor = self.model(inputs, use_cache=False).logits
        return logits.float()

    def session(self, batch: int, max_tokens: int) -> Session:
        """Return what continues sequences; see `Loaded.session`."""
        from transformers import DynamicCache

        past = DynamicCache(config=self.model.config)
        return lambda tokens_BT: self.model(
            tokens_BT, past_key_values=past, use_cache=True
        ).logits.float()


def padded_tensors(subnet: Subnet) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a Llama's tensors by name, and the sizes for its config.

    Args:
        subnet: for which there is no reason against it.
    """
    d_model, ends = subnet.arch.d_model, subnet.ends
    layers = paired([cast(MixerBlock | FFNBlock, block) for block in subnet.blocks.values()])
    sizes = _sizes(layers, d_model)
    heads = Heads.of([mixer for mixer, _ in layers if mixer is not None], d_model)
    assert heads is not None
    tensors = {"model.embed_tokens.weight": ends.embedding, "model.norm.weight": _scale(ends.norm)}
    if not subnet.arch.family.tied_head:
        tensors["lm_head.weight"] = ends.head.weight
    for index, (mixer, ffn) in enumerate(layers):
        parts = {
            "self_attn": attention_tensors(mixer, heads, d_model, sizes["head_dim"]),
            "mlp": ffn_tensors(ffn, d_model, sizes["intermediate_size"]),
            "input_layernorm": {"weight": _scale_in(mixer, d_model)},
            "post_attention_layernorm": {"weight": _scale_in(ffn, d_model)},
        }
        for part, found in parts.items():
            tensors |= {f"model.layers.{index}.{part}.{name}": t for name, t in found.items()}
    sizes["rms_norm_eps"] = cast(RMSNorm, ends.norm).eps
    sizes["attention_bias"] = _drop_unused_biases(tensors, "self_attn")
    sizes["mlp_bias"] = _drop_unused_biases(tensors, "mlp")
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}, sizes


def _sizes(layers: list[Layer], d_model: int) -> dict[str, Any]:
    """Return what the config says of all layers."""
    mixers = [mixer for mixer, _ in layers if mixer is not None]
    ffns = [ffn.spec for _, ffn in layers if ffn is not None]
    heads = Heads.of(mixers, d_model)
    assert heads is not None
    rope = parse_rope(mixers[0].spec.position) if mixers else Rope()
    return {
        "num_hidden_layers": len(layers),
        "num_attention_heads": heads.queries,
        "num_key_value_heads": heads.groups,
        "head_dim": mixers[0].spec.head_dim if mixers else EMPTY_WIDTH,
        "intermediate_size": max((spec.intermediate_size for spec in ffns), default=EMPTY_WIDTH),
        "hidden_act": ACTIVATIONS[ffns[0].ffn] if ffns else "silu",
        "rope_theta": float(rope.base),
    }


def _scale(norm: nn.Module) -> Tensor:
    return cast(RMSNorm, norm).weight


def _scale_in(block: MixerBlock | FFNBlock | None, d_model: int) -> Tensor:
    return torch.ones(d_model) if block is None else _scale(block.norm)


def _drop_unused_biases(tensors: dict[str, Tensor], part: str) -> bool:
    """Remove the biases of all layers' attention or FFNs if all are zero; whether they are kept."""
    names = [name for name in tensors if f".{part}." in name and name.endswith(".bias")]
    used = any(bool(tensors[name].any()) for name in names)
    if not used:
        for name in names:
            del tensors[name]
    return used


def _config(arch: Arch, sizes: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "dtype": "float32",
        "vocab_size": arch.vocab_size,
        "hidden_size": arch.d_model,
        "tie_word_embeddings": arch.family.tied_head,
        **sizes,
        # Newer readers look here, older ones at `rope_theta` itself.
        "rope_parameters": {"rope_type": "default", "rope_theta": sizes["rope_theta"]},
    }
