"""SUGAR: each step by hand, an uneven ring made even, and real cells."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from conftest import planted_cells
from hypothesis import given, settings
from hypothesis import strategies as st

from scld_nb.baselines.random import RandomBaseline
from scld_nb.baselines.sugar import (
    SugarBaseline,
    degree_sparsity,
    diffusion,
    fit_sugar,
    generate,
    generation_level,
    kernel_bandwidth,
    local_covariance,
    local_deviations,
    rescale,
    sugar,
)
from scld_nb.data import InputError, default_split, load
from scld_nb.evaluation import expression
from scld_nb.metrics import mmd, mmd_bandwidth, rf_auc


def rng(seed=0):
    return np.random.default_rng(seed)


def uneven_ring(n=500, seed=0):
    angle, radius = rng(seed).vonmises(0.0, 1.0, n), 1 + rng(seed + 1).normal(0, 0.03, n)
    return np.column_stack([radius * np.cos(angle), radius * np.sin(angle)])


def unevenness(points, bins=12):
    counts = np.histogram(np.arctan2(points[:, 1], points[:, 0]), bins, (-np.pi, np.pi))[0]
    return counts.std() / counts.mean()


RING = uneven_ring()


# ------------------------------------------------------------------ the ring


@pytest.mark.parametrize("options", [{}, {"truncate": False}, {"t": 0}, {"equalize": True}, {"bandwidth": "minmax"}, {"bandwidth": "median"}])
def test_the_uneven_ring_becomes_flatter_and_stays_a_ring(options):
    before = unevenness(RING)
    assert before > 0.55
    for seed in (0, 1):
        made = sugar(RING, 1000, rng(seed), **options)
        assert made.shape == (1000, 2)
        assert unevenness(np.vstack([RING, made])) < 0.68 * before
        even = np.vstack([RING, RING[rng(seed).integers(0, 500, 1000)]])  # resampling alone changes nothing
        assert unevenness(even) > 0.85 * before
        assert np.abs(np.linalg.norm(made, axis=1) - 1).mean() < 0.07


def test_the_diffusion_takes_points_back_to_the_ring():
    fit = fit_sugar(RING)
    astray = RING + rng().normal(0, 0.15, RING.shape)
    moved = diffusion(astray, RING, fit.sparsity).apply(astray)
    off = [np.abs(np.linalg.norm(x, axis=1) - 1).mean() for x in (astray, moved)]
    assert off[1] < 0.7 * off[0]


def test_seeds_and_steps():
    a, b, c = (sugar(RING, 60, rng(s)) for s in (1, 1, 2))
    assert (a == b).all() and not np.allclose(a, c)
    fit = fit_sugar(RING)
    assert np.allclose(sugar(fit, 60, rng(1)), a)
    assert not np.allclose(sugar(fit, 60, rng(1), t=2), a)
    assert (sugar(fit, 60, rng(1), t=0) == generate(RING, *_levels(fit, 60))).all()


def _levels(fit, n):
    source = rng(1)
    return generation_level(fit.degree, n, source), fit.deviations, source


# ------------------------------------------------------------------ its parts


def test_degree_by_hand():
    x = np.array([[0.0], [1.0], [3.0], [3.5]])
    d = np.abs(x - x.T)
    sigma = d.mean(0).std(ddof=1)
    kernel = np.exp(-((d / sigma) ** 2))
    kernel[kernel < 1e-3] = 0
    assert 0 in kernel
    degree, sparsity, found = degree_sparsity(x)
    assert found == pytest.approx(sigma)
    assert np.allclose(degree, kernel.sum(1) / kernel.sum(1).mean()) and np.allclose(sparsity, 1 / degree)


def test_bandwidth_rules():
    x = np.array([0.0, 1.0, 3.0, 7.0])[:, None]
    d = np.abs(x - x.T)
    assert kernel_bandwidth(d, "minmax") == pytest.approx(4 * np.sqrt(2))
    assert kernel_bandwidth(d, "median") == pytest.approx(np.median(d))
    square = np.array([[0, 0], [0, 1], [1, 0], [1, 1.0]])  # equal mean distances: the median stands in
    d = np.linalg.norm(square[:, None] - square, axis=-1)
    assert kernel_bandwidth(d, "std") == pytest.approx(np.median(d))
    assert kernel_bandwidth(np.zeros((3, 3))) == 1
    with pytest.raises(InputError, match="unknown bandwidth 'knn'; known: std, minmax, median"):
        kernel_bandwidth(d, "knn")


def test_dense_places_have_the_greater_degree():
    degree, *_ = degree_sparsity(RING)
    angle = np.abs(np.arctan2(RING[:, 1], RING[:, 0]))
    assert degree[angle < 0.5].mean() > 2 * degree[angle > 2.5].mean()


def test_covariance_by_hand():
    x = rng().normal(size=(40, 3))
    found = local_covariance(x, 5)
    for i in (0, 17, 39):
        nearest = np.argsort(np.linalg.norm(x - x[i], axis=1))[:5]
        assert i in nearest and np.allclose(found[i], np.cov(x[nearest].T))
    assert local_deviations(x[:3], 5).shape == (3, 3, 3)
    with pytest.raises(InputError, match="at least 2 points and k of at least 2, got 1 points"):
        local_deviations(x[:1])


def test_generated_points_have_the_local_mean_and_covariance():
    x = rng().normal(size=(30, 3))
    deviations, levels = local_deviations(x), np.zeros(30, dtype=int)
    levels[11] = 40_000
    made = generate(x, levels, deviations, rng(1))
    covariance = local_covariance(x)[11]
    scale = np.sqrt(np.diag(covariance).max())
    assert np.allclose(made.mean(0), x[11], atol=0.03 * scale)
    assert np.allclose(np.cov(made.T), covariance, atol=0.04 * scale**2)
    assert generate(x, np.zeros(30, dtype=int), deviations, rng()).shape == (0, 3)


def test_number_of_points_with_and_without_the_determinant():
    fit = fit_sugar(RING)
    lack = fit.degree.max() - fit.degree
    plain = np.mean([generation_level(fit.degree, 4000, rng(s)) for s in range(40)], axis=0)
    assert np.allclose(plain, 4000 * lack / lack.sum(), atol=0.3)
    factor = np.sqrt(np.linalg.det(np.eye(2) + local_covariance(RING) / (2 * fit.sigma**2)))
    equal = generation_level(fit.degree, 4000, rng(), equalize=True, deviations=fit.deviations, sigma=fit.sigma)
    assert np.abs(equal - 4000 * lack * factor / (lack * factor).sum()).max() < 1
    with pytest.raises(InputError, match="needs the deviations"):
        generation_level(fit.degree, 3, rng(), equalize=True)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(0, 300), st.integers(0, 2**32), st.booleans())
def test_exactly_as_many_points_as_asked_for(n_points, n, seed, same):
    degree = np.ones(n_points) if same else rng(seed).gamma(1.0, 1.0, n_points)
    levels = generation_level(degree, n, rng(seed)) if n else np.zeros(n_points)
    lack = degree.max() - degree
    share = n * lack / lack.sum() if lack.sum() > 0 else np.full(n_points, n / n_points)
    assert levels.sum() == n and (levels >= 0).all() and np.abs(levels - share).max() < 1 + 1e-6


@pytest.mark.parametrize("truncate", [True, False])
def test_diffusion_against_dense_arithmetic(truncate):
    old, new = rng().normal(size=(25, 2)), rng(1).normal(size=(18, 2))
    _, sparsity, _ = degree_sparsity(old)
    d = np.linalg.norm(new[:, None] - old, axis=-1)
    by_old, by_new = np.sort(d, axis=0)[4], np.sort(d, axis=1)[:, 4]
    a, b = np.exp(-((d / by_old) ** 2)), np.exp(-((d / by_new[:, None]) ** 2))
    if truncate:
        a, b = a * (d <= by_old), b * (d <= by_new[:, None])
    kernel = a @ np.diag(sparsity) @ b.T
    kernel = (kernel + kernel.T) / 2
    expected = kernel / kernel.sum(1, keepdims=True)
    operator = diffusion(new, old, sparsity, truncate=truncate)
    weights = operator.matrix()
    assert np.allclose(weights, expected)
    assert np.allclose(weights.sum(1), 1) and weights.min() >= 0
    assert np.allclose(operator.apply(new), expected @ new)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 20), st.integers(1, 20), st.integers(1, 4), st.integers(0, 2**32), st.booleans(), st.booleans())
def test_rows_sum_to_one_and_means_stay_inside(n_old, n_new, d, seed, truncate, copies):
    old, new = rng(seed).normal(size=(n_old, d)), rng(seed + 1).normal(size=(n_new, d))
    if copies:
        old[: n_old // 2], new[: n_new // 2] = 0.0, 0.0
    operator = diffusion(new, old, degree_sparsity(old)[1], truncate=truncate)
    weights = operator.matrix()
    assert np.allclose(weights.sum(1), 1) and weights.min() >= 0
    moved = operator.apply(new)
    assert (moved <= new.max(0) + 1e-9).all() and (moved >= new.min(0) - 1e-9).all()


def test_bandwidth_of_coinciding_points():
    operator = diffusion(np.zeros((8, 2)), np.zeros((9, 2)), np.ones(9))
    assert np.allclose(operator.matrix().sum(1), 1)


def test_rescaling_matches_quantiles_whatever_sign_and_origin():
    x, y = rng().normal(3, 2, (400, 3)), rng(1).normal(3, 0.1, (300, 3))
    y[:, 2] = x[:, 2].mean()  # no spread: nothing to stretch
    out = rescale(y, x)
    centre = x.mean(0)
    assert np.allclose(np.quantile(np.abs(out - centre), 0.95, axis=0)[:2], np.quantile(np.abs(x - centre), 0.95, axis=0)[:2])
    assert np.allclose(out[:, 2], y[:, 2])
    flipped = rescale(-y + 7, -x + 7)
    assert np.allclose(flipped, -out + 7)


def test_points_that_cannot_be_used():
    with pytest.raises(InputError, match="at least 2 points with finite coordinates, got 1 points"):
        fit_sugar(np.zeros((1, 2)))
    with pytest.raises(InputError, match="finite"):
        fit_sugar(np.array([[0.0, 1.0], [np.nan, 2.0]]))


# ------------------------------------------------------------------ the baseline


def test_fit_and_sample(cells):
    baseline = SugarBaseline(n_pcs=10, seed=3).fit(cells, "cell_type")
    drawn = baseline.sample(120)
    assert drawn.shape == (120, cells.n_vars) and list(drawn.var_names) == list(cells.var_names)
    assert drawn.uns["scld"] == {"scale": "counts20k", "method": "sugar", "target_sum": 20_000}
    assert drawn.X.data.min() >= 0 and np.allclose(drawn.X.sum(axis=1), 20_000, rtol=1e-4)
    assert (baseline.sample(120).X != drawn.X).nnz == 0
    assert (SugarBaseline(n_pcs=10, seed=3).fit(cells, "cell_type").sample(120).X != drawn.X).nnz == 0
    assert (baseline.sample(120, seed=4).X != drawn.X).nnz > 0
    assert baseline.settings() == {
        "method": "sugar", "seed": 3, "steps": None, "budget_s": None, "n_pcs": 10, "max_cells": 5000, "k": 5, "bandwidth": "std",
        "equalize": False, "t": 1, "truncate": True, "transform": "none",
    }  # fmt: skip


@pytest.mark.parametrize("n", [1, 299, 301, 1300])
def test_exactly_n_cells(cells, n):
    for label in (None, "T"):
        assert SugarBaseline(n_pcs=5, max_cells=310).fit(cells, "cell_type").sample(n, label=label).n_obs == n


@pytest.mark.parametrize("transform", ["none", "log1p"])
def test_a_label_is_made_from_its_own_cells(cells, transform):
    baseline = SugarBaseline(n_pcs=20, transform=transform).fit(cells, "cell_type")
    means = {label: np.asarray(expression(cells[cells.obs["cell_type"] == label], "counts20k").mean(axis=0)).ravel() for label in ("B", "NK", "T")}
    for label in means:
        drawn = baseline.sample(200, label=label)
        assert set(drawn.obs["cell_type"]) == {label}
        profile = np.asarray(drawn.X.mean(axis=0)).ravel()
        fits = {k: np.corrcoef(profile, v)[0, 1] for k, v in means.items()}
        assert max(fits, key=fits.get) == label and fits[label] > 0.9


def test_at_most_max_cells_are_looked_at_drawn_once(cells):
    baseline = SugarBaseline(n_pcs=5, max_cells=50).fit(cells, "cell_type")
    assert [len(baseline._fit_of(code).points) for code in (None, 0, 1, 2)] == [50, 50, 50, 30]
    assert baseline._fit_of(0) is baseline._fit_of(0)
    again = SugarBaseline(n_pcs=5, max_cells=50).fit(cells, "cell_type")
    assert np.array_equal(again._fit_of(1).points, baseline._fit_of(1).points)
    other = SugarBaseline(n_pcs=5, max_cells=50, seed=1).fit(cells, "cell_type")
    assert not np.allclose(np.abs(other._fit_of(None).points[:, 0]), np.abs(baseline._fit_of(None).points[:, 0]))


def test_projection_back_is_exact_with_all_components(cells):
    small = cells[:, :20].copy()
    small.X = sp.csr_matrix(small.X.toarray() + 1)
    for transform in ("none", "log1p"):
        baseline = SugarBaseline(n_pcs=19, transform=transform).fit(small)
        again = baseline._cells.to_genes(baseline._cells.scores[:30]).toarray()
        real = expression(small, "counts20k").toarray()[:30]
        error = np.abs(again - real).mean() / np.abs(real - real.mean(0)).mean()
        assert error < (1e-3 if transform == "none" else 0.3), transform  # totals tie the 20th to the others; logs do not


def test_a_point_without_positive_values_takes_the_mean(cells):
    baseline = SugarBaseline(n_pcs=5).fit(cells)
    baseline._cells.mean = np.full(cells.n_vars, -1.0)
    row = baseline._cells.to_genes(np.zeros((1, 5))).toarray()[0]
    assert row.sum() == pytest.approx(20_000, rel=1e-5) and np.corrcoef(row, np.asarray(cells.X.mean(axis=0)).ravel())[0, 1] > 0.9


def test_small_class_and_small_data():
    few = planted_cells(n=100, shares=(0.60, 0.35, 0.05))
    baseline = SugarBaseline(n_pcs=5).fit(few, "cell_type")
    with pytest.raises(InputError, match="label 'T' has 5 training cells, sugar needs 6; leave it out") as error:
        baseline.sample(4, label="T")
    assert "\n" not in str(error.value)
    assert baseline.sample(20).n_obs == 20
    six = planted_cells(n=100, shares=(0.60, 0.34, 0.06))
    assert SugarBaseline(n_pcs=5).fit(six, "cell_type").sample(30, label="T").n_obs == 30
    with pytest.raises(InputError, match="needs at least 6 cells and 2 genes, there are 5 and 60"):
        SugarBaseline().fit(few[:5].copy())
    with pytest.raises(InputError, match="there are 100 and 1"):
        SugarBaseline().fit(few[:, :1].copy())
    with pytest.raises(InputError, match="all 9 cells have the same profile"):
        SugarBaseline().fit(ad.AnnData(np.tile([[1.0, 0.0, 4.0]], (9, 1)) * np.arange(1, 10)[:, None]))
    two_kinds = np.tile([[1.0, 0.0, 4.0, 2.0], [5.0, 1.0, 0.0, 2.0]], (15, 1))
    assert np.allclose(SugarBaseline().fit(ad.AnnData(two_kinds)).sample(8).X.sum(axis=1), 20_000, rtol=1e-4)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"n_pcs": 0}, "n_pcs is 0: give a whole number of at least 1"),
        ({"max_cells": 5}, "max_cells is 5: give a whole number of at least 6"),
        ({"k": 1}, "k is 1"),
        ({"t": -1}, "t is -1"),
        ({"bandwidth": "knn"}, "unknown bandwidth 'knn'; known: std, minmax, median"),
        ({"transform": "sqrt"}, "unknown transform 'sqrt'; known: log1p, none"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(InputError, match=message):
        SugarBaseline(**options)


def test_memory_is_asked_for(cells, monkeypatch):
    monkeypatch.setattr("scld_nb.baselines.base.free_memory", lambda: 1000)
    with pytest.raises(InputError, match="sugar on 300 cells x 300 cells needs .* lower max_cells"):
        SugarBaseline().fit(cells)


@settings(max_examples=20, deadline=None)
@given(st.integers(6, 25), st.integers(2, 20), st.integers(0, 2**32), st.sampled_from(["none", "log1p"]), st.booleans(), st.booleans())
def test_any_counts_give_cells(n, n_genes, seed, transform, equalize, truncate):
    y = rng(seed).poisson(rng(seed).gamma(0.5, 3.0, (n, n_genes)))
    y[:, 0] += y.sum(axis=1) == 0
    y[: n // 3] = y[0]
    y[-2:] = [[1, 3] + [0] * (n_genes - 2), [3, 1] + [0] * (n_genes - 2)]  # two cells differ, whatever was drawn
    labels = pd.DataFrame({"k": rng(seed).choice(list("ab"), n)}, index=[f"c{i}" for i in range(n)])
    baseline = SugarBaseline(n_pcs=8, transform=transform, equalize=equalize, truncate=truncate, seed=seed)
    drawn = baseline.fit(ad.AnnData(sp.csr_matrix(y), obs=labels), "k").sample(13).X
    assert drawn.shape == (13, n_genes) and np.isfinite(drawn.data).all() and (drawn.data >= 0).all()
    assert np.allclose(drawn.sum(axis=1), 20_000, rtol=1e-4)


def test_better_than_random_on_real_cells():
    train, test = default_split(load("pbmc68k_reduced"))
    real = expression(test, "counts20k")
    m = mmd_bandwidth(real)
    own, other = (expression(k().fit(train, "louvain").sample(test.n_obs), "counts20k") for k in (SugarBaseline, RandomBaseline))
    assert rf_auc(real, own, n_trees=40, folds=3).auc < rf_auc(real, other, n_trees=40, folds=3).auc - 0.1
    assert mmd(real, own, bandwidth=m).biased < mmd(real, other, bandwidth=m).biased - 0.03
