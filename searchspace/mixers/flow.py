"""Linear attention that conserves the flow from values to results.

Shapes: B batch, T tokens, D d_model, H query heads, G key/value heads, R = H / G, K head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from searchspace.mixers.recurrent import MIN_DENOMINATOR, RecurrentMixer, RecurrentState

MAX_COMPETITION = 20.0
"""Bound of what is exponentiated; on average it is 1."""


@dataclass(kw_only=True)
class FlowState(RecurrentState):
    """Running sums of the flows.

    Args:
        flow_sums_BG4K: of keys, queries, conserved keys and conserved queries.
        competition_BG: of the exponentials of the sources' conserved flow.
    """

    flow_sums_BG4K: Tensor
    competition_BG: Tensor


class FlowAttention(RecurrentMixer):
    """Linear attention in which sources compete and sinks are allocated.

    With `q, k = sigmoid(Q), sigmoid(K)`, a sink's incoming flow is `I_i = q_i sum_j k_j`, a
    source's outgoing flow `O_j = k_j sum_i q_i`; with the other side's flow set to 1 they are
    `I'_i = q_i sum_j k_j / O_j` and `O'_j = k_j sum_i q_i / I_i`. The result is
    `sigmoid(I'_i) (q_i / I_i) sum_j k_j^T softmax(O')_j n v_j`, n tokens.

    In the causal form every sum ends at the own token, also that of the softmax, every flow is
    taken per token so far, and a source keeps the weight it has when it comes in. The query heads
    of a group are the sinks of the group's sources: their flow is averaged.

    Source: Wu et al. 2022, "Flowformer: Linearizing Transformers with Conservation Flows",
    section 3.2 (Flow-Attention); the causal form as in the authors' version for language modelling.
    """

    def init_state(
        self, batch: int, max_tokens: int, device: torch.device | None = None
    ) -> FlowState:
        """Return the zero state; its size does not depend on `max_tokens`."""
        made, groups = super().init_state(batch, max_tokens, device), self.spec.num_kv_heads
        return FlowState(
            sum_BGKV=made.sum_BGKV,
            conv_BTC=made.conv_BTC,
            flow_sums_BG4K=torch.zeros(batch, groups, 4, self.spec.head_dim, device=device),
            competition_BG=torch.zeros(batch, groups, device=device),
        )

    def forward(self, x_BTD: Tensor, state: FlowState | None = None) -> Tensor:
        """Mix every token up to and including the own one; bidirectional: every token."""
        q, k, v = self.project_qkv(x_BTD, state)
        dtype = torch.promote_types(q.dtype, torch.float32)
        k = k.to(dtype).sigmoid()
        q_BGRTK = q.to(dtype).sigmoid().unflatten(1, (k.shape[1], -1))
        count_T1 = self.counts(k, state)
        before = None if state is None or not state.length else state

        sums = self._sum(torch.stack([k, q_BGRTK.mean(dim=2)]), before, 0) / count_T1
        incoming_BGRT1 = (q_BGRTK * sums[0][:, :, None]).sum(dim=-1, keepdim=True)
        outgoing_BGT1 = (k * sums[1]).sum(dim=-1, keepdim=True)
        incoming_BGRT1 = incoming_BGRT1.clamp_min(MIN_DENOMINATOR)
        outgoing_BGT1 = outgoing_BGT1.clamp_min(MIN_DENOMINATOR)
        refined = torch.stack([k / outgoing_BGT1, (q_BGRTK / incoming_BGRT1).mean(dim=2)])
        conserved = self._sum(refined, before, 2) / count_T1
        sink_BGRT1 = (q_BGRTK * conserved[0][:, :, None]).sum(dim=-1, keepdim=True)
        source_BGT1 = (k * conserved[1]).sum(dim=-1, keepdim=True)
        weight_BGT1 = source_BGT1.clamp_max(MAX_COMPETITION).exp()
        total_BGT1 = self._total(weight_BGT1, before)
        if state is not None:
            last = [part[:, :, -1] * count_T1[-1] for part in (*sums, *conserved)]
            state.flow_sums_BG4K = torch.stack(last, dim=2)
            state.competition_BG = total_BGT1[:, :, -1, 0]

        v = v * (weight_BGT1 / total_BGT1 * count_T1)
        out = self.run((q_BGRTK / (incoming_BGRT1 * count_T1)).flatten(1, 2), k, v, None, state)
        return self.o_proj(self.merge_heads(out * sink_BGRT1.flatten(1, 2).sigmoid()))

    def _sum(self, x_2BGTK: Tensor, before: FlowState | None, first: int) -> Tensor:
        """Sum two quantities over time; they go on from the state's sums from `first` on."""
        if not self.causal:
            return x_2BGTK.sum(dim=3, keepdim=True)
        total = x_2BGTK.cumsum(dim=3)
        if before is None:
            return total
        return total + before.flow_sums_BG4K[:, :, first : first + 2].movedim(2, 0)[:, :, :, None]

    def _total(self, weight_BGT1: Tensor, before: FlowState | None) -> Tensor:
        """Return the denominator of the competition's softmax."""
        if not self.causal:
            return weight_BGT1.sum(dim=2, keepdim=True)
        total = weight_BGT1.cumsum(dim=2)
        return total if before is None else total + before.competition_BG[:, :, None, None]
