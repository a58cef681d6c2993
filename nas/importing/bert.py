"""BERT with a classifier: norms behind the sums, learned positions, the first token is read.

The first token of every input is the same, so its embedding with everything that is added to it
becomes our class token, and inputs come without it. Token types other than the first are dropped:
the first is folded into the positions.

Source: Devlin et al. 2019, "BERT", section 3.
"""

from __future__ import annotations

from torch import Tensor

from nas.importing.config_keys import CheckpointConfig
from nas.importing.gpt2 import ffn_of
from nas.importing.recipe import (
    Part,
    Parts,
    Recipe,
    check_num_layers,
    layer_norm,
    linear,
    norm_name,
)
from searchspace.errors import UserError
from searchspace.family import Family
from searchspace.layer_arch import LayerArch


def recipe(architecture: str, config: CheckpointConfig, cls_token: int | None) -> Recipe:
    """Return what a `BertForSequenceClassification` checkpoint is.

    Args:
        architecture: its class in transformers.
        config: its config.
        cls_token: id of the token that stands first in every input; None where it is not known.

    Raises:
        UserError: for what we have no operator for.
    """
    d_model, num_heads = config.whole("hidden_size", 768), config.whole("num_attention_heads", 12)
    if d_model % num_heads:
        raise UserError(
            f"config.json has num_attention_heads={num_heads}, which does not divide {d_model}"
        )
    num_layers = check_num_layers(config.whole("num_hidden_layers", 12))
    norm = norm_name("layernorm", config.number("layer_norm_eps", 1e-12))
    config.require("position_embedding_type", "absolute", "positions are added to the embedding")
    config.require("is_decoder", False, "every token sees all others")
    config.require("add_cross_attention", False, "there is no other encoder to attend to")
    config.raw("tie_word_embeddings")  # of an output head that a classifier does not have
    layer = LayerArch(
        mixer="softmax",
        num_heads=num_heads,
        num_kv_heads=num_heads,
        position="nope",
        ffn=ffn_of(config.text("hidden_act", "gelu")),
        intermediate_size=config.whole("intermediate_size", 3072),
        norm=norm,
        norm_placement="post",
        mixer_options=(("bias", "all"),),
        ffn_options=(("bias", "all"),),
    )
    max_tokens = config.whole("max_position_embeddings", 512)
    vocab_size = config.whole("vocab_size", 30_522)
    family = Family(
        "encoder",
        num_classes=_num_classes(config),
        pooling="class_token",
        embedding_position="learned",
        max_tokens=max_tokens - 1,
        pad_token=_pad_token(config, vocab_size),
        final_norm="none",
        embedding_norm=norm,
        pooler="tanh",
        head_bias=True,
        mask_padding=True,
    )
    if cls_token is None or not 0 <= cls_token < vocab_size:
        raise UserError(
            "which token stands first in every input is not known: the folder's tokenizer.json has "
            f"no [CLS] below {vocab_size}; add the tokenizer"
        )
    types = config.whole("type_vocab_size", 2)
    parts = _ends(family, d_model, vocab_size, max_tokens, types, cls_token)
    for slot in range(num_layers):
        parts |= _layer(slot, d_model, layer.intermediate_size)
    return Recipe(
        architecture, layer, d_model, d_model // num_heads, vocab_size, num_layers, family, parts,
        ("embeddings.position_ids",),
    )  # fmt: skip


def _num_classes(config: CheckpointConfig) -> int:
    labels = config.raw("id2label", {0: "LABEL_0", 1: "LABEL_1"})
    number = config.raw("num_labels", len(labels) if isinstance(labels, dict) else 0)
    if type(number) is not int or number < 2:
        raise UserError(
            f"config.json has {number!r} labels; a classifier of at least 2 is needed (regression "
            "has no classes)"
        )
    return number


def _pad_token(config: CheckpointConfig, vocab_size: int) -> int:
    pad = config.raw("pad_token_id", 0)
    if type(pad) is not int or not 0 <= pad < vocab_size:
        raise UserError(f"config.json has pad_token_id={pad!r}, which is no token id")
    return pad


def _ends(
    family: Family, d_model: int, vocab_size: int, max_tokens: int, num_types: int, cls_token: int
) -> Parts:
    words = {"bert.embeddings.word_embeddings.weight": (vocab_size, d_model)}
    places = {
        "bert.embeddings.position_embeddings.weight": (max_tokens, d_model),
        "bert.embeddings.token_type_embeddings.weight": (num_types, d_model),
    }

    def class_token(word_VD: Tensor, place_TD: Tensor, type_YD: Tensor) -> Tensor:
        return word_VD[cls_token : cls_token + 1] + type_YD[:1] + place_TD[:1]

    def positions(place_TD: Tensor, type_YD: Tensor) -> Tensor:
        return place_TD[1:] + type_YD[:1]

    return {
        "ends.embedding": Part(words),
        "ends.class_token": Part({**words, **places}, class_token),
        "ends.positions": Part(places, positions),
        **layer_norm("ends.embedding_norm", "bert.embeddings.LayerNorm", d_model),
        **linear("ends.pooler", "bert.pooler.dense", d_model, d_model, True),
        **linear("ends.head", "classifier", family.num_classes, d_model, True),
    }


def _layer(slot: int, d_model: int, hidden: int) -> Parts:
    theirs = f"bert.encoder.layer.{slot}"
    mixer, ffn = f"blocks.layer{slot}_mixer", f"blocks.layer{slot}_ffn"
    parts = layer_norm(f"{mixer}.norm", f"{theirs}.attention.output.LayerNorm", d_model)
    parts |= layer_norm(f"{ffn}.norm", f"{theirs}.output.LayerNorm", d_model)
    for ours, name, rows, columns in (
        (f"{mixer}.op.q_proj", "attention.self.query", d_model, d_model),
        (f"{mixer}.op.k_proj", "attention.self.key", d_model, d_model),
        (f"{mixer}.op.v_proj", "attention.self.value", d_model, d_model),
        (f"{mixer}.op.o_proj", "attention.output.dense", d_model, d_model),
        (f"{ffn}.op.up_proj", "intermediate.dense", hidden, d_model),
        (f"{ffn}.op.down_proj", "output.dense", d_model, hidden),
    ):
        parts |= linear(ours, f"{theirs}.{name}", rows, columns, True)
    return parts
