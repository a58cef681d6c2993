"""What every network has once: input embedding, final norm and output head.

Shapes: B batch, T tokens, D d_model, E width of the embedding, V vocabulary or classes, N patches,
P values of a patch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from searchspace.errors import UserError
from searchspace.linear import Linear
from searchspace.norms import NORMS, Norm
from searchspace.specs import ABSENT, EndsSpec


@dataclass
class Position:
    """How many tokens a network has seen: what learned positions go on from."""

    length: int = 0

    def tensors(self) -> dict[str, Tensor]:
        """Return no tensors."""
        return {}


class TiedHead(nn.Module):
    """The embedding used once more, as output head; it has no parameters of its own.

    Args:
        ends: whose embedding it is.
    """

    def __init__(self, ends: Ends) -> None:
        super().__init__()
        # In a tuple, so that the ends do not become a child of their own child.
        self._ends = (ends,)

    @property
    def weight(self) -> Tensor:
        """The embedding, (V, D)."""
        return self._ends[0].embedding

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` (..., D) to logits (..., V)."""
        return F.linear(x, self.weight)


class Ends(nn.Module):
    """The ends of a decoder, encoder or ViT; see `searchspace.family.Family`.

    The output head is tied to the embedding only where the family says so. Encoders and ViTs read
    their classes from the mean over tokens (padding left out) or from a class token in front, a
    `pooler` in between where the family has one. Where the family's `embedding_size` E is not
    `d_model`, all that is embedded has width E, and `embedding_proj` brings it to `d_model`.

    Source: Dosovitskiy et al. 2021, section 3.1 (patches, class token); Devlin et al. 2019 (class
    token of an encoder); Lan et al. 2020, "ALBERT", section 3.1 (`embedding_proj`).
    """

    def __init__(self, spec: EndsSpec) -> None:
        super().__init__()
        self.spec, family = spec, spec.family
        self.family = family
        d_model, width = spec.d_model, family.embedding_size or spec.d_model
        if family.kind == "vit":
            self.patch_proj = Linear(family.channels * family.patch_size**2, width)
        else:
            self.embedding = nn.Parameter(torch.empty(spec.vocab_size, width))
        if family.embedding_position == "learned":
            self.positions = nn.Parameter(torch.empty(family.max_tokens, width))
        if family.num_extra_tokens:
            self.class_token = nn.Parameter(torch.empty(1, width))
        self.embedding_norm = _norm(family.embedding_norm, width)
        self.embedding_proj = Linear(width, d_model) if width != d_model else None
        self.norm = _norm(family.final_norm, d_model)
        self.pooler = Linear(d_model, d_model, bias=True) if family.pooler == "tanh" else None
        num_outputs = family.num_classes or spec.vocab_size
        self.head: Linear | TiedHead = (
            TiedHead(self)
            if family.tied_head
            else Linear(d_model, num_outputs, "fp32", family.head_bias)
        )

    @staticmethod
    def param_axes(spec: EndsSpec) -> dict[str, tuple[str, ...]]:
        """Return the named dimension of every axis of every parameter."""
        family, width = spec.family, _embedding_axis(spec)
        out = "num_classes" if family.num_classes else "vocab_size"
        axes: dict[str, tuple[str, ...]] = {}
        if not family.tied_head:
            axes["head.weight"] = (out, "d_model")
        if family.head_bias:
            axes["head.bias"] = (out,)
        if family.pooler == "tanh":
            axes |= {"pooler.weight": ("d_model", "d_model"), "pooler.bias": ("d_model",)}
        if family.kind == "vit":
            axes["patch_proj.weight"] = (width, "patch_values")
        else:
            axes["embedding"] = ("vocab_size", width)
        if family.embedding_position == "learned":
            axes["positions"] = ("max_tokens", width)
        if family.num_extra_tokens:
            axes["class_token"] = ("one", width)
        if width != "d_model":
            axes["embedding_proj.weight"] = ("d_model", width)
        return axes | _norm_axes(spec, lambda norm: norm.axes)

    @staticmethod
    def buffer_axes(spec: EndsSpec) -> dict[str, tuple[str, ...]]:
        """Return the named dimension of every axis of every buffer."""
        return _norm_axes(spec, lambda norm: norm.buffer_axes)

    def reset(self, generator: torch.Generator) -> None:
        """Initialise; small logits at first, so the loss starts at log(V)."""
        with torch.no_grad():
            if self.family.kind == "vit":
                self.patch_proj.reset(generator)
            else:
                std = self.spec.d_model**-0.5 if self.family.tied_head else 1.0
                self.embedding.normal_(0.0, std, generator=generator)
            if self.family.embedding_position == "learned":
                self.positions.normal_(0.0, 0.5, generator=generator)
            if self.family.num_extra_tokens:
                self.class_token.normal_(0.0, 1.0, generator=generator)
        if self.embedding_proj is not None:
            self.embedding_proj.reset(generator)
        if self.pooler is not None:
            self.pooler.reset(generator)
        if isinstance(self.head, Linear):
            self.head.reset(generator, gain=0.1)

    def embed(self, inputs: Tensor, start: int = 0) -> Tensor:
        """Return what the layers read, (B, T, D); the class token stands first.

        Args:
            inputs: token ids (B, T), int64, or images (B, channels, height, width).
            start: position of the first token.

        Raises:
            UserError: when tokens go beyond the learned positions.
        """
        if self.family.kind == "vit":
            x_BTE = self.patch_proj(self._patches(inputs))
        else:
            x_BTE = F.embedding(inputs, self.embedding)
        if self.family.embedding_position == "learned":
            end = start + x_BTE.shape[1]
            if end > self.family.max_tokens:
                raise UserError(
                    f"{end} tokens were given, but positions are learned for family max_tokens="
                    f"{self.family.max_tokens}; give fewer, or train with a larger max_tokens"
                )
            x_BTE = x_BTE + self.positions[start:end]
        if self.family.num_extra_tokens:
            first = self.class_token.expand(x_BTE.shape[0], -1, -1)
            x_BTE = torch.cat([first, x_BTE], dim=1)
        x_BTE = self.embedding_norm(x_BTE)
        return x_BTE if self.embedding_proj is None else self.embedding_proj(x_BTE)

    def _patches(self, images: Tensor) -> Tensor:
        """Cut images into patches (B, N, P), row by row."""
        size = self.family.patch_size
        cut = images.unfold(2, size, size).unfold(3, size, size)  # (B, C, rows, columns, p, p)
        return cut.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)

    def visible(self, inputs: Tensor) -> Tensor | None:
        """Return which tokens (B, T) attention does not leave out; None where it sees all.

        A sequence of nothing but padding is seen as it is.
        """
        if not self.family.mask_padding:
            return None
        there_BT = inputs != self.family.pad_token
        if not self.family.num_extra_tokens:
            return there_BT | ~there_BT.any(dim=1, keepdim=True)
        return torch.cat([torch.ones_like(there_BT[:, :1]), there_BT], dim=1)

    def norm_readers(self) -> list[Linear]:
        """Return the map that is all that reads the final norm; none where it is not a map's own.

        A mean over tokens in between changes nothing about that.
        """
        reader = self.head if self.pooler is None else self.pooler
        return [reader] if isinstance(reader, Linear) else []

    def hidden(self, x_BTD: Tensor, inputs: Tensor) -> Tensor:
        """Return what the head reads: (B, T, D) of a decoder, (B, D) of the others."""
        pooled = self._pooled(x_BTD, inputs)
        return pooled if self.pooler is None else self.pooler(pooled).tanh()

    def _pooled(self, x_BTD: Tensor, inputs: Tensor) -> Tensor:
        if self.family.kind == "decoder":
            out: Tensor = self.norm(x_BTD)
            return out
        if self.family.num_extra_tokens:
            out = self.norm(x_BTD[:, 0])
            return out
        x_BTD = self.norm(x_BTD)
        if self.family.kind == "vit" or self.family.pad_token < 0:
            return x_BTD.mean(dim=1)
        there_BT1 = (inputs != self.family.pad_token).to(x_BTD.dtype)[:, :, None]
        return (x_BTD * there_BT1).sum(dim=1) / there_BT1.sum(dim=1).clamp_min(1.0)

    def logits(self, x_BTD: Tensor, inputs: Tensor) -> Tensor:
        """Return the logits, (B, T, V) of a decoder, (B, V) of the others."""
        return self.head(self.hidden(x_BTD, inputs))

    def forward(self, inputs: Tensor, state: Any = None) -> Tensor:
        """Embed and predict at once: the cost of a network without any layer."""
        return self.logits(self.embed(inputs), inputs)

    def init_state(self, batch: int, max_tokens: int, device: torch.device | None = None) -> None:
        """Return None: the ends remember nothing."""
        return None


