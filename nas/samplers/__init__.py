"""Search algorithms by name; every one is an Optuna sampler and works in anybody's study."""

from __future__ import annotations

from collections.abc import Callable
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


def _nsga2(seed: int | None, **options: Any) -> BaseSampler:
    from optuna.samplers import NSGAIISampler

    return NSGAIISampler(seed=seed, **options)


def _random(seed: int | None, **options: Any) -> BaseSampler:
    from optuna.samplers import RandomSampler

    return RandomSampler(seed=seed, **options)


SAMPLERS: dict[str, Callable[..., BaseSampler]] = {
    "predictor": _predictor,
    "nsga2": _nsga2,
    "random": _random,
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
