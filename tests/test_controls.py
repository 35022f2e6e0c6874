"""What the evaluation hands to its measures: which cells, which genes, how much chance."""

import numpy as np
import pytest
import scipy.sparse as sp
from test_evaluation import QUICK, cells, synthetic

from scld_nb import controls, evaluation
from scld_nb.evaluation import _library, _null_sd, evaluate, expression
from scld_nb.metrics import auc_null_sd, mmd_bandwidth

OPTIONS = {"suite": True, "spaces": ["log1p"]} | QUICK


@pytest.fixture(scope="module")
def groups():
    return cells(60, seed=1), cells(90, seed=2), cells(150, seed=3)


def rows_of(matrix):
    return {row.tobytes() for row in np.asarray(matrix.todense() if sp.issparse(matrix) else matrix, dtype=np.float32)}


def test_chance_of_each_area():
    assert _null_sd("strict_forest", 50, None) == auc_null_sd(50) and _null_sd("coverage", 50, 20) is None
    assert _null_sd("strict_boosting", 50, None) == pytest.approx(1.3 * auc_null_sd(50))
    assert _null_sd("combined", 50, None) == pytest.approx(1.5 * auc_null_sd(50))
    assert _null_sd("membership_auc", 50, 20) == auc_null_sd(20)
    assert _null_sd("copied", 50, 200) == pytest.approx(np.sqrt(0.05 * 0.95 * (1 / 50 + 1 / 200)))


def test_controls_of_copying_are_real_cells_that_are_not_among_the_heldout_ones(groups, monkeypatch):
    real, fake, train = groups
    seen, original = [], controls.memorisation
    monkeypatch.setattr(controls, "memorisation", lambda f, t, h, **o: seen.append((f, t, h)) or original(f, t, h, **o))
    evaluate(real, synthetic(fake), train=train, **OPTIONS)
    positive, negative, _ = seen
    mine = rows_of(expression(real))
    assert rows_of(positive[0]) | rows_of(positive[2]) == mine and not rows_of(positive[0]) & rows_of(positive[2])
    assert rows_of(negative[2]) == mine and all(rows_of(part[1]) == rows_of(expression(train)) for part in seen)


def test_genes_of_the_suite_are_chosen_on_training_cells(groups, monkeypatch):
    real, fake, train = groups
    seen, original = [], evaluation.variable_genes
    monkeypatch.setattr(evaluation, "variable_genes", lambda x, n: seen.append((x.shape[0], n)) or original(x, n))
    evaluate(real, synthetic(fake), train=train, negative=False, **OPTIONS)
    assert seen == [(150, 1000), (150, 500)]


def test_a_library_is_counted_over_the_genes_that_are_compared(groups):
    fake = groups[1]
    made = synthetic(fake, "counts", fake.X)
    assert np.array_equal(_library(made, list(fake.var_names[:5]), None), np.asarray(fake.X[:, :5].sum(1)).ravel())


def test_the_bandwidth_is_that_of_all_real_cells(groups):
    real, fake, train = groups
    found = evaluate(real, synthetic(fake), train=train, n_max=30, spaces=["log1p"], negative=False, **QUICK)
    assert found.settings["bandwidth"]["log1p"] == mmd_bandwidth(expression(real), seed=0)


def test_the_shuffled_cells_are_those_of_the_control(groups, monkeypatch):
    real, fake, train = groups
    seen, original = [], controls.permute_genes
    monkeypatch.setattr(controls, "permute_genes", lambda x, **o: seen.append(rows_of(x)) or original(x, **o))
    evaluate(real, synthetic(fake), train=train, spaces=["log1p"], **QUICK)
    assert seen[0] <= rows_of(expression(train, "counts20k"))


def test_shuffled_cells_of_the_copying_measures_are_no_training_cells(groups, monkeypatch):
    real, fake, train = groups
    seen, original = [], controls.memorisation
    monkeypatch.setattr(controls, "memorisation", lambda f, t, h, **o: seen.append(rows_of(f)) or original(f, t, h, **o))
    evaluate(real, synthetic(fake), train=train, **OPTIONS)
    assert not seen[1] & rows_of(expression(train))


def test_a_library_is_counted_in_the_layer_that_holds_counts(groups):
    real = groups[0].copy()
    real.layers["raw"], real.X = real.X.copy(), real.X * 2
    assert np.array_equal(_library(real, list(real.var_names), "raw"), np.asarray(real.layers["raw"].sum(1)).ravel())