def _norm(name: str, width: int) -> nn.Module:
    return nn.Identity() if name == ABSENT else NORMS[name](width)


def _embedding_axis(spec: EndsSpec) -> str:
    """Return the named dimension of what is embedded."""
    width = spec.family.embedding_size
    return "embedding_size" if width and width != spec.d_model else "d_model"


def _norm_axes(
    spec: EndsSpec, axes_of: Callable[[type[Norm]], dict[str, tuple[str, ...]]]
) -> dict[str, tuple[str, ...]]:
    """Return the axes of the norms' tensors; norms call every width `d_model`."""
    family, found = spec.family, {}
    for prefix, name, width in (
        ("norm", family.final_norm, "d_model"),
        ("embedding_norm", family.embedding_norm, _embedding_axis(spec)),
    ):
        for tensor, named in axes_of(NORMS[name]).items() if name != ABSENT else ():
            found[f"{prefix}.{tensor}"] = tuple(width if a == "d_model" else a for a in named)
    return found


def example_inputs(
    spec: EndsSpec, batch: int, tokens: int, generator: torch.Generator | None = None
) -> Tensor:
    """Return random inputs of a network; `tokens` does not count for images."""
    family = spec.family
    if family.kind == "vit":
        shape = (batch, family.channels, family.image_size, family.image_size)
        return torch.randn(shape, generator=generator)
    return torch.randint(spec.vocab_size, (batch, tokens), generator=generator)
