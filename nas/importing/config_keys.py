"""Reading `config.json`: every key is honoured, known to change nothing, or refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from searchspace.errors import UserError

MEANINGLESS = frozenset(
    """
    architectures model_type dtype torch_dtype transformers_version use_cache initializer_range
    _name_or_path name_or_path return_dict output_attentions output_hidden_states use_return_dict
    id2label label2id problem_type finetuning_task task_specific_params tokenizer_class
    bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id decoder_start_token_id
    attention_dropout attn_pdrop embd_pdrop resid_pdrop hidden_dropout hidden_dropout_prob
    attention_probs_dropout_prob classifier_dropout summary_activation summary_first_dropout
    summary_proj_to_labels summary_type summary_use_proj gradient_checkpointing pretraining_tp
    chunk_size_feed_forward reorder_and_upcast_attn attn_implementation _attn_implementation
    max_length min_length do_sample temperature top_k top_p num_beams repetition_penalty n_ctx
    max_window_layers
    """.split()  # noqa: SIM905
)
"""Keys that say nothing about what a trained network computes."""


class CheckpointConfig:
    """The content of a checkpoint's `config.json`; remembers which keys were asked for.

    Args:
        values: what the file holds.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = dict(values)
        self._used: set[str] = set()

    def raw(self, key: str, default: Any = None) -> Any:
        """Return a value as it stands; the default where it is absent or null."""
        self._used.add(key)
        value = self._values.get(key)
        return default if value is None else value

    def whole(self, key: str, default: int | None = None) -> int:
        """Return a whole number of at least 1.

        Raises:
            UserError: when it is none, or absent without a default.
        """
        value = self.raw(key, default)
        if type(value) is not int or value < 1:
            raise UserError(f"config.json has {key}={value!r}; a whole number above 0 is needed")
        return value

    def number(self, key: str, default: float) -> float:
        """Return a positive number."""
        return positive(key, self.raw(key, default))

    def flag(self, key: str, default: bool) -> bool:
        """Return true or false."""
        value = self.raw(key, default)
        if type(value) is not bool:
            raise UserError(f"config.json has {key}={value!r}; true or false is needed")
        return value

    def text(self, key: str, default: str) -> str:
        """Return a text."""
        value = self.raw(key, default)
        if not isinstance(value, str):
            raise UserError(f"config.json has {key}={value!r:.60}; a name is needed")
        return value

    def require(self, key: str, expected: Any, why: str) -> None:
        """Refuse every other value than the expected one; absent and null are taken for it.

        Raises:
            UserError: with the reason.
        """
        value = self.raw(key, expected)
        if value != expected or type(value) is not type(expected):
            raise UserError(f"config.json has {key}={value!r:.60}, which cannot be kept: {why}")

    def finish(self) -> None:
        """Refuse keys that nobody asked for and that may change the function.

        Raises:
            UserError: naming the first.
        """
        for key, value in self._values.items():
            if key not in self._used | MEANINGLESS and value not in (None, False, {}, []):
                raise UserError(
                    f"config.json has {key}={value!r:.60}, which nas import does not know, so the "
                    "network might compute something else; only plain checkpoints of the "
                    "supported kinds can be brought in"
                )


def positive(key: str, value: object) -> float:
    """Return a value of config.json as a positive number.

    Raises:
        UserError: when it is none.
    """
    numeric = isinstance(value, int | float) and not isinstance(value, bool)
    if not numeric or not math.isfinite(float(value)) or float(value) <= 0:  # type: ignore[arg-type]
        raise UserError(f"config.json has {key}={value!r:.60}; a number above 0 is needed")
    return float(value)  # type: ignore[arg-type]


def rope_position(config: CheckpointConfig) -> str:
    """Return the name of the rotary embedding that a config describes.

    Raises:
        UserError: for scaled or partial ones, and a base that is no whole number.
    """
    given = config.raw("rope_parameters", {})
    if not isinstance(given, Mapping):
        raise UserError(f"config.json has rope_parameters={given!r:.60}; a mapping is needed")
    values = {"rope_theta": config.raw("rope_theta", 10_000.0), **given}
    scaling = config.raw("rope_scaling") or {}
    kinds = {values.pop("rope_type", "default"), values.pop("type", "default")}
    if isinstance(scaling, Mapping):
        kinds |= {scaling.get("rope_type", "default"), scaling.get("type", "default")}
    base = positive("rope_theta", values.pop("rope_theta"))
    config.require("partial_rotary_factor", 1.0, "only whole heads are rotated")
    if values.pop("partial_rotary_factor", 1.0) != 1.0 or values or kinds != {"default"}:
        raise UserError(
            f"config.json asks for scaled or partial rotary positions ({dict(given)!r:.80}, "
            f"rope_scaling={scaling!r:.60}); only plain ones with any base can be kept"
        )
    if base != int(base):
        raise UserError(f"config.json has rope_theta={base!r}; a whole number is needed")
    return "rope" if base == 10_000 else f"rope_b{int(base)}"
