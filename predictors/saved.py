"""A fitted predictor in a file that says what its features are.

Letters: N archs, P features.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from predictors.encodings import Features, encode_archs, with_metrics
from searchspace.arch import Arch
from searchspace.errors import UserError, unknown
from searchspace.files import remove, temporary_name, write_file
from searchspace.space import SearchSpace

FloatArray = NDArray[np.float64]

KEY = "hwnas_predictor"
"""Where a safetensors file's metadata say what the features are."""
HOMES = {
    "quality": ("predictors.quality", "QualityRegressor"),
    "latency": ("predictors.latency", "LatencyRegressor"),
}
"""The estimator of every kind of predictor; imported when it is needed."""


class Estimator(Protocol):
    """What a fitted regressor must be able to do."""

    def predict(self, X: ArrayLike, *args: Any, **options: Any) -> Any:
        """Return the predictions of features (N, P)."""
        ...

    def save(self, path: Path) -> None:
        """Write a safetensors file."""
        ...

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote."""
        ...


@dataclass(frozen=True)
class ArchPredictor:
    """A fitted regressor together with what its features are.

    Args:
        regressor: fitted on features of shape (N, P).
        kind: a key of `HOMES`.
        encoding: of archs; see `predictors.encodings.encode_archs`.
        names: of all features, metrics included, in the regressor's order.
        target: what is predicted, with its unit, such as ``"loss"`` or ``"latency_ms"``.
        metrics: training-free metrics among `names`, which the encoding does not give.
        lower_is_better: whether smaller values of the target are better.

    Raises:
        UserError: for an unknown kind.
    """

    regressor: Estimator
    kind: str
    encoding: str
    names: tuple[str, ...]
    target: str
    metrics: tuple[str, ...] = ()
    lower_is_better: bool = True

    def __post_init__(self) -> None:
        if self.kind not in HOMES:
            raise unknown("kind of predictor", self.kind, HOMES)

    def features(
        self,
        archs: Sequence[Arch],
        space: SearchSpace | None = None,
        scores: Mapping[str, ArrayLike] | None = None,
    ) -> Features:
        """Return the features of archs as the regressor was fitted on them, shape (N, P).

        Args:
            archs: what is encoded.
            space: the archs' space, for encodings of its genes.
            scores: values of the predictor's metrics, one per arch each.

        Raises:
            UserError: when an arch or the space does not go with the predictor, or a metric is
                missing.
        """
        missing = [name for name in self.metrics if name not in (scores or {})]
        if missing:
            raise UserError(
                f"the predictor of {self.target} needs the training-free metrics "
                f"{', '.join(self.metrics)}; {', '.join(missing)} was not given"
            )
        wanted = {name: (scores or {})[name] for name in self.metrics}
        return with_metrics(encode_archs(archs, space, self.encoding), wanted).aligned(self.names)

    def predict(
        self,
        archs: Sequence[Arch],
        space: SearchSpace | None = None,
        scores: Mapping[str, ArrayLike] | None = None,
    ) -> tuple[FloatArray, FloatArray | None]:
        """Return the target of archs, shape (N,), and where it is known the standard deviation.

        Raises:
            UserError: as `features`.
        """
        X = self.features(archs, space, scores).values
        if self.kind != "quality":
            return self.mean_of(X), None
        mean, std = self.regressor.predict(X, return_std=True)
        return np.asarray(mean, dtype=np.float64), np.asarray(std, dtype=np.float64)

    def mean_of(self, X: FloatArray) -> FloatArray:
        """Return the target of features (N, P), shape (N,)."""
        return np.asarray(self.regressor.predict(X), dtype=np.float64)

    def save(self, path: Path) -> None:
        """Write the regressor's own safetensors file with the rest in its metadata.

        Raises:
            UserError: when the file cannot be written.
        """
        from safetensors.numpy import save

        facts = {
            "kind": self.kind,
            "encoding": self.encoding,
            "names": list(self.names),
            "target": self.target,
            "metrics": list(self.metrics),
            "lower_is_better": self.lower_is_better,
        }
        # Never at its own place before it says what its features are.
        unlabelled = temporary_name(path)
        try:
            self.regressor.save(unlabelled)
            tensors, metadata = _content(unlabelled)
        finally:
            remove(unlabelled)
        content = save(tensors, metadata={**metadata, KEY: json.dumps(facts)})
        write_file(path, lambda stream: stream.write(content))

    @classmethod
    def load(cls, path: Path) -> ArchPredictor:
        """Read what `save` wrote; nothing in the file is run.

        Raises:
            UserError: when the file is absent, damaged, or says nothing about its features.
        """
        text = _content(path)[1].get(KEY)
        if text is None:
            raise UserError(
                f"{path} does not say what its features are; write predictors of archs with "
                "`nas score RUN --by loss --save FILE`"
            )
        try:
            facts = json.loads(text)
            kind, encoding, target = (str(facts[k]) for k in ("kind", "encoding", "target"))
            names, metrics = (tuple(map(str, facts[k])) for k in ("names", "metrics"))
            lower_is_better = bool(facts["lower_is_better"])
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path} is damaged: what its features are cannot be read") from None
        if kind not in HOMES:
            raise unknown("kind of predictor", kind, HOMES)
        module, name = HOMES[kind]
        regressor = getattr(import_module(module), name).load(path)
        return cls(regressor, kind, encoding, names, target, metrics, lower_is_better)


def _content(path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """Return the tensors and metadata of a safetensors file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, dict(file.metadata() or {})
    except FileNotFoundError:
        raise UserError(f"there is no predictor {path}") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a whole safetensors file ({error})") from None
