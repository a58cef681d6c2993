"""Llama, Mistral, Qwen2 and Qwen3: RMS norms, rotary positions, grouped heads, SwiGLU.

Source: Touvron et al. 2023, "LLaMA", section 2.2; Jiang et al. 2023, "Mistral 7B", section 2; Yang
et al. 2024, "Qwen2 Technical Report", section 2.2; Yang et al. 2025, "Qwen3 Technical Report",
section 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nas.importing.config_keys import CheckpointConfig, rope_position
from nas.importing.recipe import Parts, Recipe, check_num_layers, linear, norm_name, same
from searchspace.errors import UserError
from searchspace.family import Family
from searchspace.layer_arch import LayerArch


@dataclass(frozen=True)
class _Kind:
    """What tells the kinds apart.

    Args:
        eps: of the norms where the config does not say.
        bias: of the projections: ``"none"``, ``"qkv"``, or ``"asked"`` where the config says it.
        qk_norm: whether queries and keys are normalised per head.
        windows: whether `sliding_window` counts unless `use_sliding_window` says otherwise.
    """

    eps: float = 1e-6
    bias: str = "asked"
    qk_norm: bool = False
    windows: bool = False


KINDS = {
    "LlamaForCausalLM": _Kind(),
    "MistralForCausalLM": _Kind(bias="none", windows=True),
    "Qwen2ForCausalLM": _Kind(bias="qkv"),
    "Qwen3ForCausalLM": _Kind(qk_norm=True),
}
"""By name of the class in transformers."""


def recipe(architecture: str, config: CheckpointConfig) -> Recipe:
    """Return what a checkpoint of one of `KINDS` is.

    Raises:
        UserError: for what we have no operator for.
    """
    kind = KINDS[architecture]
    d_model, num_heads = config.whole("hidden_size"), config.whole("num_attention_heads")
    head_dim = config.whole("head_dim", d_model // num_heads)
    num_layers = check_num_layers(config.whole("num_hidden_layers"))
    norm = norm_name("rmsnorm", config.number("rms_norm_eps", kind.eps))
    config.require("hidden_act", "silu", "the FFN is a SwiGLU")
    biased = kind.bias
    if biased == "asked":
        biased = "all" if config.flag("attention_bias", False) else "none"
    options: dict[str, Any] = {"bias": biased}
    if kind.qk_norm:
        options["qk_norm"] = norm
    window = _window(config, kind, num_layers)
    if window:
        options["window"] = window
    layer = LayerArch(
        mixer="sliding_window" if window else "softmax",
        num_heads=num_heads,
        num_kv_heads=config.whole("num_key_value_heads", num_heads),
        position=rope_position(config),
        ffn="swiglu",
        intermediate_size=config.whole("intermediate_size"),
        norm=norm,
        mixer_options=tuple(options.items()),
        ffn_options=(("bias", "all" if config.flag("mlp_bias", False) else "none"),),
    )
    tied = config.flag("tie_word_embeddings", False)
    family = Family(final_norm=norm, tied_head=tied)
    vocab_size = config.whole("vocab_size")
    parts = _ends(vocab_size, d_model, tied)
    for slot in range(num_layers):
        parts |= _layer(slot, layer, d_model, head_dim)
    return Recipe(
        architecture, layer, d_model, head_dim, vocab_size, num_layers, family, parts,
        ("rotary_emb.inv_freq", *(("lm_head.weight",) if tied else ())),
    )  # fmt: skip


def _window(config: CheckpointConfig, kind: _Kind, num_layers: int) -> int:
    """Return how many tokens a layer sees; 0 for all."""
    window = config.raw("sliding_window", 0)
    longest = config.whole("max_position_embeddings", 1 << 40)
    is_used = config.flag("use_sliding_window", kind.windows)
    types = config.raw("layer_types", [])
    if not isinstance(types, list) or len(set(map(str, types))) > 1:
        raise UserError(
            "config.json has layers of different attention types; a supernet's largest network has "
            "one for all, so only checkpoints with one can be brought in"
        )
    if types:
        is_used = types[0] == "sliding_attention"
        if types[0] not in ("sliding_attention", "full_attention") or len(types) != num_layers:
            raise UserError(
                f"config.json has layer_types={types!r:.60}; {num_layers} full_attention or "
                "sliding_attention are needed"
            )
    if not is_used or not window:
        return 0
    if type(window) is not int or window < 1:
        raise UserError(f"config.json has sliding_window={window!r}; a whole number is needed")
    if config.raw("max_window_layers", 0) and not types and not kind.windows:
        raise UserError(
            "config.json has use_sliding_window=true for some layers only; a supernet's largest "
            "network has one attention type for all"
        )
    # A window that holds every position is full attention.
    return 0 if window >= longest else window


def _ends(vocab_size: int, d_model: int, tied: bool) -> Parts:
    parts = {
        "ends.embedding": same("model.embed_tokens.weight", vocab_size, d_model),
        "ends.norm.weight": same("model.norm.weight", d_model),
    }
    if not tied:
        parts["ends.head.weight"] = same("lm_head.weight", vocab_size, d_model)
    return parts


def _layer(slot: int, layer: LayerArch, d_model: int, head_dim: int) -> Parts:
    theirs, options = f"model.layers.{slot}", layer.all_options
    mixer, ffn = f"blocks.layer{slot}_mixer", f"blocks.layer{slot}_ffn"
    width, kv_width = layer.num_heads * head_dim, layer.num_kv_heads * head_dim
    hidden, ffn_bias = layer.intermediate_size, layer.all_ffn_options["bias"] == "all"
    parts = {
        f"{mixer}.norm.weight": same(f"{theirs}.input_layernorm.weight", d_model),
        f"{ffn}.norm.weight": same(f"{theirs}.post_attention_layernorm.weight", d_model),
    }
    if options["qk_norm"] != "none":
        for name in ("q_norm", "k_norm"):
            parts[f"{mixer}.op.{name}"] = same(f"{theirs}.self_attn.{name}.weight", head_dim)
    for name, rows in (("q_proj", width), ("k_proj", kv_width), ("v_proj", kv_width)):
        bias = options["bias"] != "none"
        parts |= linear(f"{mixer}.op.{name}", f"{theirs}.self_attn.{name}", rows, d_model, bias)
    bias = options["bias"] == "all"
    parts |= linear(f"{mixer}.op.o_proj", f"{theirs}.self_attn.o_proj", d_model, width, bias)
    for name in ("gate_proj", "up_proj"):
        parts |= linear(f"{ffn}.op.{name}", f"{theirs}.mlp.{name}", hidden, d_model, ffn_bias)
    name = "down_proj"
    return parts | linear(f"{ffn}.op.{name}", f"{theirs}.mlp.{name}", d_model, hidden, ffn_bias)
