"""The stages of a run. Each can be run alone and goes on from what the run folder holds."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor

from hw_profiles.backends import get_backend
from hw_profiles.device import Device
from hw_profiles.latency_table import LatencyTable
from hw_profiles.library.check import busy_here
from hw_profiles.process import prepare_process
from hw_profiles.profiler import finished, profile
from hw_profiles.workload import PHASES, Workload
from nas.candidates import Objectives, Prices, SpaceCodec, metrics_of
from nas.cluster.device_prices import known_metrics, objectives_for
from nas.config import ExperimentConfig, default_workloads
from nas.export_stage import check_export, export_subnets
from nas.front import FrontSources, measure_front, write_front
from nas.progress import Reporter
from nas.run_folder import RunFolder
from nas.search_stage import check_feasible, check_sampler, search_stage
from nas.study import (
    check_storage,
    evaluated,
    nearest,
    nearest_sentence,
    open_study,
    shared_storage,
    sqlite_url,
)
from nas.tasks import prepare_task
from nas.tasks.base import Task
from nas.training import load_supernet, read_state, train_supernet
from nas.training.device import training_device
from searchspace.arch import Arch
from searchspace.errors import UserError
from searchspace.files import read_json, write_json
from searchspace.mixers import MIXERS
from searchspace.space import SearchSpace, read_space
from searchspace.specs import ABSENT
from searchspace.supernet import Supernet

STAGES = ("profile", "train", "search", "export", "report")
METRIC_BATCH = (8, 64)


def check_workload(workload: Workload, space: SearchSpace) -> None:
    """Refuse a workload that networks of a space cannot run.

    Raises:
        UserError: for decoding with a network that does not, another number of tokens than an
            image has patches, or more than the family's longest sequence where that counts.
    """
    family = space.family
    if workload.phase == "decode" and family.kind != "decoder":
        raise UserError(
            f"workload {workload.name!r}: a {family.kind} predicts all at once and decodes "
            f"nothing; time prefill_b{workload.batch}_t{workload.tokens} instead"
        )
    if family.kind == "vit" and workload.tokens != family.max_tokens:
        raise UserError(
            f"workload {workload.name!r}: images of {family.image_size} pixels have "
            f"{family.max_tokens} patches of {family.patch_size}; time "
            f"prefill_b{workload.batch}_t{family.max_tokens}"
        )
    bounded = family.embedding_position == "learned" or any(
        name != ABSENT and MIXERS[name].bounded for name in space.mixers
    )
    if bounded and workload.max_tokens > family.max_tokens:
        raise UserError(
            f"workload {workload.name!r} has {workload.max_tokens} tokens, but networks of space "
            f"{space.name!r} have parameters for max_tokens={family.max_tokens} positions; set "
            "[family] max_tokens higher, or time fewer tokens"
        )


@dataclass(frozen=True)
class Run:
    """What a run hands over.

    Args:
        folder: the run folder.
        front: content of `front.json`.
        subnets: exported folders by arch id.
        report: the HTML report.
    """

    folder: Path
    front: dict[str, Any]
    subnets: dict[str, Path]
    report: Path


class Pipeline:
    """A run's stages over one folder.

    Args:
        config: the resolved config.
        reporter: shows what is going on.

    Raises:
        UserError: when config, data and folder do not go together.
    """

    def __init__(self, config: ExperimentConfig, reporter: Reporter | None = None) -> None:
        self.config = config
        self.reporter = reporter or Reporter()
        read_space(config.preset)  # a wrong preset is said before anything is written
        for text in config.profile.workloads:
            Workload.parse(text)
        prepare_process(config.profile.num_threads)
        get_backend(config.profile.backend)
        self.folder = RunFolder(Path(config.out))
        self.check_search()
        self._held_before = self.folder.claim(config)
        self._started = time.monotonic()
        self._whole = False

    @cached_property
    def task(self) -> Task:
        """The prepared task."""
        return prepare_task(self.config.task, self.folder.task, self.reporter.say)

    @cached_property
    def space(self) -> SearchSpace:
        """The search space, with what the task decides."""
        facts = {"kind": "decoder", **self.task.family_facts}
        return SearchSpace.load(self.config.preset, self.task.vocab_size, facts)

    @cached_property
    def workloads(self) -> list[Workload]:
        """The workloads that are timed.

        Raises:
            UserError: for one that the space's networks cannot run.
        """
        family = self.space.family
        names = self.config.profile.workloads or default_workloads(
            family.kind, self.task.seq_len, family.max_tokens
        )
        workloads = [Workload.parse(text) for text in names]
        for workload in workloads:
            check_workload(workload, self.space)
        if self.config.search.workload not in ("", *names):
            raise UserError(
                f"search.workload={self.config.search.workload!r} is not profiled; choose one of "
                f"{', '.join(names)}"
            )
        return workloads

    @property
    def workload(self) -> str:
        """The workload that ``latency_ms`` means."""
        return self.config.search.workload or self.workloads[0].name

    @cached_property
    def table(self) -> LatencyTable:
        """The latency table of this device.

        Raises:
            UserError: when there is none, or it is of another device.
        """
        if not self.folder.table.exists():
            raise UserError(f"{self.folder.path} holds no latency table; run `nas profile` first")
        table = LatencyTable.load(self.folder.table)
        here = Device.current(get_backend(table.device.backend))
        table.device.require_same(here, f"the latency table {self.folder.table}")
        return table

    @cached_property
    def supernet(self) -> Supernet:
        """The trained supernet."""
        return load_supernet(self.space, self.folder.supernet)

    @cached_property
    def prices(self) -> Prices:
        """Exact costs of candidates, on this device or those of the config."""
        if self.config.ray.devices:
            from nas.cluster.device_prices import DevicePrices
            from nas.cluster.device_tables import device_tables

            return DevicePrices(self.space, device_tables(self), self.workload)
        return Prices(self.space, self.table, self.workload)

    @cached_property
    def objectives(self) -> Objectives:
        """What is minimised, under which limits."""
        search, ray = self.config.search, self.config.ray
        names = objectives_for(search.objectives, ray.devices, ray.goal)
        return Objectives.parse(names, search.constraints, self.prices.metrics)

    @property
    def storage(self) -> str:
        """The study's storage URL."""
        url = self.config.search.storage
        return shared_storage(url, self.folder.path) if url else sqlite_url(self.folder.path)

    def seconds_for(self, stage: str) -> float:
        """Return the seconds a stage may take; a whole run ends within its budget."""
        elapsed = time.monotonic() - self._started if self._whole else 0.0
        return self.config.seconds_left_for(stage, elapsed)

    def run(self) -> Run:
        """Run every stage."""
        self._require_this_device("run")
        training_device(self.config.train.device)  # refused before anything is measured
        self._whole = True
        for stage in STAGES:
            getattr(self, stage)()
        return self.result()

    def check_search(self) -> None:
        """Refuse wrong names in the search section before hours are spent on training.

        Raises:
            UserError: naming what is known.
        """
        from predictors.zero_cost import get_metric

        check_sampler(self.config.search.sampler, self.config.search.metrics)
        check_storage(self.config.search.storage)
        for name in self.config.search.metrics:
            get_metric(name)
        check_export(self.config.export)
        phases = [Workload.parse(name).phase for name in self.config.profile.workloads]
        known = ["weight_bytes", "params", "latency_ms"]
        known += [f"{phase}_ms" for phase in phases or PHASES]
        known = known_metrics(known, self.config.ray.devices)
        Objectives.parse(self.config.search.objectives, self.config.search.constraints, known)

    def profile(self) -> None:
        """Measure the latency table of this device, or those of the config's."""
        if self.config.ray.devices:
            from nas.cluster.search import profile_on_cluster

            profile_on_cluster(self)
            return
        self.task  # noqa: B018  (the vocabulary size is part of what is timed)
        check_feasible(self, None)
        path = self.folder.table
        done = path.exists() and finished(LatencyTable.load(path), self.space, self.workloads)
        if not done and (busy := busy_here(get_backend(self.config.profile.backend))):
            self.reporter.say(f"warning: {busy}")
        with self.reporter.bar("profile") as bar:
            table = profile(
                self.space,
                self.workloads,
                self.folder.table,
                backend=self.config.profile.backend,
                num_threads=self.config.profile.num_threads,
                time_budget_s=self.seconds_for("profile"),
                progress=bar.update,
                seed=self.config.seed,
                realtime=self.config.profile.realtime,
            )
        for workload in table.workloads:
            fit = table.correction(workload)
            self.reporter.say(
                f"latency table: {workload.name} predicted within {fit.mape:.1f}% "
                f"(left-out error on {fit.num_networks} whole networks)"
            )

    def train(self) -> None:
        """Train the supernet, unless the latency table says that no arch keeps the constraints."""
        path = self.folder.table
        table = LatencyTable.load(path) if path.exists() else None
        ready = table is not None and finished(table, self.space, self.workloads)
        check_feasible(self, table if ready else None)
        self.supernet = train_supernet(
            self.space,
            self.task,
            self.config.train,
            self.folder.supernet,
            seed=self.config.seed,
            budget_s=self.seconds_for("train"),
            reporter=self.reporter,
        )
        state = read_state(self.folder.supernet)
        assert state is not None
        self.reporter.say(
            f"supernet: {state.step} steps in {state.elapsed_s:.0f} s, {state.precision}"
        )

    def search(self) -> None:
        """Search archs with the supernet's weights."""
        try:
            search_stage(self)
        except UserError:
            self.take_back_config()
            raise

    def export(self) -> None:
        """Measure the final front and its baselines, then export subnetworks."""
        self._require_this_device("export")
        study = open_study(self.storage, self.objectives, price=self.exact_metrics)
        codec = SpaceCodec(self.space, self.prices, self.objectives)
        items = evaluated(study)
        if not items:
            raise UserError(f"{self.folder.path} holds no evaluated arch; run `nas search` first")
        if found := nearest(study, self.objectives):
            self._refuse_front(nearest_sentence(found, len(items)))
        sources = FrontSources(
            self.space, self.supernet, self.task, self.table, self.objectives,
            self.workload, self.config.seed, self.config.task.name,
        )  # fmt: skip
        front = measure_front(
            sources, items, codec, self.config.export, self.folder.path, self.reporter
        )
        write_front(self.folder.path, front)
        export_subnets(self, front, items)

    def report(self) -> Path:
        """Write the HTML report."""
        from nas.report import write_report

        return write_report(self.folder.path)

    def result(self) -> Run:
        """Return what the folder holds, once every stage is done."""
        front = read_json(self.folder.front, "front")
        subnets = {path.name: path for path in sorted(self.folder.subnets.glob("[!.]*"))}
        return Run(self.folder.path, front, subnets, self.folder.path / "report.html")

    def metric_batch(self) -> tuple[Tensor, Tensor]:
        """Return the inputs and targets (B, T) that training-free metrics are computed on."""
        batch_size, tokens = METRIC_BATCH
        inputs, targets = self.task.train_batch(0, batch_size, self.config.seed)
        if self.space.family.kind == "vit":
            return inputs, targets
        if self.space.family.kind == "encoder":
            return inputs[:, :tokens], targets
        return inputs[:, :tokens], targets[:, :tokens]

    def exact_metrics(self, arch: Arch) -> dict[str, float]:
        """Return every cost of an arch that is known without running it."""
        return dict(metrics_of(self.prices, self.space.encode(arch)))

    def take_back_config(self) -> None:
        """Give the folder back the config that it held before this command, which is refused."""
        if self._held_before is not None:
            write_json(self.folder.config, self._held_before.to_dict())

    def _require_this_device(self, stage: str) -> None:
        if devices := self.config.ray.devices:
            raise UserError(
                f"this run searches for {', '.join(devices)}: `nas search` measures their fronts "
                f"and writes device_fronts.json; for `nas {stage}` on this device give --set "
                "ray.devices=[] and, to export some of those archs, --set export.choose=[ARCH_ID]"
            )

    def _refuse_front(self, sentence: str) -> NoReturn:
        """Write a report that says so, and end; a front of other constraints must not stand."""
        for path in (self.folder.front, self.folder.front.with_suffix(".csv")):
            path.unlink(missing_ok=True)
        raise UserError(f"{sentence}; {self.report()} shows the search")
