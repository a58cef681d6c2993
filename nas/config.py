"""The experiment config: frozen dataclasses, read from TOML, overridden by `--set`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nas.cluster.config import RayConfig
from nas.config_values import build_config, parse_value, set_value
from nas.tasks.config import TaskConfig
from predictors.rank_aggregation import COMBINED
from searchspace.errors import UserError, unknown
from searchspace.files import read_json, read_toml

DEVICES = ("auto", "cpu", "cuda")
COMPILE_MODES = ("auto", "off", "graphs", "compile")


@dataclass(frozen=True)
class TrainConfig:
    """How the supernet is trained.

    Args:
        budget_s: seconds of training; None takes a share of the run's budget. Ignored when
            `num_steps` is given.
        num_steps: number of steps (a token budget: `num_steps * batch_size * task.seq_len`).
        batch_size: sequences per step.
        sampling: a name in `nas.arch_sampling.ARCH_SAMPLINGS`: which archs a step trains.
        num_random: random archs per step, beside the largest and the smallest where the sampling
            has them.
        distillation: weight of the teacher's soft targets (0 to 1). The teacher is the largest of
            the step, or after a first stage a frozen copy of the largest.
        first_stage_share: share of the training in which the largest is trained alone. A frozen
            copy of it then teaches all archs, the largest included. 0 for one stage only.
        hidden_distillation: weight of the match with the frozen teacher's final hidden states.
        attention_transfer_steps: steps after the first stage in which every other mixer learns to
            do what softmax does in its slot, where the largest has softmax; 0 for none.
        attention_transfer_lr: learning rate of Adam in them.
        importance_ordering: put the most important heads, FFN channels and features first after
            the first stage, so that smaller archs keep them.
        matrix_lr: learning rate of Muon, for the weight matrices of the layers.
        other_lr: learning rate of AdamW, for embedding, head, norms and biases.
        warmup_steps: steps of linear warm-up.
        decay_share: share of every stage over which the rate falls linearly to 0.
        norm_anneal_share: share of the training over which norms that are annealed (`prepbn`) turn
            from their exact into their foldable form.
        precision: ``"fp32"``, ``"bf16"`` (autocast), or ``"auto"`` for the faster one here.
        device: ``"cpu"``, ``"cuda"``, or ``"auto"`` for a GPU where there is one. A training may
            go on on another one than it began on.
        compile: how archs that recur are run: ``"graphs"`` (replayed CUDA graphs), ``"compile"``
            (`torch.compile`), ``"off"``, or ``"auto"`` for graphs on a GPU and off elsewhere.
        checkpoint_s: seconds between checkpoints.
        start: a folder that `nas import` wrote; training starts from its weights, and in a training
            of one stage its largest network is the frozen teacher. Empty for random weights.

    Raises:
        UserError: for an unknown name, a share that is none, or a step between two stages where
            there is only one.
    """

    budget_s: float | None = None
    num_steps: int | None = None
    batch_size: int = 8
    sampling: str = "sandwich"
    num_random: int = 1
    distillation: float = 0.5
    first_stage_share: float = 0.0
    hidden_distillation: float = 0.1
    attention_transfer_steps: int = 0
    attention_transfer_lr: float = 0.01
    importance_ordering: bool = False
    matrix_lr: float = 0.02
    other_lr: float = 0.003
    warmup_steps: int = 20
    decay_share: float = 0.6
    norm_anneal_share: float = 0.5
    precision: str = "auto"
    checkpoint_s: float = 20.0
    start: str = ""
    device: str = "auto"
    compile: str = "auto"

    def __post_init__(self) -> None:
        from nas.arch_sampling import ARCH_SAMPLINGS

        if self.sampling not in ARCH_SAMPLINGS:
            raise unknown("train.sampling", self.sampling, ARCH_SAMPLINGS)
        if self.device not in DEVICES:
            raise unknown("train.device", self.device, DEVICES)
        if self.compile not in COMPILE_MODES:
            raise unknown("train.compile", self.compile, COMPILE_MODES)
        for name in ("distillation", "first_stage_share", "decay_share", "norm_anneal_share"):
            share = getattr(self, name)
            if not 0 <= share <= 1 or (name == "first_stage_share" and share == 1):
                limit = "below 1" if name == "first_stage_share" else "1"
                raise UserError(f"train.{name}={share} is no share; choose 0 to {limit}")
        for name in ("num_random", "attention_transfer_steps", "hidden_distillation"):
            if getattr(self, name) < 0:
                raise UserError(f"train.{name}={getattr(self, name)} is negative; choose 0 or more")
        between = {
            "attention_transfer_steps": self.attention_transfer_steps,
            "importance_ordering": self.importance_ordering,
        }
        for name, value in between.items():
            if value and not self.first_stage_share:
                raise UserError(
                    f"train.{name}={value} needs a trained largest network; give it a first stage, "
                    "such as train.first_stage_share=0.3"
                )


@dataclass(frozen=True)
class ProfileConfig:
    """What is timed.

    Args:
        workloads: such as ``prefill_b1_t256`` (one sequence of 256 tokens at once) or
            ``decode_b1_t256`` (one more token after 256). None are those of `default_workloads`.
        backend: how networks are run, a name in `hw_profiles.backends.BACKENDS`.
        num_threads: threads of the device; None takes every core that may be used.
        budget_s: seconds of timing; None takes a share of the run's budget.
        realtime: use real-time scheduling for the timed bursts (needs the right to).
    """

    workloads: tuple[str, ...] = ()
    backend: str = "eager"
    num_threads: int | None = None
    budget_s: float | None = None
    realtime: bool = False


@dataclass(frozen=True)
class SearchConfig:
    """How the front is searched.

    Args:
        sampler: a name in `nas.samplers.SAMPLERS`.
        objectives: what is minimised: ``loss`` and any of the metrics `latency_ms` (of
            `workload`), `prefill_ms`, `decode_ms`, `weight_bytes`, `params`.
        workload: the workload that `latency_ms` means; empty for the first that is profiled.
        constraints: such as ``latency_ms<=8``; over the same metrics.
        num_evaluations: candidates to evaluate; None means as many as `budget_s` allows.
        budget_s: seconds of search; None takes a share of the run's budget.
        evaluation_tokens: held-out tokens per evaluation.
        metrics: training-free metrics that warm-start the quality predictor.
        metric_pool: archs that are scored by them.
        population: population of evolutionary samplers.
        storage: where the study lives: empty for `study.db` in the run folder, a database URL
            such as ``postgresql://USER@HOST/DATABASE``, or ``journal:FILE``.
        workers: processes that evaluate at the same time.

    Raises:
        UserError: for a number of evaluations or workers below 1, or a population below 2.
    """

    sampler: str = "predictor"
    objectives: tuple[str, ...] = ("loss", "latency_ms", "weight_bytes")
    workload: str = ""
    constraints: tuple[str, ...] = ()
    num_evaluations: int | None = None
    budget_s: float | None = None
    evaluation_tokens: int = 16_384
    metrics: tuple[str, ...] = COMBINED
    metric_pool: int = 64
    population: int = 32
    storage: str = ""
    workers: int = 1

    def __post_init__(self) -> None:
        for name in ("num_evaluations", "workers", "population"):
            value = getattr(self, name)
            least = 2 if name == "population" else 1
            if value is not None and value < least:
                raise UserError(f"search.{name}={value} is below {least}; choose {least} or more")


@dataclass(frozen=True)
class ExportConfig:
    """What is handed over.

    Args:
        choose: names of front members (`best`, `fastest`, `smallest`, `knee`), arch ids, or
            ``all`` for the whole front.
        front_size: members of the final front that are measured again, at most.
        test_tokens: tokens of the test files for the final losses.
        rewrites: names in `searchspace.rewrites.REWRITES` (``layernorm_to_rmsnorm``), applied to
            the exported networks that they fit; `export.json` says which do not, and why.
        formats: names in `nas.export.EXPORTERS`; what does not fit a network, or lacks a package,
            is left out, and `export.json` says why.
        recover_steps: steps that each exported network trains on alone before it is written, 0 for
            none; `export.json` says what that gained.

    Raises:
        UserError: for a negative number of steps.
    """

    choose: tuple[str, ...] = ("all",)
    front_size: int = 16
    test_tokens: int = 32_768
    rewrites: tuple[str, ...] = ()
    formats: tuple[str, ...] = ("hf", "onnx")
    recover_steps: int = 0

    def __post_init__(self) -> None:
        if self.recover_steps < 0:
            raise UserError(
                f"export.recover_steps={self.recover_steps} is negative; choose 0 (off) or more"
            )


@dataclass(frozen=True)
class ExperimentConfig:
    """Everything a run depends on.

    Args:
        preset: name of a shipped search space, or the path of a TOML file.
        budget: wall time of the whole run, such as ``10m`` or ``1h30m``.
        out: the run folder.
        seed: of every random draw.
    """

    preset: str = "decoder-small"
    budget: str = "10m"
    out: str = "runs/quickstart"
    seed: int = 0
    task: TaskConfig = field(default_factory=TaskConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    ray: RayConfig = field(default_factory=RayConfig)
    export: ExportConfig = field(default_factory=ExportConfig)

    def __post_init__(self) -> None:
        parse_duration(self.budget)
        if self.seed < 0:
            raise UserError(f"seed={self.seed} is negative; choose 0 or more")
        known = ("", *self.profile.workloads)
        if self.profile.workloads and self.search.workload not in known:
            raise UserError(
                f"search.workload={self.search.workload!r} is not profiled; choose one of "
                f"profile.workloads: {', '.join(self.profile.workloads)}"
            )
        if self.train.precision not in ("auto", "fp32", "bf16"):
            raise unknown("train.precision", self.train.precision, ("auto", "fp32", "bf16"))

    def stage_seconds(self, stage: str) -> float:
        """Return the seconds a stage may take: its own budget, or its share of the whole."""
        return self._given().get(stage, SHARES[stage] * parse_duration(self.budget))

    def seconds_left_for(self, stage: str, elapsed_s: float) -> float:
        """Return the seconds a stage may take when the run has taken `elapsed_s` so far.

        A stage whose own budget is given gets it. Otherwise it gets its share, or what is left
        when the later stages shall have theirs, but never less than a third of its share.
        """
        wanted = self.stage_seconds(stage)
        if stage in self._given():
            return wanted
        stages = list(SHARES)
        later = sum(self.stage_seconds(name) for name in stages[stages.index(stage) + 1 :])
        left = parse_duration(self.budget) - elapsed_s - later
        return max(wanted / 3, min(wanted, left))

    def _given(self) -> dict[str, float]:
        own = {
            "train": self.train.budget_s,
            "profile": self.profile.budget_s,
            "search": self.search.budget_s,
        }
        return {stage: seconds for stage, seconds in own.items() if seconds is not None}

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON-ready form, which `from_dict` reads."""
        return _jsonable(dataclasses.asdict(self))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ExperimentConfig:
        """Build from nested mappings.

        Raises:
            UserError: for an unknown key or a value of the wrong type.
        """
        return build_config(cls, values)


