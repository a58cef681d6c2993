"""`Family`: what goes into a network and what comes out.

A *decoder* reads tokens and predicts the next one at every position; an *encoder* reads tokens in
both directions and predicts one class; a *ViT* does so with the patches of an image.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from searchspace.errors import UserError, unknown

KINDS = ("decoder", "encoder", "vit")
POOLINGS = ("mean", "class_token")
EMBEDDING_POSITIONS = ("none", "learned")
POOLERS = ("none", "tanh")
WHOLE_NUMBERS = (
    "num_classes", "image_size", "channels", "patch_size", "max_tokens", "embedding_size",
)  # fmt: skip


@dataclass(frozen=True)
class Family:
    """The facts of input and output that all archs of a space share.

    Args:
        kind: ``"decoder"``, ``"encoder"`` or ``"vit"``.
        num_classes: classes of an encoder or ViT.
        pooling: what the classes are read from: the ``"mean"`` over tokens (padding left out), or a
            ``"class_token"`` put in front.
        embedding_position: ``"learned"`` adds a learned vector per position to the embedding.
        max_tokens: longest sequence that learned positions and mixers with parameters per position
            can take, the class token not counted. A ViT's follows from its image.
        image_size: height and width of the image in pixels.
        channels: channels of the image.
        patch_size: height and width of a patch; divides `image_size`.
        pad_token: token id that stands for "no token" in an encoder's input; -1 for none.
        final_norm: a name in `NORMS`, or ``"none"`` for networks whose layers end in a norm.
        embedding_size: width of tokens, learned positions and class token where it is not
            `d_model`; a linear map then brings them to `d_model`. 0 for `d_model` itself.
        embedding_norm: a name in `NORMS`, for the sum of these in front of that map, or ``"none"``.
        tied_head: whether the embedding of a decoder is its output head too.
        pooler: ``"tanh"`` puts a linear map and a tanh before the head of an encoder or ViT.
        head_bias: whether the head of an encoder or ViT has a bias.
        mask_padding: whether softmax attention of an encoder leaves padding out. Other mixers see
            it as any other token.

    Raises:
        UserError: for an unknown name, or sizes that do not fit together.

    Source: Vaswani et al. 2017 (decoder); Devlin et al. 2019, "BERT" (encoder, `embedding_norm`,
    `pooler`); Press and Wolf 2017, "Using the Output Embedding" (`tied_head`);
    Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words", section 3.1 (ViT); Lan et al. 2020,
    "ALBERT", section 3.1 (factorised embedding).
    """

    kind: str = "decoder"
    num_classes: int = 0
    pooling: str = "mean"
    embedding_position: str = "none"
    max_tokens: int = 1024
    image_size: int = 0
    channels: int = 0
    patch_size: int = 0
    pad_token: int = -1
    final_norm: str = "rmsnorm"
    embedding_size: int = 0
    embedding_norm: str = "none"
    tied_head: bool = False
    pooler: str = "none"
    head_bias: bool = False
    mask_padding: bool = False

    def __post_init__(self) -> None:
        for field, choices in (
            ("kind", KINDS),
            ("pooling", POOLINGS),
            ("embedding_position", EMBEDDING_POSITIONS),
            ("pooler", POOLERS),
        ):
            if getattr(self, field) not in choices:
                raise unknown(f"family {field}", getattr(self, field), choices)
        for field in ("final_norm", "embedding_norm"):
            self._check_norm(field, getattr(self, field))
        for field in WHOLE_NUMBERS:
            value = getattr(self, field)
            if type(value) is not int or value < 0:
                raise UserError(f"family {field}={value!r} must be a whole number of at least 0")
        self._check_kind()

    def _check_norm(self, field: str, name: str) -> None:
        if name in ("none", Family.final_norm):
            return  # without a look at torch, so that a command line can read an arch at once
        from searchspace.norms import NORMS

        if name not in NORMS:
            raise unknown(f"family {field}", name, [*NORMS, "none"])

    def _check_head(self) -> None:
        for field in ("tied_head", "head_bias", "mask_padding"):
            if type(getattr(self, field)) is not bool:
                raise UserError(f"family {field}={getattr(self, field)!r} must be true or false")
        if self.tied_head and (self.kind != "decoder" or self.embedding_size):
            raise UserError(
                "family tied_head=true needs a decoder whose embedding is as wide as its head "
                f"reads, not kind={self.kind!r} with embedding_size={self.embedding_size}; set "
                "tied_head=false"
            )
        if self.mask_padding and (self.kind != "encoder" or self.pad_token < 0):
            raise UserError(
                "family mask_padding=true needs an encoder with a pad_token, not "
                f"kind={self.kind!r} with pad_token={self.pad_token}; set mask_padding=false"
            )
        if self.kind == "decoder" and (self.pooler != "none" or self.head_bias):
            raise UserError(
                "family pooler and head_bias belong to encoders and ViTs, not to a decoder; leave "
                "them out"
            )

    def _check_kind(self) -> None:
        self._check_head()
        if self.kind != "decoder" and self.num_classes < 2:
            raise UserError(
                f"family num_classes={self.num_classes}; {self.kind} networks need at least 2"
            )
        if self.kind != "vit":
            if self.max_tokens < 1:
                raise UserError("family max_tokens=0; give the longest sequence, such as 1024")
            return
        if not self.patch_size or not self.image_size or self.image_size % self.patch_size:
            divisors = [str(n) for n in range(1, self.image_size + 1) if self.image_size % n == 0]
            raise UserError(
                f"family patch_size={self.patch_size} does not divide image_size="
                f"{self.image_size}; choose one of {', '.join(divisors) or 'its divisors'}"
            )
        if not self.channels:
            raise UserError("family channels=0; an image has 1 (grey) or 3 (colour)")
        object.__setattr__(self, "max_tokens", (self.image_size // self.patch_size) ** 2)

    @property
    def causal(self) -> bool:
        """Whether a token sees only itself and earlier ones."""
        return self.kind == "decoder"

    @property
    def num_extra_tokens(self) -> int:
        """1 where a class token is put in front, else 0."""
        return int(self.kind != "decoder" and self.pooling == "class_token")

    @property
    def sequence_tokens(self) -> int:
        """Longest sequence inside the network, the class token counted."""
        return self.max_tokens + self.num_extra_tokens

    @property
    def key(self) -> str:
        """A readable name of what is not a plain decoder's, for the keys of `EndsSpec`."""
        changed = [f"{k}{v}" for k, v in self.to_dict().items() if k != "kind"]
        return "".join(f"/{text}" for text in ([self.kind] if self != DECODER else []) + changed)

    def to_dict(self) -> dict[str, Any]:
        """Return what differs from the defaults, JSON-ready."""
        defaults = {field.name: field.default for field in fields(self)}
        return {name: value for name, value in asdict(self).items() if value != defaults[name]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Family:
        """Build from `to_dict`'s form.

        Raises:
            UserError: for an unknown key or a wrong value.
        """
        known = [field.name for field in fields(cls)]
        if not isinstance(values, Mapping):
            raise UserError(f"family is a mapping of its fields, not {values!r:.40}")
        for name in values:
            if name not in known:
                raise unknown("family field", name, known)
        return cls(**values)


DECODER = Family()
"""A plain decoder."""
