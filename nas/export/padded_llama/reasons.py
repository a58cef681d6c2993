"""Why a network is no Llama, whatever is padded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

from torch import nn

from nas.export.padded_llama.layout import Heads
from searchspace.linear import Linear
from searchspace.norms import RMSNorm
from searchspace.position_names import parse_rope, position_kind
from searchspace.sub_blocks import FFNBlock, MixerBlock
from searchspace.subnet import Subnet

ACTIVATIONS = {"swiglu": "silu", "geglu": "gelu_pytorch_tanh", "reglu": "relu"}
"""The gated FFNs, and what transformers calls their activation."""
PLAIN_OPTIONS = ("bias",)
"""Options of operators that a Llama has too."""


def reasons(subnet: Subnet) -> Iterator[str]:
    """Yield every reason why a network is no Llama."""
    family, ends = subnet.arch.family, subnet.ends
    if not family.causal:
        yield f"a Llama is a decoder, this is a network of family {family.kind!r}"
        return
    if family.embedding_position != "none":
        yield f"a Llama has no embedding_position={family.embedding_position!r}"
    if family.embedding_norm != "none" or ends.embedding_proj is not None:
        yield "a Llama has neither a norm nor a linear map behind its embedding"
    if not isinstance(ends.norm, RMSNorm):
        yield f"a Llama ends in an RMS norm, not in final_norm={family.final_norm!r}"
    if isinstance(ends.head, Linear) and ends.head.bias is not None:
        yield "a Llama's head has no bias, which a rewrite gave this one"
    blocks = [(name, cast(MixerBlock | FFNBlock, b)) for name, b in subnet.blocks.items()]
    for name, block in blocks:
        reason = _mixer_reason(block) if isinstance(block, MixerBlock) else _ffn_reason(block)
        if reason := reason or _block_reason(block, ends.norm):
            yield f"{name} {reason}"
    mixers = [block for _, block in blocks if isinstance(block, MixerBlock)]
    if Heads.of(mixers, subnet.arch.d_model) is None:
        yield f"no number of heads divides d_model={subnet.arch.d_model} and is large enough"
    for what, found in _should_agree([block for _, block in blocks]).items():
        if len(found) > 1:
            values = ", ".join(sorted(found))
            yield f"the layers of a Llama all have the same {what}, these have {values}"


def _block_reason(block: MixerBlock | FFNBlock, last_norm: nn.Module) -> str:
    """Return what no Llama has in norms, precisions and options."""
    if block.spec.placement != "pre":
        return f"has norm_placement={block.spec.placement!r}, not 'pre'"
    if not isinstance(block.norm, RMSNorm):
        return f"has norm={block.spec.norm!r}, not 'rmsnorm'"
    if block.norm.eps != getattr(last_norm, "eps", None):
        return f"has a norm with eps={block.norm.eps}, the final norm another"
    if block.spec.precision != "fp32":
        return f"has precision={block.spec.precision!r}, not 'fp32'"
    for option, value in block.spec.options:
        if option not in PLAIN_OPTIONS:
            return f"has the option {option}={value!r}"
    return ""


def _mixer_reason(block: MixerBlock) -> str:
    if block.spec.mixer != "softmax":
        return f"has mixer={block.spec.mixer!r}, not 'softmax'"
    if block.spec.kv_shared:
        return "shares keys and values with an earlier layer"
    if (
        position_kind(block.spec.position) != "rope"
        or parse_rope(block.spec.position).percent != 100
    ):
        return f"has position={block.spec.position!r}, not 'rope' of all features"
    return ""


def _ffn_reason(block: FFNBlock) -> str:
    if block.spec.ffn in ACTIVATIONS:
        return ""
    return f"has ffn={block.spec.ffn!r}, not one of {', '.join(ACTIVATIONS)}"


def _should_agree(blocks: list[MixerBlock | FFNBlock]) -> dict[str, set[str]]:
    mixers = [block.spec for block in blocks if isinstance(block, MixerBlock)]
    ffns = [block.spec for block in blocks if isinstance(block, FFNBlock)]
    return {
        "head width": {str(spec.head_dim) for spec in mixers},
        "position": {spec.position for spec in mixers},
        "ffn": {spec.ffn for spec in ffns},
    }
