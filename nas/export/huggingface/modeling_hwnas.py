"""Networks of hwnas as models of transformers, for folders that load without hwnas.

This file is exported beside the weights; the networks' own code lies beside it.

Shapes: B batch, T new tokens, S tokens so far, V vocabulary or classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import (
    CausalLMOutputWithPast,
    ImageClassifierOutput,
    SequenceClassifierOutput,
)
from transformers.utils.generic import ModelOutput

from nas.export.huggingface.encoder_rows import classify_rows
from nas.export.huggingface.row_groups import RowGroups, run_rows
from searchspace.arch import Arch
from searchspace.rewrites import rewrite
from searchspace.subnet import Subnet

ALIGNMENT = 64
"""Bytes to which some kernels want their tensors aligned."""
IGNORED = -100


class HwnasConfig(PretrainedConfig):  # type: ignore[misc, unused-ignore]
    """What a network is.

    Args:
        arch: exactly, as `Arch.to_dict` gives it; other keys merely show it to readers.
        rewrites: what was rewritten after training; see `searchspace.rewrites`.
        kwargs: see `PretrainedConfig`.
    """

    model_type = "hwnas"

    def __init__(
        self, arch: dict[str, Any] | None = None, rewrites: tuple[str, ...] = (), **kwargs: Any
    ) -> None:
        self.arch = arch or {}
        self.rewrites = list(rewrites)
        self.use_cache = kwargs.pop("use_cache", True)
        super().__init__(**kwargs)


class HwnasPreTrainedModel(PreTrainedModel):  # type: ignore[misc, unused-ignore]
    """A network; its tensors have the names that `Subnet` gives them."""

    config_class = HwnasConfig
    _no_split_modules = ["MixerBlock", "FFNBlock"]  # noqa: RUF012, transformers says so
    kinds: tuple[str, ...] = ()

    def __init__(self, config: HwnasConfig) -> None:
        super().__init__(config)
        arch = Arch.from_dict(config.arch)
        if arch.family.kind not in self.kinds:
            raise ValueError(
                f"{type(self).__name__} is for {' and '.join(self.kinds)} networks, not for this "
                f"{arch.family.kind}; see architectures in config.json"
            )
        subnet = Subnet(arch)
        if not subnet.ends.head.weight.is_meta:
            seed = int(torch.randint(2**31, ()))
            subnet.reset(torch.Generator().manual_seed(seed))
        for name in config.rewrites:
            rewrite(subnet, name)
        subnet.pack()
        self.ends, self.blocks = subnet.ends, subnet.blocks
        # In a tuple, so that its parts are not registered a second time, under other names.
        self._subnet = (subnet,)
        self.post_init()

    @property
    def subnet(self) -> Subnet:
        """The network itself, which shares its parts with this model."""
        return self._subnet[0]

    def _in_form(self, output: ModelOutput, return_dict: bool | None) -> Any:
        """Return an output as it is, or as a tuple where that is wanted."""
        whole = self.config.return_dict if return_dict is None else return_dict
        return output if whole else output.to_tuple()

    def _init_weights(self, module: nn.Module) -> None:
        """Leave everything alone: `__init__` has initialised it, or the file holds it."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a folder; see `PreTrainedModel.from_pretrained`.

        Raises:
            ValueError: when the weights are not those of the config.
        """
        with_info = kwargs.pop("output_loading_info", False)
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, info = loaded
        for problem in ("missing_keys", "unexpected_keys"):
            if info[problem]:
                names = ", ".join(sorted(map(str, info[problem]))[:3])
                raise ValueError(f"model.safetensors does not fit config.json: {problem} {names}")
        _align(model)
        return (model, info) if with_info else model


class HwnasForCausalLM(HwnasPreTrainedModel, GenerationMixin):  # type: ignore[misc, unused-ignore]
    """A decoder.

    Padding may stand anywhere: every row is computed as if it were alone, see `RowGroups`.
    """

    kinds = ("decoder",)
    _is_stateful = True

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return logits, in `past_key_values` what was seen, and with labels the loss.

        Args:
            input_ids: the new tokens (B, T).
            attention_mask: 0 for padding, 1 for tokens, of all tokens so far (B, S).
            past_key_values: what an earlier call returned; it is updated in place.
            labels: token ids (B, T), predicted by the token before; -100 where none is wanted.
            use_cache: whether to remember the tokens; by default only outside of training.
            logits_to_keep: how many of the last tokens need logits; 0 for all.
            return_dict: false for a tuple in place of a `CausalLMOutputWithPast`.
            kwargs: not used.

        Raises:
            ValueError: for inputs of other kinds.
        """
        if past_key_values is not None and not isinstance(past_key_values, RowGroups):
            raise ValueError(
                f"past_key_values is a {type(past_key_values).__name__}; pass what an earlier call "
                "returned, or nothing"
            )
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and labels is None
        if past_key_values is None and use_cache:
            past_key_values = self.new_cache()
        if past_key_values is None:
            logits = run_rows(self.subnet, input_ids, attention_mask, logits_to_keep)
        else:
            logits = past_key_values.logits(self.subnet, input_ids, attention_mask, logits_to_keep)
        loss = None if labels is None else _next_token_loss(logits, labels, attention_mask)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)
        return self._in_form(output, return_dict)

    def new_cache(self, max_tokens: int = 0) -> RowGroups:
        """Return empty `past_key_values` with room for so many tokens; it grows if need be."""
        return RowGroups(max_tokens)

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
        *args: Any,
    ) -> Any:
        """Make room for the whole text at once."""
        if generation_config.use_cache and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = self.new_cache(max_cache_length)


