"""The export stage: which subnetworks are handed over, and in which formats."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nas.config import ExportConfig
from nas.evaluation import evaluation_amount
from nas.export import EXPORTERS, ExportFailed
from nas.export.checker import Checker
from nas.export.delivery import ExportSource, export_subnet
from nas.recovery import Recovery, RecoveryRecipe
from nas.study import Evaluated, weights_key
from nas.training.state import read_state
from searchspace.arch import Arch
from searchspace.errors import UserError, unknown
from searchspace.rewrites import REWRITES

if TYPE_CHECKING:
    from nas.pipeline import Pipeline


def check_export(config: ExportConfig) -> None:
    """Refuse wrong names before hours are spent on training.

    Raises:
        UserError: naming what is known.
    """
    for what, names, known in (
        ("export.rewrites", config.rewrites, REWRITES),
        ("export.formats", config.formats, EXPORTERS),
    ):
        for name in names:
            if name not in known:
                raise unknown(what, name, known)


def export_subnets(pipeline: Pipeline, front: dict[str, Any], items: list[Evaluated]) -> None:
    """Write the folders of the chosen subnetworks; those that are verified already stay.

    Args:
        pipeline: of the run.
        front: what `nas.front.measure_front` returned.
        items: everything that the search evaluated.

    Raises:
        ExportFailed: when artefacts differ from the supernet, after all others are written.
        UserError: for a name that is not known, or a folder that cannot be written to.
    """
    config = pipeline.config.export
    source = ExportSource(
        pipeline.supernet,
        pipeline.task,
        evaluation_amount(pipeline.task, config.test_tokens // 4),
        config.rewrites,
        config.formats,
        weights_key(pipeline.folder.supernet),
        _recovery(pipeline),
    )
    _say_what_is_missing(pipeline, source)
    records = {r["arch_id"]: r for group in front["groups"].values() for r in group}
    wanted = _chosen(config, front, items)
    failures: list[str] = []
    with pipeline.reporter.bar("export") as bar, Checker() as checker:
        for index, arch in enumerate(wanted):
            bar.update(index / len(wanted), arch.id)
            folder = pipeline.folder.subnets / arch.id
            try:
                export_subnet(source, arch, folder, records.get(arch.id, {}), checker)
            except ExportFailed as error:
                failures.append(str(error))
        bar.update(1.0, f"{len(wanted)} subnetworks")
    if failures:
        raise ExportFailed(
            f"{len(failures)} of {len(wanted)} subnetworks were not exported: "
            + "; ".join(failures)
        )


def _recovery(pipeline: Pipeline) -> Recovery | None:
    """Return how networks train on before they are written, if they do."""
    config = pipeline.config
    state = read_state(pipeline.folder.supernet)
    if not config.export.recover_steps or state is None:
        return None
    recipe = RecoveryRecipe.of(config.train, config.export.recover_steps, state.precision)
    return Recovery(recipe, config.seed, pipeline.reporter)


def _say_what_is_missing(pipeline: Pipeline, source: ExportSource) -> None:
    for exporter in source.exporters():
        if reason := exporter.missing():
            pipeline.reporter.say(f"format {exporter.name!r} is left out: {reason}")


def _chosen(config: ExportConfig, front: dict[str, Any], items: list[Evaluated]) -> list[Arch]:
    """Return the archs that `export.choose` names, without repeats."""
    members = {r["arch_id"]: Arch.from_dict(r["arch"]) for r in front["groups"]["front"]}
    known = {item.arch.id: item.arch for item in items}
    chosen: dict[str, Arch] = {}
    for name in config.choose:
        if name == "all":
            chosen |= members
            continue
        arch_id = front["chosen"].get(name, name)
        arch = members.get(arch_id) or known.get(arch_id)
        if arch is None:
            raise UserError(
                f"export.choose={name!r} is neither all, {', '.join(front['chosen'])} nor the "
                "id of an evaluated arch; see front.csv"
            )
        chosen[arch.id] = arch
    return list(chosen.values())
