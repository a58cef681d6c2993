"""One forward pass without gradients: what the metrics that look at activations look at.

Shapes: B batch, T tokens, D d_model, N sampled tokens, F hidden units of an FFN, C channels,
H query heads, S keys.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from predictors.zero_cost.components import num_components
from searchspace.errors import UserError
from searchspace.family import Family
from searchspace.linear import Linear
from searchspace.mixers.base import SharedKV
from searchspace.sub_blocks import FFNBlock, MixerBlock
from searchspace.subnet import Subnet

MAX_ROWS = 512
"""Tokens whose stream and FFN units are kept, spread evenly over the batch."""

MAX_ATTENTION_TOKENS = 256
"""First tokens of a sequence whose attention is looked at."""

MAX_ATTENTION_ROWS = 1024
"""Tokens of all sequences together whose attention is looked at (at least one sequence)."""

MAX_SEQUENCES, MAX_STEPS = 32, 64
"""Sequences whose hidden states are compared, and positions of each, spread evenly."""

COMPONENT_SHARE = 0.99
"""Of variance, that principal components are counted for."""

PROJECTIONS = ("q_proj", "k_proj", "v_proj")
FIRST_MAPS = ("gate_proj", "up_proj")

EMBEDDING = "embedding"
"""Name of the stream before the first block."""


@dataclass(frozen=True)
class ForwardPass:
    """What one forward pass leaves behind. Padding is left out everywhere.

    Keys are names of sub-blocks, such as ``"layer3_mixer"``, in order; where a network has none of
    a kind (no mixers, no FFNs) the mapping is empty.

    Args:
        streams: the residual stream as embedded (`EMBEDDING`) and after every block, (N, D).
        projections: for every query, key and value projection (``"layer3_mixer.q_proj"``) the mean
            over sequences and channels of the largest output over tokens, divided by the root mean
            square of the projection's weights.
        attention: for every mixer with a softmax over keys the mean over sequences, heads and
            queries of the largest weight over keys.
        ffn_inputs: what the first map of every FFN returns, (N, F); both maps of a gated one.
        ffn_agreement: for every FFN the number of pairs of tokens of one sequence, times units, of
            the same sign after a nonlinearity; mean over sequences.
        hidden_correlations: for every mixer the correlations (B, B) between sequences of its
            outputs stacked over time, float64; NaN where an output is constant. Under `EMBEDDING`
            those of the embedded inputs.
    """

    streams: dict[str, Tensor] = field(default_factory=dict)
    projections: dict[str, float] = field(default_factory=dict)
    attention: dict[str, float] = field(default_factory=dict)
    ffn_inputs: dict[str, Tensor] = field(default_factory=dict)
    ffn_agreement: dict[str, float] = field(default_factory=dict)
    hidden_correlations: dict[str, Tensor] = field(default_factory=dict)

    @cached_property
    def ffn_components(self) -> dict[str, float]:
        """For every FFN the number of components that hold 99 % of `ffn_inputs`' variance.

        Of at most 2 D tokens.
        """
        most = 2 * self.streams[EMBEDDING].shape[1]
        return {
            name: num_components(rows_NF[:: -(-len(rows_NF) // most)], COMPONENT_SHARE)
            for name, rows_NF in self.ffn_inputs.items()
        }


@torch.no_grad()
def forward_pass(network: Subnet, inputs: Tensor) -> ForwardPass:
    """Run the network once and return what its activations are like.

    Args:
        network: in the state in which training begins.
        inputs: token ids (B, T) or images, as the network takes them.

    Raises:
        UserError: when all tokens are padding or the stream does not stay finite.
    """
    recorder = _Recorder(network, there(inputs, network.ends.family))
    x_BTD = network.ends.embed(inputs)
    recorder.keep_stream(EMBEDDING, x_BTD)
    recorder.keep_hidden(EMBEDDING, x_BTD)
    with recorder:
        network.run_layers(x_BTD)
    return recorder.found


def there(inputs: Tensor, family: Family) -> Tensor:
    """Return which tokens inside the network are no padding, bool (B, T), class token first.

    Raises:
        UserError: when none is left.
    """
    if family.kind == "vit":
        there_BT = torch.ones(len(inputs), family.sequence_tokens, dtype=torch.bool)
        return there_BT.to(inputs.device)
    there_BT = torch.ones_like(inputs, dtype=torch.bool)
    if family.kind == "encoder" and family.pad_token >= 0:
        there_BT = inputs != family.pad_token
    if not there_BT.any():
        raise UserError("every token of the batch is padding; give a batch with text")
    if not family.num_extra_tokens:
        return there_BT
    # A sequence of nothing but padding has nothing to look at in its class token either.
    return torch.cat([there_BT.any(dim=1, keepdim=True), there_BT], dim=1)


class _Recorder:
    """Fills a `ForwardPass` through hooks while it is entered."""

    def __init__(self, network: Subnet, there_BT: Tensor) -> None:
        self.found = ForwardPass()
        self._network, self._there_BT = network, there_BT
        index_N = there_BT.flatten().nonzero().flatten()
        self._rows_N = index_N[:: -(-len(index_N) // MAX_ROWS)]
        self._sequences_B = there_BT.any(dim=1).nonzero().flatten()
        self._padded = not bool(there_BT.all())
        self._hooks: list[Any] = []

    def __enter__(self) -> None:
        for name, block in self._network.blocks.items():
            if isinstance(block, MixerBlock):
                self._watch_mixer(name, block.op)
            elif isinstance(block, FFNBlock):
                self._watch_ffn(name, block.op)
            self._after(block, lambda out, name=name: self.keep_stream(name, out))

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _after(self, module: nn.Module, keep: Any) -> None:
        def hook(module: nn.Module, inputs: Any, out: Tensor) -> None:
            keep(out)

        self._hooks.append(module.register_forward_hook(hook))

    def _before(self, module: nn.Module, keep: Any) -> None:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            keep(*inputs)

        self._hooks.append(module.register_forward_pre_hook(hook))

    def _watch_mixer(self, name: str, op: Any) -> None:
        for part in PROJECTIONS:
            linear = getattr(op, part, None)
            if linear is not None:
                self._after(
                    linear,
                    lambda out, of=linear, key=f"{name}.{part}": self._keep_maxima(key, out, of),
                )
        self._before(op, lambda *given: self._keep_attention(name, op, *given))
        self._after(op, lambda out: self.keep_hidden(name, out))

    def _watch_ffn(self, name: str, op: Any) -> None:
        for part in FIRST_MAPS:
            linear = getattr(op, part, None)
            if linear is not None:
                self._after(linear, lambda out: self._keep_ffn_input(name, out))
        # What enters a later map is an activation, of gated and plain FFNs and of stacks alike.
        for linear in (*getattr(op, "inner", ()), op.output_linear() or op.down_proj):
            self._before(linear, lambda x: self._keep_signs(name, x))

    def _sampled(self, x_BTC: Tensor) -> Tensor:
        return x_BTC.flatten(0, 1).index_select(0, self._rows_N)

    def keep_stream(self, name: str, x_BTD: Tensor) -> None:
        """Keep sampled tokens of the stream."""
        rows_ND = self._sampled(x_BTD)
        if not bool(torch.isfinite(rows_ND).all()):
            raise UserError(f"the residual stream after {name} is not finite at random weights")
        self.found.streams[name] = rows_ND

    def keep_hidden(self, name: str, x_BTD: Tensor) -> None:
        """Keep the correlations between sequences."""
        chosen_B = self._sequences_B[:MAX_SEQUENCES]
        step = -(-x_BTD.shape[1] // MAX_STEPS)
        rows = x_BTD[chosen_B, ::step].double() * self._there_BT[chosen_B, ::step, None]
        rows = rows.flatten(1)
        rows = rows - rows.mean(dim=1, keepdim=True)
        rows = rows / rows.norm(dim=1, keepdim=True)
        self.found.hidden_correlations[name] = rows @ rows.T

    def _keep_maxima(self, key: str, out_BTC: Tensor, linear: Linear) -> None:
        if self._padded:
            hidden_BT1 = ~self._there_BT[self._sequences_B, :, None]
            out_BTC = out_BTC[self._sequences_B].masked_fill(hidden_BT1, -torch.inf)
        deviation = float(linear.weight.double().square().mean().sqrt())
        self.found.projections[key] = float(out_BTC.amax(dim=1).double().mean()) / deviation

    def _keep_attention(
        self, name: str, op: Any, x_BTD: Tensor, state: Any = None, shared: SharedKV | None = None
    ) -> None:
        tokens = min(x_BTD.shape[1], MAX_ATTENTION_TOKENS)
        seen_B = self._there_BT[:, :tokens].any(dim=1).nonzero().flatten()
        chosen_B = seen_B[: max(1, MAX_ATTENTION_ROWS // tokens)]
        probs_BHTS = op.attention_probs(x_BTD[chosen_B, :tokens], _part(shared, chosen_B, tokens))
        if probs_BHTS is None:
            return
        largest_BTH = probs_BHTS.amax(dim=-1).transpose(1, 2)
        kept = largest_BTH[self._there_BT[chosen_B, :tokens]]
        self.found.attention[name] = float(kept.double().mean())

    def _keep_ffn_input(self, name: str, out_BTF: Tensor) -> None:
        rows_NF = self._sampled(out_BTF)
        if name in self.found.ffn_inputs:
            rows_NF = torch.cat([self.found.ffn_inputs[name], rows_NF], dim=1)
        self.found.ffn_inputs[name] = rows_NF

    def _keep_signs(self, name: str, hidden_BTF: Tensor) -> None:
        there_BT, positive_BTF = self._there_BT, hidden_BTF > 0
        if self._padded:
            there_BT = there_BT[self._sequences_B]
            positive_BTF = positive_BTF[self._sequences_B] & there_BT[:, :, None]
        # Counts are exact in float32, and bool sums are slow.
        positive_BF = positive_BTF.float().sum(dim=1).double()
        other_BF = there_BT.sum(dim=1, keepdim=True) - positive_BF
        pairs_B = (positive_BF.square() + other_BF.square()).sum(dim=1)
        before = self.found.ffn_agreement.get(name, 0.0)
        self.found.ffn_agreement[name] = before + float(pairs_B.mean())


def _part(shared: SharedKV | None, chosen_B: Tensor, tokens: int) -> SharedKV | None:
    """Return the keys of some sequences' first tokens."""
    if shared is None or shared.k_BGSK is None or shared.v_BGSK is None:
        return shared
    k_BGSK, v_BGSK = (x[chosen_B, :, :tokens] for x in (shared.k_BGSK, shared.v_BGSK))
    return SharedKV(k_BGSK, v_BGSK, shared.start)
