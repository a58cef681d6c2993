from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from predictors.encodings import Gene, GeneEncoding, layer_groups, levels_of, params_of
from searchspace.errors import UserError

GENES = [
    Gene("width", "categorical", (64, 128, 256)),
    Gene("lr", "float", low=1e-4, high=1e-1, log=True),
    Gene("dropout", "float", low=0.0, high=0.5, step=0.1),
    *[Gene(f"layers.{i}.mixer", "categorical", ("a", "b", "c")) for i in range(4)],
    *[Gene(f"layers.{i}.ffn", "int", low=0, high=8, step=2) for i in range(4)],
]


@given(st.integers(-50, 50), st.integers(0, 60), st.integers(1, 7))
def test_int_levels_round_trip(low: int, span: int, step: int) -> None:
    gene = Gene("x", "int", low=low, high=low + span // step * step, step=step)
    values = list(range(low, low + span // step * step + 1, step))
    assert [gene.value(k) for k in range(gene.num_levels)] == values
    assert [gene.level(v) for v in values] == list(range(len(values)))


@given(st.floats(1e-6, 1e3), st.floats(1.001, 1e6), st.floats(0, 1))
def test_continuous_levels_round_trip_to_a_millionth(low: float, ratio: float, u: float) -> None:
    gene = Gene("x", "float", low=low, high=low * ratio, log=True)
    value = min(max(low * ratio**u, low), low * ratio)
    back = gene.value(gene.level(value))
    assert low <= back <= low * ratio
    assert abs(np.log(back / value)) <= 1e-6 * np.log(ratio) + 1e-12


def test_values_are_plain_python_and_never_leave_the_bounds() -> None:
    gene = Gene("x", "float", low=-10.2, high=10.2, step=0.1)
    top = gene.value(gene.num_levels - 1)
    assert type(top) is float and top <= 10.2
    assert type(Gene("n", "int", low=1, high=10**9, log=True).value(12345)) is int


def test_categorical_tells_true_from_one_and_names_the_choices() -> None:
    gene = Gene("flag", "categorical", (1, True, None, float("nan")))
    assert [gene.level(v) for v in (1, True, None, float("nan"))] == [0, 1, 2, 3]
    with pytest.raises(UserError, match="'z' is not a choice; choose one of 'a', 'b'"):
        Gene("m", "categorical", ("a", "b")).level("z")


def test_bad_genes_are_refused() -> None:
    with pytest.raises(UserError, match="no choices"):
        Gene("m", "categorical")
    with pytest.raises(UserError, match="below low"):
        Gene("x", "float", low=2.0, high=1.0)


def test_params_round_trip_and_missing_parameters_take_level_zero() -> None:
    rng = np.random.default_rng(0)
    levels = np.stack([rng.integers(0, g.num_levels, 20) for g in GENES], axis=1)
    params = params_of(GENES, levels)
    np.testing.assert_array_equal(levels_of(GENES, params), levels)
    assert levels_of(GENES, [{"width": 256}])[0].tolist() == [2] + [0] * 10


def test_layer_groups_sort_by_layer_number_not_by_name() -> None:
    genes = [Gene(f"layers.{i}.g", "int", low=0, high=1) for i in (10, 2, 0)]
    assert layer_groups([*genes, Gene("layers.3.alone", "int", low=0, high=1)]) == {"g": [2, 1, 0]}


def test_totals_and_slopes_equal_a_plain_loop() -> None:
    rng = np.random.default_rng(1)
    levels = np.stack([rng.integers(0, g.num_levels, 30) for g in GENES], axis=1)
    encoding = GeneEncoding(GENES)
    features = encoding.encode(levels)
    column = {name: features[:, i] for i, name in enumerate(encoding.columns)}
    assert features.shape == (30, len(encoding.columns)) == (30, len(encoding.prior_scale))
    assert len(encoding.groups) == len(set(encoding.columns)) == len(encoding.columns)
    for row, entry in enumerate(params_of(GENES, levels)):
        ffn = [2 * entry[f"layers.{i}.ffn"] / 8 - 1 for i in range(4)]
        position = [-1, -1 / 3, 1 / 3, 1]
        assert column["ffn[0].total"][row] == pytest.approx(sum(ffn) / 4)
        slope = sum(p * f for p, f in zip(position, ffn, strict=True)) / 4
        assert column["ffn[0].slope"][row] == pytest.approx(slope)
        count_b = sum(entry[f"layers.{i}.mixer"] == "b" for i in range(4))
        assert column["mixer[1].total"][row] == pytest.approx(2 * count_b / 4 - 2 / 3)
        unit = np.log(entry["lr"] / 1e-4) / np.log(1e3)
        lr = next(v for k, v in column.items() if k.startswith("lr["))
        assert lr[row] == pytest.approx(2 * unit - 1, abs=1e-5)


def test_higher_order_columns_have_a_smaller_prior() -> None:
    encoding = GeneEncoding(GENES)
    scale = {g: s for g, s in zip(encoding.groups, encoding.prior_scale, strict=True)}
    assert scale["deviation"] < scale["moment"] < scale["total"]
    assert scale["product"] < scale["global_product"] < scale["global"]


def test_dictionaries_and_matrix_encode_alike() -> None:
    rng = np.random.default_rng(2)
    levels = np.stack([rng.integers(0, g.num_levels, 10) for g in GENES], axis=1)
    encoding = GeneEncoding(GENES)
    np.testing.assert_array_equal(
        encoding.encode(levels), encoding.encode(params_of(GENES, levels))
    )


def test_extra_features_are_standardised_on_the_reference() -> None:
    rng = np.random.default_rng(3)
    levels = np.stack([rng.integers(0, g.num_levels, 500) for g in GENES], axis=1)
    encoding = GeneEncoding(GENES, lambda m: 1e6 + 100.0 * m[:, [0]], levels)
    extra = encoding.encode(levels)[:, encoding.columns.index("extra[0]")]
    assert extra.mean() == pytest.approx(0.0, abs=1e-6)
    assert extra.std() == pytest.approx(1.0)
    with pytest.raises(ValueError, match="reference sample"):
        GeneEncoding(GENES, lambda m: m[:, [0]])


def test_layers_with_different_choices_and_single_values_still_encode() -> None:
    genes = [
        Gene("layers.0.g", "categorical", ("a", "b", "c")),
        Gene("layers.1.g", "categorical", ("a", "b")),
        Gene("constant", "int", low=3, high=3),
    ]
    features = GeneEncoding(genes).encode([{"layers.0.g": "c", "layers.1.g": "b", "constant": 3}])
    assert np.isfinite(features).all()
    assert features.shape[1] > 0
