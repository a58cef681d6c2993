"""Where a training runs: devices by name, everything brought there, files that fit any device."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from nas.arch_sampling import LARGEST, RANDOM, StepArch
from nas.config import TrainConfig, load_config
from nas.progress import Reporter
from nas.run_folder import RunFolder
from nas.training import read_state
from nas.training import trainer as trainer_module
from nas.training.batch import Batch
from nas.training.device import training_device
from nas.training.distributed import Channel, Ranks
from nas.training.losses import Scored
from nas.training.modes import compile_mode
from nas.training.passes import PlainPasses, unchanged
from nas.training.precision import faster_precision
from nas.training.state import MAIN_STAGE, TrainState
from nas.training.trainer import Trainer
from searchspace import importance
from searchspace.ends import example_inputs
from searchspace.errors import UserError
from searchspace.space import SearchSpace
from searchspace.supernet import Supernet
from tests.counting_task import VOCAB, CountingTask, make_space

META = torch.device("meta")
"""Tensors there have no values: to look at one, or to mix them with the CPU's, is an error."""
CONFIG = TrainConfig(num_steps=4, batch_size=2, precision="fp32")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("device=gpu", "unknown train.device 'gpu': .*choose one of auto, cpu, cuda"),
        ("compile=graph", "unknown train.compile 'graph': did you mean 'graphs'"),
    ],
)
def test_unknown_names_are_refused(setting: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(None, [f"train.{setting}"])


def test_a_gpu_is_taken_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert training_device("auto").type == training_device("cpu").type == "cpu"
    with pytest.raises(UserError, match=r"train.device='cuda' needs .* choose train.device=cpu"):
        training_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    current = [1]
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert training_device("auto") == training_device("cuda") == torch.device("cuda", 1)
    assert training_device("cpu").type == "cpu"
    # Of several processes each takes its own.
    monkeypatch.setenv("LOCAL_RANK", "6")
    assert training_device("auto").index == 1
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    assert training_device("auto").index == 2 and current == [1, 2]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert faster_precision(torch.device("cuda", 1)) == "bf16"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert faster_precision(torch.device("cuda", 1)) == "fp32"


def test_graphs_are_for_gpus() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    assert compile_mode(CONFIG, cpu) == "off" and compile_mode(CONFIG, cuda) == "graphs"
    for name in ("off", "compile"):
        assert compile_mode(replace(CONFIG, compile=name), cuda) == name
        assert compile_mode(replace(CONFIG, compile=name), cpu) == name
    with pytest.raises(UserError, match="needs an NVIDIA GPU, but the training runs on the cpu"):
        compile_mode(replace(CONFIG, compile="graphs"), cpu)


def test_a_whole_training_brings_everything_to_its_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(
        CONFIG, first_stage_share=0.5, importance_ordering=True, attention_transfer_steps=1
    )
    looked: list[torch.Size] = []

    def values(tensor: Tensor) -> list[float]:
        assert tensor.device.type == "meta"
        looked.append(tensor.shape)
        return [1.0] * len(tensor)

    monkeypatch.setattr(trainer_module, "training_device", lambda name: META)
    monkeypatch.setattr(Trainer, "autocast", lambda self: contextlib.nullcontext())
    monkeypatch.setattr(Trainer, "save", lambda self: None)
    monkeypatch.setattr(Tensor, "tolist", values)
    monkeypatch.setattr(Tensor, "item", lambda self: 1.0)
    monkeypatch.setattr(importance, "_change", lambda actual, expected: 0.0)
    trainer = Trainer(make_space(), PartlyScored(), config, tmp_path, 3, 1e9)
    trainer.restore()
    trainer.run(Reporter(quiet=True))
    assert trainer.state.step == 4 and trainer.state.stage == MAIN_STAGE
    # Losses are looked at once a step: of one arch, then of three; in between those of the mixers.
    assert looked == [(1,), (1,), (2,), (3,), (3,)]
    optimizer = trainer.optimizer.state_dict()
    momenta = [value for name, value in optimizer.items() if "momentum" in name]
    assert momenta and all(value.is_meta for value in momenta)


class PartlyScored(CountingTask):
    """Counting; the first targets are not scored."""

    def train_batch(self, step: int, batch_size: int, seed: int) -> tuple[Tensor, Tensor]:
        inputs, targets = super().train_batch(step, batch_size, seed)
        targets = targets.clone()
        targets[0, :5] = -100
        return inputs, targets


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "facts"),
    [
        ("decoder-tiny", {"kind": "decoder"}),
        ("decoder-operators", {"kind": "decoder"}),
        ("encoder-operators", {"kind": "encoder", "num_classes": 3}),
        ("vit-small", None),
    ],
)
def test_no_operator_makes_the_host_look_at_values(
    preset: str, facts: dict[str, Any] | None
) -> None:
    # What looks at none can be captured as a graph.
    space = SearchSpace.load(preset, 10, facts) if facts else SearchSpace.load(preset, 10)
    supernet = Supernet(space, torch.Generator().manual_seed(0)).to(META)
    passes = PlainPasses(supernet, TrainConfig(), contextlib.nullcontext)
    inputs = example_inputs(space.largest().ends, 2, 16, torch.Generator().manual_seed(1))
    targets = torch.zeros((2, 16) if space.family.kind == "decoder" else 2, dtype=torch.long)
    targets.view(-1)[0] = -100
    scored = Batch.on(torch.device("cpu"), inputs, targets, static=True).scored
    assert scored.weight_N is not None
    batch = Batch(inputs.to(META), targets.to(META), Scored(scored.rows, scored.weight_N.to(META)))
    rng = np.random.default_rng(0)
    archs = [space.largest(), space.smallest(), *(space.sample(rng) for _ in range(2))]
    archs += [space.uniform(mixer=name) for name in space.mixers if name != "none"]
    archs += [space.uniform(ffn=name) for name in space.ffn if name != "none"]
    for arch in archs:
        outcome = passes.backward(StepArch(LARGEST, arch), batch, None)
        assert outcome.hard.is_meta and outcome.word is not None
        assert passes.backward(StepArch(RANDOM, arch), batch, outcome.word).word is None


