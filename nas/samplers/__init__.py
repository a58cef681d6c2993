"""Search algorithms by name; every one is an Optuna sampler and works in anybody's study."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from searchspace.errors import UserError, unknown

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler

    from nas.samplers._codec import CallableCodec, Codec, GeneCodec
    from nas.samplers.predictor_guided import PredictorGuidedSampler

__all__ = [
    "SAMPLERS",
    "CallableCodec",
    "Codec",
    "GeneCodec",
    "PredictorGuidedSampler",
    "make_sampler",
]


def _predictor(seed: int | None, **options: Any) -> BaseSampler:
    from nas.samplers.predictor_guided import PredictorGuidedSampler

    return PredictorGuidedSampler(seed=seed, **options)


def _optuna(name: str) -> Callable[..., BaseSampler]:
    def make(seed: int | None, **options: Any) -> BaseSampler:
        return getattr(import_module("nas.samplers.optuna_samplers"), name)(seed, **options)

    return make


def _own(module: str, cls: str) -> Callable[..., BaseSampler]:
    def make(seed: int | None, **options: Any) -> BaseSampler:
        return getattr(import_module(f"nas.samplers.{module}"), cls)(seed=seed, **options)

    return make


SAMPLERS: dict[str, Callable[..., BaseSampler]] = {
    "predictor": _predictor,
    "random": _optuna("random"),
    "nsga2": _optuna("nsga2"),
    "nsga3": _optuna("nsga3"),
    "tpe": _optuna("tpe"),
    "gp": _optuna("gp"),
    "moead": _own("moead", "MoeadSampler"),
    "age_moea": _own("age_moea", "AgeMoeaSampler"),
    "linas": _own("linas", "LinasSampler"),
    "regularized_evolution": _own("regularized_evolution", "RegularizedEvolutionSampler"),
    "promotion": _own("promotion", "PromotionSampler"),
}


def make_sampler(name: str, seed: int | None = None, **options: Any) -> BaseSampler:
    """Make a sampler by name.

    Args:
        name: a key of `SAMPLERS`.
        seed: seed of everything random; None draws one.
        **options: passed on to the sampler's constructor.

    Raises:
        UserError: for an unknown name or an option that the sampler does not have.
    """
    if name not in SAMPLERS:
        raise unknown("sampler", name, SAMPLERS)
    try:
        return SAMPLERS[name](seed, **options)
    except TypeError as error:
        raise UserError(
            f"sampler {name!r} does not take these options ({', '.join(options)}): {error}"
        ) from error


def __getattr__(name: str) -> Any:
    """Load the classes on first use, so that listing names imports nothing heavy."""
    if name == "PredictorGuidedSampler":
        from nas.samplers.predictor_guided import PredictorGuidedSampler

        return PredictorGuidedSampler
    if name in ("Codec", "GeneCodec", "CallableCodec"):
        from nas.samplers import _codec

        return getattr(_codec, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
