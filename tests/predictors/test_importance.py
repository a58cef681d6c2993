"""Importance by permutation, and predictors in files, with a regressor that is known."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from predictors import saved
from predictors.encodings import Features, encode_archs
from predictors.importance import permutation_importance
from predictors.saved import KEY, ArchPredictor
from searchspace.arch import Arch, LayerArch
from searchspace.errors import UserError

LAYER = LayerArch("softmax", 2, 2, "nope", ffn="gelu", intermediate_size=16)
ARCHS = [Arch(16, 8, 11, (LAYER,) * depth) for depth in (1, 2, 5)]


class Linear:
    """A regressor that is known exactly."""

    def __init__(self, weights: Any) -> None:
        self.weights = np.asarray(weights, dtype=np.float64)

    def predict(self, X: Any, return_std: bool = False) -> Any:
        mean = np.asarray(X) @ self.weights
        return (mean, np.full(len(mean), 0.5)) if return_std else mean

    def save(self, path: Path) -> None:
        save_file({"weights": self.weights}, path, metadata={"own": "fact"})

    @classmethod
    def load(cls, path: Path) -> Linear:
        return cls(load_file(path)["weights"])


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let files of both kinds hold the regressor above."""
    for kind in saved.HOMES:
        monkeypatch.setitem(saved.HOMES, kind, (__name__, "Linear"))
    monkeypatch.setattr(saved, "import_module", lambda name: type("Module", (), globals()))


def predictor(kind: str = "quality", metrics: tuple[str, ...] = ()) -> ArchPredictor:
    names = (*encode_archs(ARCHS).names, *metrics)
    weights = [float(name == "depth") + 10.0 * (name in metrics) for name in names]
    return ArchPredictor(Linear(weights), kind, "aggregate", names, "loss", metrics)


def test_importance_is_the_change_when_a_column_is_shuffled() -> None:
    rng = np.random.default_rng(0)
    X = rng.standard_normal((4000, 4))
    X[:, 3] = math.nan
    features = Features(X, ("weak", "unused", "strong", "absent"))
    found = permutation_importance(
        lambda X: X[:, 0] - 3.0 * X[:, 2], features, np.random.default_rng(1)
    )
    assert list(found)[:2] == ["strong", "weak"]
    # Two independent draws of unit variance differ by sqrt(2) in root mean square.
    assert found["strong"] == pytest.approx(3.0 * math.sqrt(2.0), rel=0.03)
    assert found["weak"] == pytest.approx(math.sqrt(2.0), rel=0.03)
    assert found["unused"] == found["absent"] == 0.0
    one = permutation_importance(lambda X: X[:, 0], Features(X[:1], features.names), rng)
    assert set(one.values()) == {0.0}


def test_a_predictor_predicts_from_archs() -> None:
    mean, std = predictor().predict(ARCHS)
    assert mean.tolist() == [1.0, 2.0, 5.0]
    assert std is not None and std.tolist() == [0.5] * 3
    mean, std = predictor("latency").predict(ARCHS[::-1])
    assert mean.tolist() == [5.0, 2.0, 1.0] and std is None


def test_a_predictor_may_take_metrics() -> None:
    wants = predictor(metrics=("synflow",))
    mean, _ = wants.predict(ARCHS, scores={"synflow": [0.1, 0.2, 0.3], "other": [1, 2, 3]})
    assert mean == pytest.approx([2.0, 4.0, 8.0])
    with pytest.raises(UserError, match="needs the training-free metrics synflow"):
        wants.predict(ARCHS, scores={"other": [1, 2, 3]})


@pytest.mark.parametrize("kind", list(saved.HOMES))
def test_a_file_says_what_its_features_are(known: None, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "predictor.safetensors"
    before = predictor(kind, ("synflow",))
    before.save(path)
    after = ArchPredictor.load(path)
    assert (after.kind, after.encoding, after.names) == (kind, "aggregate", before.names)
    assert (after.target, after.metrics, after.lower_is_better) == ("loss", ("synflow",), True)
    scores = {"synflow": [0.0, 1.0, 2.0]}
    assert (after.predict(ARCHS, None, scores)[0] == before.predict(ARCHS, None, scores)[0]).all()
    assert saved._content(path)[1]["own"] == "fact"
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("facts", "sentence"),
    [
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ("{}", "is damaged"),
        (
            json.dumps({"kind": "qualty", "encoding": "aggregate", "names": [], "target": "loss",
                        "metrics": [], "lower_is_better": True}),
            "did you mean 'quality'",
        ),
    ],
)  # fmt: skip
def test_damaged_facts_are_refused(tmp_path: Path, facts: str, sentence: str) -> None:
    path = tmp_path / "predictor.safetensors"
    save_file({"weights": np.zeros(1)}, path, metadata={KEY: facts})
    with pytest.raises(UserError, match=sentence):
        ArchPredictor.load(path)


def test_unknown_kinds_are_refused() -> None:
    with pytest.raises(UserError, match="did you mean 'latency'"):
        ArchPredictor(Linear([]), "latncy", "aggregate", (), "latency_ms")
