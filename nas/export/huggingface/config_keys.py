"""What `config.json` says in the words of transformers, beside the exact arch."""

from __future__ import annotations

from typing import Any

from nas.export.base import Handover
from searchspace.arch import Arch, LayerArch, width_of_head
from searchspace.specs import ABSENT

MODELING_FILE = "modeling_hwnas"
CLASSES = {
    "decoder": ("AutoModelForCausalLM", "HwnasForCausalLM"),
    "encoder": ("AutoModelForSequenceClassification", "HwnasForSequenceClassification"),
    "vit": ("AutoModelForImageClassification", "HwnasForImageClassification"),
}
"""For every kind of family the class of transformers that loads it, and ours."""


def config_keys(handover: Handover) -> dict[str, Any]:
    """Return the keys that transformers reads."""
    arch, task = handover.arch, handover.task
    auto_class, own_class = CLASSES[arch.family.kind]
    keys: dict[str, Any] = {
        "model_type": "hwnas",
        "architectures": [own_class],
        "auto_map": {
            "AutoConfig": f"{MODELING_FILE}.HwnasConfig",
            auto_class: f"{MODELING_FILE}.{own_class}",
        },
        # Packed weights have dtypes of their own, which stay as they are.
        "dtype": "float32",
        "hidden_size": arch.d_model,
        "num_hidden_layers": len(arch.layers),
        "tie_word_embeddings": False,
    }
    if arch.family.kind != "vit":
        keys |= {"vocab_size": arch.vocab_size, "max_position_embeddings": int(task["seq_len"])}
    else:
        family = arch.family
        keys |= {"image_size": family.image_size, "patch_size": family.patch_size}
        keys["num_channels"] = family.channels
    if arch.family.num_classes:
        names = task.get("classes") or [f"LABEL_{i}" for i in range(arch.family.num_classes)]
        keys["id2label"] = {str(index): str(name) for index, name in enumerate(names)}
        keys["label2id"] = {str(name): index for index, name in enumerate(names)}
    if arch.family.pad_token >= 0:
        keys["pad_token_id"] = arch.family.pad_token
    if handover.tokenizer is not None:
        end = handover.tokenizer.end_of_text
        keys |= {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    return keys | layer_keys(arch)


def layer_keys(arch: Arch) -> dict[str, Any]:
    """Return `per_layer_config`; what all layers agree in stands outside of it, once.

    transformers refuses a key that some layers lack, so every layer gives them all: a half that is
    left out has size 0 and is named in `skip`, as ``"self_attn"`` or ``"mlp"``.
    """
    layers: list[dict[str, Any]] = []
    for layer in arch.layers:
        layers.append(
            {
                "mixer": layer.mixer,
                "num_attention_heads": layer.num_heads,
                "num_key_value_heads": layer.num_kv_heads,
                "head_dim": width_of_head(layer, arch.d_model, arch.head_dim),
                "ffn": layer.ffn,
                "intermediate_size": layer.intermediate_size,
            }
        )
    shared = {
        name: value
        for name, value in (layers[0] if layers else {}).items()
        if all(layer[name] == value for layer in layers)
    }
    per_layer: dict[str, dict[str, Any]] = {}
    for slot, (layer, values) in enumerate(zip(arch.layers, layers, strict=True)):
        own = {name: value for name, value in values.items() if name not in shared}
        skipped = ["mlp"] * (not layer.intermediate_size)
        skipped += ["self_attn"] * (layer.mixer == ABSENT)
        if skipped:
            own["skip"] = skipped
        if own:
            per_layer[str(slot)] = own
    return {**shared, "per_layer_config": per_layer} if per_layer else shared


def registries_used(handover: Handover) -> dict[str, set[str]]:
    """Return the names that a network uses of every registry of `searchspace`."""
    arch, family = handover.arch, handover.arch.family
    layers = arch.layers
    norms = {layer.norm for layer in layers} | {family.final_norm, family.embedding_norm}
    norms.add(LayerArch.norm)  # the default, which a skipped slot has until it drops it
    precisions = {p for layer in layers for p in (layer.mixer_precision, layer.ffn_precision)}
    return {
        "MIXERS": {layer.mixer for layer in layers},
        "FFNS": {layer.ffn for layer in layers},
        "NORMS": norms,
        "PRECISIONS": precisions | {"fp32"},
        "REWRITES": set(handover.rewrites),
    }
