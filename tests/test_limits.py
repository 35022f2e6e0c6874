"""What N cells leave unknown: the formula, the factors, and the cells of a perfect model."""

import json

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from conftest import benchmark_script, planted_cells
from hypothesis import given
from hypothesis import strategies as st

from scld_nb.data import InputError
from scld_nb.limits import linear_judge_limit, mean_factors, perfect_model, with_means_off


@given(st.integers(1, 50_000), st.integers(1, 50_000), st.integers(2, 50_000))
def test_the_limit_falls_with_training_cells_and_rises_with_genes_and_judged_cells(p, n_train, n):
    limit = linear_judge_limit(p, n_train, n)
    assert 0.5 <= limit <= 1
    assert linear_judge_limit(p, 2 * n_train, n) <= limit <= min(linear_judge_limit(2 * p, n_train, n), linear_judge_limit(p, n_train, 2 * n))


def test_the_limit_is_that_of_a_simulated_judge():
    rng, p, n_train, n = np.random.default_rng(1), 3000, 500, 400
    found = []
    for _ in range(4):
        shift = rng.normal(size=p) / np.sqrt(n_train)
        w = rng.normal(size=(n, p)).mean(0) - (rng.normal(size=(n, p)) + shift).mean(0)
        real, fake = rng.normal(size=(n, p)) @ w, (rng.normal(size=(n, p)) + shift) @ w
        found.append((real[:, None] > fake[None]).mean())
    assert abs(np.mean(found) - linear_judge_limit(p, n_train, n)) < 0.03


@pytest.mark.parametrize("numbers", [(0, 1, 1), (1, 0, 1), (1, 1, -2), (float("nan"), 1, 1)])
def test_the_formula_wants_positive_numbers(numbers):
    with pytest.raises(InputError, match="must be positive"):
        linear_judge_limit(*numbers)


def test_factors_scatter_like_the_error_of_the_mean():
    x = np.random.default_rng(0).poisson(np.linspace(0.5, 20, 40), size=(300, 40)).astype(float)
    z = np.array([(mean_factors(sp.csr_matrix(x), seed=s) - 1) * x.mean(0) / (x.std(0) / np.sqrt(300)) for s in range(50)])
    assert abs(z.std() - 1) < 0.05 and abs(z.mean()) < 0.1
    assert np.array_equal(mean_factors(sp.csr_matrix(x), seed=3), mean_factors(sp.csr_matrix(x), seed=3))


def test_proportions_of_labels_are_known():
    codes = np.repeat([0, 1], [30, 70])
    x = np.c_[codes == 0, codes == 1, np.zeros(100)].astype(float)         # each gene is constant within labels, or never seen
    assert (mean_factors(sp.csr_matrix(x), codes) == 1).all()
    assert (mean_factors(sp.csr_matrix(x))[:2] != 1).all()


@given(st.integers(0, 2**31), st.lists(st.integers(0, 40), min_size=6, max_size=6))
def test_whole_factors_leave_nothing_to_chance(seed, counts):
    x = sp.csr_matrix(np.array(counts, dtype=np.float32).reshape(2, 3))
    out = with_means_off(x, np.array([0.0, 1.0, 3.0]), seed=seed)
    assert np.array_equal(out.toarray(), x.toarray() * [0, 1, 3]) and out.dtype == np.int32 and (out.data > 0).all()


def test_expectations_are_multiplied():
    x = sp.csr_matrix(np.full((4000, 3), 5.0, dtype=np.float32))
    before, factors = x.copy(), np.array([0.3, 1.0, 1.7])
    out = with_means_off(x, factors).toarray()
    assert np.allclose(out.mean(0), 5 * factors, atol=0.06) and (out[:, 0] <= 5).all() and (out[:, 2] >= 5).all() and (x != before).nnz == 0
    assert np.isclose(out[:, 0].var(), 5 * 0.3 * 0.7, rtol=0.1)


@pytest.mark.parametrize("factors", [np.ones(2), np.array([1.0, -0.1, 1.0]), np.array([1.0, np.nan, 1.0]), np.ones((1, 3))])
def test_factors_that_are_none(factors):
    with pytest.raises(InputError, match="factors must be 3 finite numbers"):
        with_means_off(sp.csr_matrix(np.ones((2, 3))), factors)


def test_the_perfect_model_hands_over_real_cells(cells):
    made, same, other = (perfect_model(cells, 50, "cell_type", seed=seed) for seed in (0, 0, 1))
    assert made.shape == (50, cells.n_vars) and made.obs_names.is_unique and set(made.obs_names) <= set(cells.obs_names)
    assert (made.obs["cell_type"] == cells.obs.loc[made.obs_names, "cell_type"]).all() and made.uns["scld"]["scale"] == "counts"
    assert (made.X != same.X).nnz == 0 and (made.obs_names != other.obs_names).any()
    original = cells[made.obs_names].X.toarray()
    assert 0.9 < made.X.sum() / original.sum() < 1.1 and ((made.X.toarray() > 0) <= (original > 0)).all() and (made.X.toarray() != original).any()
    assert perfect_model(cells, cells.n_obs).n_obs == cells.n_obs
    for n in (0, cells.n_obs + 1):
        with pytest.raises(InputError, match="the number of training cells"):
            perfect_model(cells, n, "cell_type")


def test_the_benchmark_writes_what_it_prints(tmp_path, capsys):
    planted_cells(300).write_h5ad(tmp_path / "planted.h5ad")
    call = [str(tmp_path / "planted.h5ad"), "--labels", "cell_type", "--seeds", "0", "--forests", "--trees", "10", "--root", str(tmp_path)]
    assert benchmark_script("limits").main(call) == 0
    printed, found = capsys.readouterr().out, json.loads((tmp_path / "results" / "planted" / "limits" / "seed0.json").read_text())
    rows = pd.DataFrame(found["rows"]).set_index("row")
    assert list(rows.index) == ["control", "perfect model"] and f"{rows.loc['perfect model', 'combined']:.3f}" in printed
    assert set(rows) == {"combined", "strict_forest", "strict_boosting", "rf_auc counts20k", "rf_auc log1p"} and rows.stack().between(0, 1).all()
    assert benchmark_script("limits").main(call[:1] + ["--labels", "nothing"]) == 2 and "no column 'nothing'" in capsys.readouterr().err
