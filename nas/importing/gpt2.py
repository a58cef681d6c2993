"""GPT-2: layer norms, learned positions, biases everywhere, weights stored as (in, out).

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3.
"""

from __future__ import annotations

from torch import Tensor

from nas.importing.config_keys import CheckpointConfig
from nas.importing.recipe import (
    Part,
    Parts,
    Recipe,
    check_num_layers,
    layer_norm,
    norm_name,
    same,
)
from searchspace.errors import UserError, unknown
from searchspace.family import Family
from searchspace.layer_arch import LayerArch

FFNS = {
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "gelu": "gelu_stack",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
"""Our FFN by the name of its activation in transformers."""


def recipe(architecture: str, config: CheckpointConfig, whole: bool) -> Recipe:
    """Return what a `GPT2LMHeadModel` checkpoint is.

    Args:
        architecture: its class in transformers.
        config: its config.
        whole: whether its tensors are named as those of the whole model, or, as in the files that
            were published first, as those of its body.

    Raises:
        UserError: for what we have no operator for.
    """
    d_model, num_heads = config.whole("n_embd", 768), config.whole("n_head", 12)
    if d_model % num_heads:
        raise UserError(f"config.json has n_head={num_heads}, which does not divide {d_model}")
    num_layers = check_num_layers(config.whole("n_layer", 12))
    norm = norm_name("layernorm", config.number("layer_norm_epsilon", 1e-5))
    config.require("scale_attn_weights", True, "scores are divided by the root of the head's width")
    config.require("scale_attn_by_inverse_layer_idx", False, "all layers scale scores alike")
    config.require("add_cross_attention", False, "there is no encoder to attend to")
    layer = LayerArch(
        mixer="softmax",
        num_heads=num_heads,
        num_kv_heads=num_heads,
        position="nope",
        ffn=ffn_of(config.text("activation_function", "gelu_new")),
        intermediate_size=config.whole("n_inner", 4 * d_model),
        norm=norm,
        mixer_options=(("bias", "all"),),
        ffn_options=(("bias", "all"),),
    )
    tied, max_tokens = config.flag("tie_word_embeddings", True), config.whole("n_positions", 1024)
    family = Family(
        embedding_position="learned", max_tokens=max_tokens, final_norm=norm, tied_head=tied
    )
    vocab_size, prefix = config.whole("vocab_size", 50_257), "transformer." if whole else ""
    parts = {
        "ends.embedding": same(f"{prefix}wte.weight", vocab_size, d_model),
        "ends.positions": same(f"{prefix}wpe.weight", max_tokens, d_model),
        **layer_norm("ends.norm", f"{prefix}ln_f", d_model),
    }
    if not tied:
        parts["ends.head.weight"] = same("lm_head.weight", vocab_size, d_model)
    for slot in range(num_layers):
        parts |= _layer(slot, prefix, d_model, layer.intermediate_size)
    # Old files hold the causal mask too.
    meaningless = (".attn.bias", ".attn.masked_bias", *(("lm_head.weight",) if tied else ()))
    return Recipe(
        architecture, layer, d_model, d_model // num_heads, vocab_size, num_layers, family, parts,
        meaningless,
    )  # fmt: skip


def ffn_of(activation: str) -> str:
    """Return our two-matrix FFN with an activation of transformers.

    Raises:
        UserError: when there is none.
    """
    if activation not in FFNS:
        raise unknown("activation in config.json", activation, FFNS)
    return FFNS[activation]


def _layer(slot: int, prefix: str, d_model: int, hidden: int) -> Parts:
    theirs, mixer, ffn = f"{prefix}h.{slot}", f"layer{slot}_mixer", f"layer{slot}_ffn"
    parts = layer_norm(f"blocks.{mixer}.norm", f"{theirs}.ln_1", d_model)
    parts |= layer_norm(f"blocks.{ffn}.norm", f"{theirs}.ln_2", d_model)
    for place, name in enumerate(("q_proj", "k_proj", "v_proj")):
        third = slice(place * d_model, (place + 1) * d_model)
        parts |= _convolution(
            f"blocks.{mixer}.op.{name}", f"{theirs}.attn.c_attn", 3 * d_model, d_model, third
        )
    for ours, name, rows, columns in (
        (f"blocks.{mixer}.op.o_proj", "attn.c_proj", d_model, d_model),
        (f"blocks.{ffn}.op.up_proj", "mlp.c_fc", hidden, d_model),
        (f"blocks.{ffn}.op.down_proj", "mlp.c_proj", d_model, hidden),
    ):
        parts |= _convolution(ours, f"{theirs}.{name}", rows, columns)
    return parts


def _convolution(
    ours: str, theirs: str, out_features: int, in_features: int, rows: slice = slice(None)
) -> Parts:
    """Return the parts of a map that is stored transposed; of its outputs only some `rows`."""

    def weight(stored: Tensor) -> Tensor:
        return stored.T[rows]

    def bias(stored: Tensor) -> Tensor:
        return stored[rows]

    return {
        f"{ours}.weight": Part({f"{theirs}.weight": (in_features, out_features)}, weight),
        f"{ours}.bias": Part({f"{theirs}.bias": (out_features,)}, bias),
    }