def default_workloads(kind: str, seq_len: int, num_patches: int) -> tuple[str, ...]:
    """Return what is timed when the config names no workloads.

    Args:
        kind: of the family: a decoder is timed at a prompt and one more token after it, the others
            at one whole input.
        seq_len: tokens of the task's inputs; at most 256 are timed of a decoder.
        num_patches: tokens of an image.
    """
    if kind == "decoder":
        tokens = min(seq_len, 256)
        return f"prefill_b1_t{tokens}", f"decode_b1_t{tokens}"
    return (f"prefill_b1_t{num_patches if kind == 'vit' else seq_len}",)


SHARES = {"profile": 0.16, "train": 0.45, "search": 0.15, "export": 0.13, "report": 0.03}
"""Shares of the whole budget; the rest is left to preparing data and loading."""


def load_config(
    path: str | None = None, overrides: Sequence[str] = (), **top_level: Any
) -> ExperimentConfig:
    """Return the config of a TOML (or a run's `config.json`) file with overrides applied.

    Args:
        path: the file; None means defaults.
        overrides: ``key.path=value`` strings, values in TOML syntax (bare words are strings).
        top_level: further values by dotted path with ``__`` for the dot; None is ignored.

    Raises:
        UserError: when the file is absent or invalid, or a key or value is wrong.
    """
    values = _read(path) if path else {}
    for key, value in top_level.items():
        if value is not None:
            set_value(values, key.replace("__", "."), value)
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--set {text!r} has no '='; write it as --set search.population=64")
        set_value(values, key.strip(), parse_value(value.strip()))
    return ExperimentConfig.from_dict(values)


def parse_duration(text: str) -> float:
    """Return the seconds of a duration such as ``90s``, ``10m`` or ``1h30m``.

    Raises:
        UserError: when it is not one, or not longer than 0.
    """
    match = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?", text.strip())
    seconds = 0.0
    if match:
        hours, minutes, rest = (int(group or 0) for group in match.groups())
        seconds = 3600.0 * hours + 60.0 * minutes + rest
    if seconds <= 0:
        raise UserError(f"budget={text!r} is not a duration; write it like 90s, 10m or 1h30m")
    return seconds


def _read(path: str) -> dict[str, Any]:
    file = Path(path)
    if file.suffix == ".json" and file.is_file():
        return dict(read_json(file, "config"))
    return read_toml(file, "config file")


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value