class HwnasForSequenceClassification(HwnasPreTrainedModel):
    """An encoder."""

    kinds = ("encoder",)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return the logits of every class (B, V), and with labels (B,) the loss.

        With an `attention_mask`, a row's result does not depend on the others; see `classify_rows`.
        Without one, `input_ids` are taken as they are.
        """
        logits = classify_rows(self.subnet, input_ids, attention_mask)
        loss = None if labels is None else F.cross_entropy(logits.float(), labels)
        return self._in_form(SequenceClassifierOutput(loss=loss, logits=logits), return_dict)


class HwnasForImageClassification(HwnasPreTrainedModel):
    """A ViT."""

    kinds = ("vit",)
    main_input_name = "pixel_values"

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return the logits of every class (B, V), and with labels (B,) the loss.

        Args:
            pixel_values: images (B, channels, height, width), scaled as those it was trained on.
            labels: class ids.
            return_dict: false for a tuple in place of an `ImageClassifierOutput`.
            kwargs: not used.
        """
        logits = self.subnet(pixel_values)
        loss = None if labels is None else F.cross_entropy(logits.float(), labels)
        return self._in_form(ImageClassifierOutput(loss=loss, logits=logits), return_dict)


def _next_token_loss(logits_BTV: Tensor, labels: Tensor, mask_BT: Tensor | None) -> Tensor:
    """Return the mean loss of the next tokens; padding predicts nothing and is not predicted."""
    targets = labels[:, 1:].to(logits_BTV.device)
    if mask_BT is not None:
        there = (mask_BT[:, -labels.shape[1] :] != 0).to(targets.device)
        targets = targets.masked_fill(~(there[:, 1:] & there[:, :-1]), IGNORED)
    return F.cross_entropy(
        logits_BTV[:, :-1].flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED
    )


def _align(model: nn.Module) -> None:
    """Copy tensors that are views into the file at odd addresses: some kernels need others."""
    for parameter in model.parameters():
        if _is_odd(parameter):
            parameter.data = parameter.data.clone()
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if _is_odd(buffer):
                module._buffers[name] = buffer.clone()


def _is_odd(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.data_ptr() % ALIGNMENT != 0