@pytest.mark.parametrize("num_ignored", [0, 4])
def test_the_static_form_of_a_batch_has_the_same_losses_and_gradients(num_ignored: int) -> None:
    space = make_space()
    task, device = CountingTask(), torch.device("cpu")
    inputs, targets = task.train_batch(0, 3, 0)
    targets = targets.clone()
    targets[1, :num_ignored] = -100
    config = replace(CONFIG, hidden_distillation=0.5)
    found = []
    for static in (False, True):
        supernet = Supernet(space, torch.Generator().manual_seed(0))
        passes = PlainPasses(supernet, config, contextlib.nullcontext)
        batch = Batch.on(device, inputs, targets, static)
        positions = targets.numel() if static else targets.numel() - num_ignored
        teacher = passes.backward(StepArch(LARGEST, space.largest()), batch, None)
        assert teacher.word is not None and len(teacher.word.probs_NV) == positions
        word = replace(teacher.word, hidden_ND=torch.ones(positions, 32))
        student = passes.backward(StepArch(RANDOM, space.smallest()), batch, word)
        supernet.publish_gradients()
        found.append((teacher.hard, student.hard, supernet))
    for one, other in zip(found[0][:2], found[1][:2], strict=True):
        torch.testing.assert_close(one, other)
    for (name, first), (_, second) in zip(
        found[0][2].named_parameters(), found[1][2].named_parameters(), strict=True
    ):
        torch.testing.assert_close(first.grad, second.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_passes_that_are_only_tried_leave_no_trace() -> None:
    tensors = [torch.ones(3), torch.arange(4.0)]
    with pytest.raises(RuntimeError), unchanged(tensors):
        tensors[0].add_(1)
        tensors[1].zero_()
        raise RuntimeError
    assert tensors[0].tolist() == [1, 1, 1] and tensors[1].tolist() == [0, 1, 2, 3]


def test_a_training_goes_on_on_another_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(folder: Path, config: TrainConfig = CONFIG) -> Trainer:
        trainer = Trainer(make_space(), CountingTask(), config, folder, 3, 1e9)
        trainer.restore()
        trainer.run(Reporter(quiet=True))
        return trainer

    whole = trained(tmp_path / "whole").supernet.state_dict()
    folder, step = tmp_path / "parts", Trainer.step

    def stopping(self: Trainer) -> dict[str, float]:
        if self.state.step == 2:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(Trainer, "step", stopping)
    with pytest.raises(KeyboardInterrupt):
        trained(folder, replace(CONFIG, checkpoint_s=-1.0))
    monkeypatch.setattr(Trainer, "step", step)
    # As a GPU would have left it.
    state = json.loads((folder / "state.json").read_text())
    assert state["device"] == "cpu"
    (folder / "state.json").write_text(json.dumps({**state, "device": "cuda"}))
    resumed = trained(folder).supernet.state_dict()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert (read_state(folder) or TrainState()).device == "cpu"


def test_a_team_must_be_of_one_kind(tmp_path: Path) -> None:
    class OnGpus:
        rank = 1

        def agree(self, values: dict[str, Any]) -> dict[str, Any]:
            return {**values, "device": "cuda"}

    trainer = Trainer(make_space(), CountingTask(), CONFIG, tmp_path, 3, 1e9, OnGpus())  # type: ignore[arg-type]
    with pytest.raises(UserError, match="process 1 would train on cpu and process 0 on cuda"):
        trainer.restore()


def test_gradients_of_gpus_travel_by_nccl_where_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    made: list[str] = []

    def new_group(backend: str) -> str:
        made.append(backend)
        return "a group"

    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        assert Ranks()._channel(cpu) == Channel(None, cpu)
        monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
        assert Ranks()._channel(gpu) == Channel(None, cpu)
        monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
        monkeypatch.setattr(dist, "new_group", new_group)
        ranks = Ranks()
        assert ranks._channel(gpu) == ranks._channel(gpu) == Channel("a group", gpu)
        assert made == ["nccl"]
        monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
        assert Ranks()._channel(gpu) == Channel(None, gpu) and made == ["nccl"]
    finally:
        dist.destroy_process_group()


def test_a_run_folder_allows_another_device(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.claim(load_config(None))
    folder.claim(load_config(None, ["train.device=cpu", "train.compile=off"]))
    with pytest.raises(UserError, match=r"train\.batch_size"):
        folder.claim(load_config(None, ["train.batch_size=9"]))


def test_a_supernet_moves_with_all_it_has() -> None:
    space = replace(make_space(), norm=("prepbn",))
    supernet = Supernet(space, torch.Generator().manual_seed(0))
    params = dict(supernet.params)
    assert supernet.to(torch.device("cpu")).params["ends.head.weight"] is params["ends.head.weight"]
    supernet.view(space.largest(), train=True)
    supernet.to(META)
    assert supernet.device == META and not supernet.trained_in_place()[len(supernet.buffers) :]
    view = supernet.view(space.largest(), train=True)
    assert all(t.is_meta for t in [*view.parameters(), *view.buffers()])
    assert view(torch.zeros(2, 5, dtype=torch.long, device=META)).shape == (2, 5, VOCAB)
