"""Splatter: simulation and estimation against each other, against scipy, and on planted counts."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from conftest import planted_cells
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from scld_nb.baselines import splatter
from scld_nb.baselines.random import RandomBaseline
from scld_nb.baselines.splatter import (
    SplatGenes,
    SplatParameters,
    SplatterBaseline,
    SplatterMatchedBaseline,
    common_dispersion,
    draw_genes,
    draw_libraries,
    estimate_splat,
    fit_gamma,
    fit_libraries,
    gene_moments,
    prior_df,
    simulate_splat,
    trend_bcv,
)
from scld_nb.data import InputError, default_split, load
from scld_nb.evaluation import expression
from scld_nb.metrics import mmd, mmd_bandwidth, rf_auc

BOTH = [SplatterBaseline, SplatterMatchedBaseline]


def rng(seed=0):
    return np.random.default_rng(seed)


def negative_binomial(dispersion, seed=0, n=600, n_genes=800):
    """Counts with one dispersion, gene means from a Gamma, unequal libraries."""
    mu = rng(seed).lognormal(0, 0.4, (n, 1)) * rng(seed + 1).gamma(0.5, 3.0, n_genes)
    rate = rng(seed + 2).gamma(1 / dispersion, mu * dispersion) if dispersion else mu
    y = rng(seed + 3).poisson(rate)
    return y[y.sum(axis=1) > 0]


# ------------------------------------------------------------------ the simulator


@pytest.mark.parametrize("phi, df", [(0.0, np.inf), (0.2, np.inf), (0.5, 40.0)])
def test_simulated_mean_and_variance_follow_the_bcv_trend(phi, df):
    params = SplatParameters(60, bcv_common=phi, bcv_df=df)
    genes = SplatGenes(np.geomspace(1, 100, 60) / np.geomspace(1, 100, 60).sum(), splatter.draw_scatter(params, 60, rng(1)))
    y = simulate_splat(params, 20_000, rng(2), genes=genes, libraries=np.full(20_000, 3000.0)).toarray()
    lam = 3000 * genes.shares
    variance = lam + ((phi + 1 / np.sqrt(lam)) * genes.scatter) ** 2 * lam**2
    assert np.allclose(y.mean(0), lam, rtol=6 * np.sqrt((variance / lam**2).max() / 20_000))
    assert abs(np.median(y.var(0) / variance) - 1) < 0.02
    assert np.allclose(y.var(0), variance, rtol=0.25)


def test_scatter_is_the_root_of_an_inverse_chi_square():
    factor = splatter.draw_scatter(SplatParameters(1, bcv_df=12.0), 20_000, rng())
    assert stats.kstest(12.0 / factor**2, stats.chi2(12).cdf).pvalue > 1e-3
    assert (splatter.draw_scatter(SplatParameters(1, bcv_df=np.inf), 5, rng()) == 1).all()


def test_without_scatter_a_gene_is_poisson():
    params = SplatParameters(3)
    genes = SplatGenes(np.array([0.0, 0.1, 0.9]), np.zeros(3))
    y = simulate_splat(params, 20_000, rng(), genes=genes, libraries=np.full(20_000, 20.0)).toarray()
    assert (y[:, 0] == 0).all()
    for gene, lam in ((1, 2.0), (2, 18.0)):
        seen = np.bincount(y[:, gene], minlength=60)[:60] / len(y)
        assert np.abs(seen - stats.poisson(lam).pmf(np.arange(60))).max() < 0.01


def test_gene_means_are_gamma_with_outliers_above():
    plain = draw_genes(SplatParameters(20_000, mean_shape=0.6, outlier_prob=0.0), rng())
    scaled = plain.shares * 20_000 * 0.6 / 0.3  # the Gamma's scale is lost in the shares
    assert plain.shares.sum() == pytest.approx(1)
    assert stats.kstest(scaled / scaled.mean(), stats.gamma(0.6, scale=1 / 0.6).cdf).pvalue > 1e-3
    odd = draw_genes(SplatParameters(20_000, outlier_prob=0.1, outlier_loc=4.0, outlier_scale=0.1), rng())
    assert (odd.shares > 30 * np.median(odd.shares)).mean() == pytest.approx(0.1, abs=0.012)


def test_libraries_of_both_kinds():
    log_normal = draw_libraries(SplatParameters(1, library_loc=8.0, library_scale=0.4), 20_000, rng())
    assert np.log(log_normal).mean() == pytest.approx(8, abs=0.02) and np.log(log_normal).std() == pytest.approx(0.4, rel=0.03)
    normal = draw_libraries(SplatParameters(1, library_kind="normal", library_loc=10.0, library_scale=5.0), 20_000, rng())
    assert np.median(normal) == pytest.approx(10, abs=0.2) and normal.min() == 1


def test_dropout_follows_its_logistic_curve():
    params = SplatParameters(4, dropout_mid=np.log(50.0), dropout_shape=-2.0)
    genes = SplatGenes(np.array([10.0, 50.0, 200.0, 740.0]) / 1000, np.zeros(4))
    y = simulate_splat(params, 20_000, rng(), genes=genes, libraries=np.full(20_000, 1000.0), dropout="experiment").toarray()
    lam = 1000 * genes.shares
    expected = 1 / (1 + (lam / 50) ** 2)
    assert np.allclose((y == 0).mean(0), expected, atol=0.012)
    with pytest.raises(InputError, match="unknown dropout 'some'; known: none, experiment"):
        simulate_splat(params, 2, rng(), dropout="some")


def test_simulation_in_several_blocks_and_by_seed():
    params = SplatParameters(30, library_loc=5.0)
    genes = draw_genes(params, rng())
    y = simulate_splat(params, 2300, rng(1), genes=genes)
    assert y.shape == (2300, 30) and y.dtype == np.int32
    assert (y != simulate_splat(params, 2300, rng(1), genes=genes)).nnz == 0
    assert (y != simulate_splat(params, 2300, rng(2), genes=genes)).nnz > 0
    assert list(splatter._blocks(2300, 30)) == [1000, 1000, 300]
    assert max(splatter._blocks(2300, 17_789)) * 17_789 <= 5_000_000 and list(splatter._blocks(2, 10**8)) == [1, 1]


@pytest.mark.parametrize("scatter", [30.0, 1e3, 1e8, 1e150])
def test_absurd_scatter_gives_finite_whole_numbers(scatter):
    genes = SplatGenes(np.full(10, 0.1), np.full(10, scatter))
    y = simulate_splat(SplatParameters(10), 2000, rng(), genes=genes, libraries=np.full(2000, 1e8)).toarray()
    assert y.min() == 0 and y.max() <= splatter.LARGEST_COUNT * 1.01
    assert scatter > 1e3 or y.max() > 1e6


# ------------------------------------------------------------------ estimation, piece by piece


@pytest.mark.parametrize("shape, rate", [(0.4, 0.2), (2.0, 5.0), (30.0, 1.0)])
def test_gamma_fit_against_scipy(shape, rate):
    x = rng(3).gamma(shape, 1 / rate, 4000)
    found = fit_gamma(x)
    assert found == pytest.approx((shape, rate), rel=0.1)
    likelihood = stats.gamma.fit(x, floc=0)
    assert found[0] == pytest.approx(likelihood[0], rel=0.08)
    distance = stats.cramervonmises(x, stats.gamma(found[0], scale=1 / found[1]).cdf).statistic
    for other in ((likelihood[0], 1 / likelihood[2]), (found[0] * 1.03, found[1]), (found[0], found[1] * 0.97)):
        assert distance <= stats.cramervonmises(x, stats.gamma(other[0], scale=1 / other[1]).cdf).statistic + 1e-9


def test_gamma_fit_of_odd_values(monkeypatch):
    assert fit_gamma([2.0, 2.0, 2.0])[0] > 1e3
    with pytest.raises(InputError, match="positive values"):
        fit_gamma([0.0, 1.0])
    with pytest.raises(InputError, match="positive values"):
        fit_gamma([])
    x = rng().gamma(2.0, 1.0, 500)
    failed = optimize.OptimizeResult(success=False, x=np.array([np.nan, np.nan]), fun=np.nan)
    monkeypatch.setattr(splatter.optimize, "minimize", lambda *a, **k: failed)
    assert fit_gamma(x) == pytest.approx((x.mean() ** 2 / x.var(), x.mean() / x.var()))


def test_moments_against_dense_arithmetic():
    y = negative_binomial(0.3, n=50, n_genes=20)
    moments = gene_moments(sp.csr_matrix(y))
    factor = np.median(y.sum(1)) / y.sum(1)
    x = y * factor[:, None]
    assert np.allclose(moments.mean, x.mean(0)) and np.allclose(moments.variance, x.var(0, ddof=1))
    assert np.allclose(moments.fourth, ((x - x.mean(0)) ** 4).mean(0), atol=1e-8)
    assert (moments.poisson, moments.root, moments.n) == pytest.approx((factor.mean(), np.sqrt(factor).mean(), 50))
    with pytest.raises(InputError, match="1 cells are too few"):
        gene_moments(y[:1])
    with pytest.raises(InputError, match="1 cells have no counts"):
        gene_moments(np.array([[1, 2], [0, 0], [3, 1]]))


@pytest.mark.parametrize("truth", [0.05, 0.3, 1.5])
def test_common_dispersion_on_planted_counts_and_against_likelihood(truth):
    y = negative_binomial(truth)
    found = common_dispersion(y)
    assert found == pytest.approx(truth, rel=0.12)

    size = y.sum(1) / np.median(y.sum(1))
    mu = np.outer(size, y.sum(0) / size.sum()).clip(1e-12)  # an independent route: likelihood of all counts at once

    def minus_log_likelihood(log_d):
        r = np.exp(-log_d)
        return -stats.nbinom.logpmf(y[:, :200], r, r / (r + mu[:, :200])).sum()

    likely = np.exp(optimize.minimize_scalar(minus_log_likelihood, bounds=(-5, 2), method="bounded").x)
    assert found == pytest.approx(likely, rel=0.15)


def test_poisson_limit():
    assert common_dispersion(negative_binomial(0.0)) < 0.01
    assert estimate_splat(negative_binomial(0.0)).bcv_common == pytest.approx(0.1, abs=0.003)
    assert prior_df(negative_binomial(0.0, n=80, n_genes=10)) == np.inf


def test_dispersion_of_next_to_nothing():
    assert common_dispersion(np.eye(3, dtype=int)) >= 0
    assert np.isfinite(common_dispersion(np.array([[1, 0], [1, 0], [0, 1], [0, 1], [40, 0]])))
    assert trend_bcv(np.ones((5, 3), dtype=int)) == 0


@pytest.mark.parametrize("df", [6.0, 20.0])
def test_scatter_and_trend_are_recovered(df):
    params = SplatParameters(1500, mean_shape=0.8, outlier_prob=0.0, library_loc=9.0, library_scale=0.3, bcv_common=0.3, bcv_df=df)
    moments = gene_moments(simulate_splat(params, 1000, rng(5)))
    assert prior_df(moments) == pytest.approx(df, rel=0.4)
    assert trend_bcv(moments, df) == pytest.approx(0.3, abs=0.03)


def test_no_scatter_means_many_degrees_of_freedom():
    params = SplatParameters(800, outlier_prob=0.0, library_loc=9.0, bcv_df=np.inf, bcv_common=0.2)
    assert prior_df(simulate_splat(params, 800, rng())) > 60


def test_genes_of_one_mean_have_no_trend_to_remove():
    moments = splatter.GeneMoments(np.ones(30), np.linspace(2, 9, 30), np.full(30, 100.0), 1.0, 1.0, 500)
    assert 0.1 < prior_df(moments) < 100


@pytest.mark.parametrize("value", [1e-3, 0.5, 20.0])
def test_trigamma_inverse(value):
    from scipy.special import polygamma

    assert polygamma(1, splatter._trigamma_inverse(value)) == pytest.approx(value, rel=1e-6)


def test_library_kind_is_found():
    kind, loc, scale = fit_libraries(rng(1).lognormal(7.0, 0.5, 8000))
    assert kind == "lognormal" and (loc, scale) == pytest.approx((7.0, 0.5), abs=0.03)
    kind, loc, scale = fit_libraries(rng(1).normal(1000.0, 50.0, 400))
    assert kind == "normal" and (loc, scale) == pytest.approx((1000, 50), rel=0.1)
    assert fit_libraries([7.0] * 9) == ("lognormal", pytest.approx(np.log(7)), pytest.approx(0, abs=1e-12))


def test_outliers_and_dropout_curve():
    means = np.concatenate([np.exp(rng().normal(0, 0.5, 950)), np.exp(rng(1).normal(4, 0.2, 50))])
    prob, loc, scale = splatter._fit_outliers(means)
    assert prob == pytest.approx(0.05, abs=0.03) and loc > 2.5
    assert splatter._fit_outliers(np.ones(5)) == (0, 0, 0)
    x = np.linspace(-3, 3, 100)
    assert splatter._fit_dropout(np.exp(x), 1 / (1 + np.exp(1.7 * (x - 0.4)))) == pytest.approx((0.4, -1.7), abs=1e-4)


# ------------------------------------------------------------------ estimation of what was simulated


def test_the_simulator_finds_its_own_parameters():
    truth = SplatParameters(
        2000, mean_shape=0.7, mean_rate=0.7 * 2000 / np.exp(9), outlier_prob=0.0, library_loc=9.0, library_scale=0.3, bcv_common=0.25, bcv_df=30.0
    )
    y = simulate_splat(truth, 1200, rng(1))
    own = estimate_splat(y, bcv="trend", winsorize=0.0)
    assert (own.mean_shape, own.mean_rate) == pytest.approx((truth.mean_shape, truth.mean_rate), rel=0.1)
    assert own.library_kind == "lognormal" and own.library_loc == pytest.approx(9.0, abs=0.05)
    assert own.library_scale == pytest.approx(0.3, rel=0.08) and own.bcv_common == pytest.approx(0.25, rel=0.1)
    assert own.bcv_df == pytest.approx(30, rel=0.5) and own.outlier_prob < 0.01
    published = estimate_splat(y)
    assert published.bcv_common == pytest.approx(0.1 + 0.25 * common_dispersion(y)) and 0.2 < published.bcv_common < 0.35
    assert published.mean_shape == pytest.approx(0.7, rel=0.15)


def test_outliers_survive_the_round_trip():
    truth = SplatParameters(2000, mean_shape=3.0, mean_rate=1.0, outlier_prob=0.06, outlier_loc=4.0, outlier_scale=0.4, library_loc=9.0)
    found = estimate_splat(simulate_splat(truth, 300, rng(2)))
    assert found.outlier_prob == pytest.approx(0.06, abs=0.025) and found.outlier_loc == pytest.approx(4.0, abs=0.5)


def test_genes_of_a_single_cell_do_not_shape_the_means():
    rng = np.random.default_rng(0)
    counts = rng.poisson(rng.gamma(2.0, 2.0, 200) + 0.5, (60, 200))
    rare = np.zeros((60, 100), int)
    rare[rng.integers(60, size=100), np.arange(100)] = 1
    plain, more = (splatter.estimate_splat(c) for c in (counts, np.hstack([counts, rare])))
    for name in ("mean_shape", "mean_rate"):
        assert getattr(more, name) == pytest.approx(getattr(plain, name), rel=0.05), name
    assert splatter.estimate_splat(np.eye(60, 200, dtype=int) + np.eye(60, 200, k=60, dtype=int)).n_genes == 200


def test_estimation_refuses_what_it_cannot_use():
    y = negative_binomial(0.2, n=20, n_genes=30)
    for options, message in (
        ({"bcv": "edger"}, "unknown bcv 'edger'; known: published, trend"),
        ({"winsorize": 0.5}, "winsorize is 0.5"),
    ):
        with pytest.raises(InputError, match=message):
            estimate_splat(y, **options)
        with pytest.raises(InputError, match=message):
            SplatterBaseline(**options)
    with pytest.raises(InputError, match="4 cells are too few for Splat: give at least 5"):
        estimate_splat(y[:4])
    with pytest.raises(InputError, match="unknown dropout 'all'"):
        SplatterBaseline(dropout="all")


# ------------------------------------------------------------------ the baselines


@pytest.mark.parametrize("kind", BOTH)
def test_fit_and_sample(kind, cells):
    baseline = kind(seed=3).fit(cells, "cell_type")
    drawn = baseline.sample(700)
    assert drawn.shape == (700, cells.n_vars) and list(drawn.var_names) == list(cells.var_names)
    assert drawn.uns["scld"] == {"scale": "counts", "method": kind.name}
    assert (drawn.X.data == np.rint(drawn.X.data)).all() and (drawn.X.data > 0).all() and (drawn.X.sum(axis=1) > 0).all()
    assert (baseline.sample(700).X != drawn.X).nnz == 0
    assert (kind(seed=3).fit(cells, "cell_type").sample(700).X != drawn.X).nnz == 0
    assert (baseline.sample(700, seed=4).X != drawn.X).nnz > 0
    if kind is SplatterBaseline:  # whose genes are drawn from the seed of the object
        assert (kind(seed=5).fit(cells, "cell_type").sample(700, seed=3).X != drawn.X).nnz > 0
    one = baseline.sample(9, label="NK")
    assert one.n_obs == 9 and set(one.obs["cell_type"]) == {"NK"}
    assert set(baseline.parameters) == {None, "B", "NK", "T"}
    assert baseline.settings() == {
        "method": kind.name, "seed": 3, "steps": None, "budget_s": None, "bcv": "published", "dropout": "none", "winsorize": 0.1,
    }  # fmt: skip


@pytest.mark.parametrize("kind", BOTH)
def test_two_draws_are_of_the_same_genes(kind, cells):
    baseline = kind().fit(cells, "cell_type")
    a, b = (np.asarray(baseline.sample(1500, label="B", seed=s).X.mean(axis=0)).ravel() for s in (1, 2))
    assert np.corrcoef(a, b)[0, 1] > 0.98


def test_matched_keeps_gene_means_and_libraries_and_faithful_does_not(cells):
    nk = cells[cells.obs["cell_type"] == "NK"]
    real = np.asarray(nk.X.mean(axis=0)).ravel()
    matched = SplatterMatchedBaseline().fit(cells, "cell_type").sample(4000, label="NK")
    seen = np.asarray(matched.X.mean(axis=0)).ravel()
    assert np.corrcoef(seen, real)[0, 1] > 0.98
    libraries = SplatterMatchedBaseline().fit(cells, "cell_type")._libraries_of("NK", 4000, rng())
    assert set(libraries) <= set(np.asarray(nk.X.sum(axis=1)).ravel())
    faithful = SplatterBaseline().fit(cells, "cell_type").sample(4000, label="NK")
    own = np.asarray(faithful.X.mean(axis=0)).ravel()
    assert abs(np.corrcoef(own, real)[0, 1]) < 0.5
    totals = [np.asarray(x.sum(axis=1)).ravel() for x in (nk.X, faithful.X)]
    assert np.median(totals[1]) == pytest.approx(np.median(totals[0]), rel=0.15)


def test_mixture_has_the_proportions_of_training(cells):
    baseline = SplatterMatchedBaseline().fit(cells, "cell_type")
    baseline._genes = {  # every label now marks its cells with a gene of its own
        label: SplatGenes(np.eye(cells.n_vars)[i], np.zeros(cells.n_vars)) for i, label in enumerate([None, "B", "NK", "T"])
    }
    owner = baseline.sample(6000).X.toarray().argmax(axis=1)
    assert np.allclose(np.bincount(owner, minlength=4) / 6000, [0, 0.6, 0.3, 0.1], atol=0.025)
    assert not (np.diff(owner) >= 0).all()  # and in no order


@pytest.mark.parametrize("kind", BOTH)
def test_small_class(kind):
    few = planted_cells(n=100, shares=(0.62, 0.35, 0.03))
    baseline = kind().fit(few, "cell_type")
    with pytest.raises(InputError, match=f"label 'T' has 3 training cells, {kind.name} needs 5") as error:
        baseline.sample(4, label="T")
    assert "\n" not in str(error.value)
    assert baseline.sample(300).n_obs == 300 and baseline.sample(4, label="NK").n_obs == 4
    all_small = ad.AnnData(few.X[:12], obs=pd.DataFrame({"k": list("abcdefabcdef")}, index=few.obs_names[:12]))
    assert kind().fit(all_small, "k").sample(20).n_obs == 20


@pytest.mark.parametrize("kind", BOTH)
def test_without_labels_and_with_too_few_cells(kind, cells):
    assert kind().fit(cells).sample(3).n_obs == 3
    with pytest.raises(InputError, match="unknown label 'B'"):
        kind().fit(cells).sample(3, label="B")
    with pytest.raises(InputError, match=f"{kind.name} needs at least 5 cells, there are 4"):
        kind().fit(cells[:4].copy())


def test_memory_is_asked_for(cells, monkeypatch):
    monkeypatch.setattr("scld_nb.baselines.base.free_memory", lambda: 1000)
    with pytest.raises(InputError, match="use fewer genes"):
        SplatterBaseline().fit(cells)


def test_dropout_adds_zeros(cells):
    plain, dropped = (SplatterMatchedBaseline(dropout=d).fit(cells).sample(500) for d in ("none", "experiment"))
    assert dropped.X.nnz < 0.9 * plain.X.nnz


@settings(max_examples=25, deadline=None)
@given(
    st.integers(5, 30), st.integers(1, 25), st.integers(0, 2**32), st.floats(0.02, 30.0), st.sampled_from(BOTH),
    st.sampled_from(["published", "trend"]), st.sampled_from(["none", "experiment"]),
)  # fmt: skip
def test_any_counts_give_counts(n, n_genes, seed, level, kind, bcv, dropout):
    y = rng(seed).poisson(rng(seed).gamma(0.5, level, (n, n_genes)))
    y[:, 0] += y.sum(axis=1) == 0
    labels = pd.DataFrame({"k": rng(seed).choice(list("ab"), n)}, index=[f"c{i}" for i in range(n)])
    drawn = kind(bcv=bcv, dropout=dropout, seed=seed).fit(ad.AnnData(sp.csr_matrix(y), obs=labels), "k").sample(17).X
    assert drawn.shape == (17, n_genes) and np.isfinite(drawn.data).all() and (drawn.data >= 0).all()
    assert (drawn.data == np.rint(drawn.data)).all() and (drawn.sum(axis=1) > 0).all()


# ------------------------------------------------------------------ real cells


@pytest.fixture(scope="module")
def blood():
    """Training and test cells of the embedded set."""
    train, test = default_split(load("pbmc68k_reduced"))
    return train, test


def test_matched_is_better_than_random_on_real_cells(blood):
    train, test = blood
    own, other = (k().fit(train, "louvain").sample(test.n_obs) for k in (SplatterMatchedBaseline, RandomBaseline))
    for space in ("counts20k", "log1p"):
        real = expression(test, space)
        auc = [rf_auc(real, expression(fake, space), n_trees=40, folds=3).auc for fake in (own, other)]
        assert auc[0] < auc[1] - 0.015, space
    real = expression(test, "counts20k")
    distance = [mmd(real, expression(fake, "counts20k"), bandwidth=mmd_bandwidth(real)).biased for fake in (own, other)]
    assert distance[0] < distance[1] - 0.05


def test_faithful_splat_is_better_where_genes_need_no_names(blood):
    """Share of variance in the first 5 components: cell types leave a mark there that shuffled genes lack."""
    train, test = blood

    def leading(adata):
        x = expression(adata, "log1p").toarray()
        spectrum = np.linalg.svd(x - x.mean(axis=0), compute_uv=False) ** 2
        return spectrum[:5].sum() / spectrum.sum()

    splat, shuffled = (leading(k().fit(train, "louvain").sample(test.n_obs)) for k in (SplatterBaseline, RandomBaseline))
    assert abs(splat - leading(test)) < abs(shuffled - leading(test)) - 0.02
