"""The stricter measures, against libraries, closed forms and brute force."""

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ks_2samp
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, roc_auc_score
from sklearn.model_selection import StratifiedKFold

from scld_nb import neighbours, suite
from scld_nb.data import InputError, library_normalize
from scld_nb.metrics import auc_null_sd, rf_auc
from scld_nb.suite import (
    cell_statistics,
    combined_auc,
    gene_correlation,
    gene_statistics,
    ilisi,
    joint_components,
    ks_statistics,
    marker_logfc,
    mean_correlation,
    membership_auc,
    memorisation,
    precision_recall,
    strict_aucs,
    tstr,
    variable_genes,
    wasserstein,
)


def clouds(n=150, d=6, shift=0.0, seed=0):
    a, b = np.random.default_rng(seed).normal(size=(2, n, d))
    return a, b + shift


def counts(n, genes=40, seed=0):
    """Gamma-Poisson counts of three types, and the types."""
    rng, profiles = np.random.default_rng(seed), np.random.default_rng(9).gamma(0.6, 2.0, (3, genes)) + 0.1
    types = rng.integers(3, size=n)
    x = rng.poisson(rng.gamma(3, profiles[types] / 3) * rng.gamma(5, 0.2, (n, 1))).astype(np.float32)
    x[:, 0] += 1
    return sp.csr_matrix(x), np.array(["a", "b", "c"])[types]


# ---- judges


def test_variable_genes_are_those_of_largest_variance():
    x = np.random.default_rng(0).normal(size=(30, 12)) * np.arange(12)[::-1]
    wanted = np.sort(np.argsort(-x.var(axis=0))[:5])
    assert list(variable_genes(x, 5)) == list(wanted) == list(variable_genes(sp.csr_matrix(x), 5))
    assert list(variable_genes(x, 99)) == list(range(12))
    with pytest.raises(InputError, match="at least one gene"):
        variable_genes(x, 0)


def test_strict_forest_is_the_forest_of_metrics_without_components():
    a, b = clouds(60, shift=0.4)
    found = strict_aucs(a, b, n_trees=25, seed=3)
    direct = rf_auc(a.astype(np.float32), b.astype(np.float32), n_pcs=None, n_trees=25, seed=3)
    assert found["forest"].fold_aucs == pytest.approx(direct.fold_aucs) and found["forest"].n == 60
    assert found["boosting"].auc == pytest.approx(np.mean(found["boosting"].fold_aucs))


def test_judges_find_a_difference_and_nothing_where_there_is_none():
    same, apart = clouds(200), clouds(200, shift=1.0)
    for judge in (lambda a, b: strict_aucs(a, b, n_trees=50)["boosting"], lambda a, b: combined_auc(np.exp(a), np.exp(b))):
        assert judge(*apart).auc > 0.9 and judge(*same).distance < 4 * auc_null_sd(200)


def test_judges_do_not_depend_on_cores_or_storage():
    a, b = clouds(50, shift=0.3)
    x, y = np.maximum(a, 0), np.maximum(b, 0)
    one, two = strict_aucs(x, y, n_trees=10), strict_aucs(sp.csr_matrix(x), y, n_trees=10, n_jobs=2)
    assert one == two
    assert combined_auc(x, y) == combined_auc(x, sp.csr_matrix(y), n_jobs=2)


def test_twins_share_a_fold():
    a, _ = clouds(60)
    apart, together = strict_aucs(a, a, n_trees=20), strict_aucs(a, a, n_trees=20, paired=True)
    assert apart["forest"].auc < 0.3 and together["forest"].auc == pytest.approx(0.5, abs=0.05)
    assert combined_auc(np.exp(a), np.exp(a), paired=True).auc == pytest.approx(0.5, abs=1e-6)


def test_combined_judge_sees_the_library_size():
    x, _ = counts(150, seed=1)
    y, _ = counts(150, seed=2)
    halved = sp.csr_matrix(np.random.default_rng(0).binomial(y.toarray().astype(int), 0.4).astype(np.float32))
    assert combined_auc(x, halved).auc > 0.8 > 0.65 > combined_auc(x, y).auc


def test_constant_cells_are_a_coin_toss():
    assert combined_auc(np.ones((20, 4)), np.ones((20, 4))).auc == 0.5


@pytest.mark.parametrize("judge", [strict_aucs, combined_auc])
def test_judges_refuse(judge):
    a, b = clouds(20)
    for wrong, message in (((a, b[:9]), "same n"), ((a, b[:, :3]), "gene order"), ((a[:3], b[:3]), "at least 5")):
        with pytest.raises(InputError, match=message):
            judge(*wrong)
    with pytest.raises(InputError, match="at least 2"):
        judge(a, b, folds=1)


# ---- shape


def test_joint_components_are_those_of_both_together():
    a, b = clouds(40, d=9)
    x, y = joint_components(a, b, n_pcs=4)
    both = np.vstack([a, b])
    values = np.linalg.svd(both - both.mean(axis=0), compute_uv=False)[:4]
    assert np.allclose(np.linalg.norm(np.vstack([x, y]), axis=0), values, rtol=1e-5)
    sparse = joint_components(sp.csr_matrix(a), sp.csr_matrix(b), n_pcs=4)
    assert np.allclose(np.abs(sparse[0]), np.abs(x), atol=1e-5)


@pytest.mark.parametrize("k, shift", [(1, 0.0), (5, 0.7), (20, 2.0)])
def test_precision_recall_equals_the_library(k, shift):
    library = pytest.importorskip("prdc")
    a, b = clouds(120, shift=shift)
    wanted = library.compute_prdc(a, b, nearest_k=k)
    assert precision_recall(a, b, k=k) == pytest.approx({name: float(v) for name, v in wanted.items()})


def test_blocks_do_not_change_the_result(monkeypatch):
    a, b = clouds(130, shift=0.5)
    whole = precision_recall(a, b), suite._nearest(a, b, 3), suite._nearest(a, a, 3, own=True)
    monkeypatch.setattr(neighbours, "_blocks", lambda n, size=1024: (slice(i, min(n, i + 17)) for i in range(0, n, 17)))
    blocks = precision_recall(a, b), suite._nearest(a, b, 3), suite._nearest(a, a, 3, own=True)
    assert whole[0] == blocks[0] and all(np.allclose(u, v) for u, v in zip(whole[1:], blocks[1:]))


def test_no_block_is_larger_than_1024(monkeypatch):
    sizes, direct = [], neighbours._square_distances
    monkeypatch.setattr(neighbours, "_square_distances", lambda a, b: (sizes.append((len(a), len(b))), direct(a, b))[1])
    precision_recall(*clouds(1500, d=2))
    assert max(map(max, sizes)) <= 1024


@given(seed=st.integers(0, 1000), k=st.integers(1, 8), d=st.integers(1, 5))
@settings(max_examples=25, deadline=None)
def test_precision_and_recall_change_places(seed, k, d):
    a, b = clouds(30, d=d, shift=0.5, seed=seed)
    one, two = precision_recall(a, b, k=k), precision_recall(b, a, k=k)
    assert one["precision"] == two["recall"] and one["recall"] == two["precision"]
    assert all(0 <= one[m] <= 1 for m in ("precision", "recall", "coverage")) and 0 <= one["density"] <= 30 / k
    same = precision_recall(a, a, k=k)
    assert same["precision"] == same["recall"] == same["coverage"] == 1


def test_precision_recall_refuses_too_many_neighbours():
    with pytest.raises(InputError, match="from 1 to 9"):
        precision_recall(*clouds(10), k=10)


@pytest.mark.parametrize("shift", [0.0, 1.5])
def test_wasserstein_equals_the_library(shift):
    ot = pytest.importorskip("ot")
    a, b = clouds(80, shift=shift)
    found, mass = wasserstein(a, b), np.full(80, 1 / 80)
    assert found["wasserstein1"] == pytest.approx(ot.emd2(mass, mass, ot.dist(a, b, "euclidean")), rel=1e-6)
    assert found["wasserstein2"] == pytest.approx(np.sqrt(ot.emd2(mass, mass, ot.dist(a, b))), rel=1e-6)
    assert wasserstein(a, b, solver="pot") == pytest.approx(found, rel=1e-6) and found["n"] == 80


@given(seed=st.integers(0, 1000), d=st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_wasserstein_is_a_distance(seed, d):
    a, b = clouds(25, d=d, shift=1.0, seed=seed)
    c = np.random.default_rng(seed + 1).normal(size=(25, d))
    w = {k: wasserstein(x, y) for k, (x, y) in {"ab": (a, b), "ba": (b, a), "ac": (a, c), "cb": (c, b), "aa": (a, a)}.items()}
    for order in ("wasserstein1", "wasserstein2"):
        assert w["ab"][order] == pytest.approx(w["ba"][order]) and w["aa"][order] == pytest.approx(0, abs=1e-6)
        assert w["ab"][order] <= w["ac"][order] + w["cb"][order] + 1e-9
    assert w["ab"]["wasserstein1"] <= w["ab"]["wasserstein2"] + 1e-9


def test_wasserstein_in_one_dimension_pairs_sorted_values():
    a, b = clouds(200, d=1, shift=0.3)
    wanted = np.sort(a[:, 0]) - np.sort(b[:, 0])
    found = wasserstein(a, b)
    assert found["wasserstein1"] == pytest.approx(np.abs(wanted).mean())
    assert found["wasserstein2"] == pytest.approx(np.sqrt((wanted**2).mean()))


def test_wasserstein_subsamples_and_says_so():
    a, b = clouds(60)
    found = wasserstein(a, b + 10, n_max=20, seed=1)
    assert found["n"] == 20 and found["wasserstein1"] == pytest.approx(10 * np.sqrt(6), rel=0.1)
    assert found == wasserstein(a, b + 10, n_max=20, seed=1)


def test_wasserstein_refuses(monkeypatch):
    for options, message in (({"solver": "sinkhorn"}, "'scipy' or 'pot'"), ({"n_max": 1}, "at least 2 cells")):
        with pytest.raises(InputError, match=message):
            wasserstein(*clouds(10), **options)
    monkeypatch.setitem(__import__("sys").modules, "ot", None)
    with pytest.raises(InputError, match="pip install"):
        wasserstein(*clouds(10), solver="pot")


def test_ilisi_equals_brute_force():
    a, b = clouds(70, d=3, shift=0.4)
    points, is_real = np.vstack([a, b]), np.repeat([1, 0], 70)
    values = []
    for i, point in enumerate(points):
        d2 = np.delete(((points - point) ** 2).sum(axis=1), i)
        near = np.argsort(d2)[:45]
        low, high = 1e-9, 1e6
        for _ in range(200):  # bisection in the log of the precision
            beta = np.sqrt(low * high)
            w = np.exp(-beta * (d2[near] - d2[near].min()))
            p = w / w.sum()
            entropy = -(p[p > 0] * np.log(p[p > 0])).sum()
            low, high = (beta, high) if entropy > np.log(15) else (low, beta)
        share = p[np.delete(is_real, i)[near] == 1].sum()
        values.append(1 / (share**2 + (1 - share) ** 2))
    found = ilisi(a, b, perplexity=15, n_neighbors=45)
    assert found["lisi"] == pytest.approx(np.mean(values), abs=1e-4) and found["ilisi"] == pytest.approx(found["lisi"] - 1)


@given(seed=st.integers(0, 1000), shift=st.floats(0, 5))
@settings(max_examples=20, deadline=None)
def test_ilisi_is_symmetric_and_bounded(seed, shift):
    a, b = clouds(40, d=2, shift=shift, seed=seed)
    found = ilisi(a, b)
    assert 0 <= found["ilisi"] <= 1 and found["lisi"] == pytest.approx(ilisi(b, a)["lisi"], abs=1e-6)


def test_ilisi_at_its_ends():
    assert ilisi(*clouds(100, shift=100.0))["ilisi"] == pytest.approx(0, abs=1e-9)
    assert ilisi(*clouds(500))["ilisi"] > 0.85
    assert ilisi(np.zeros((20, 2)), np.zeros((20, 2)))["ilisi"] > 0.8  # ties: no division by zero
    with pytest.raises(InputError, match="at least 1"):
        ilisi(*clouds(20), perplexity=0)


# ---- genes and cells


def test_statistics_are_those_of_numpy():
    x, _ = counts(50)
    dense = x.toarray().astype(float)
    dense[:, 5] = 0
    x = sp.csr_matrix(dense)
    for form in (x, dense):
        genes, cells = gene_statistics(form), cell_statistics(form)
        assert np.allclose(genes["mean"], dense.mean(axis=0)) and np.allclose(genes["variance"], dense.var(axis=0, ddof=1))
        assert np.allclose(genes["zeros"], (dense == 0).mean(axis=0)) and genes["cv"][5] == 0
        assert np.allclose(genes["cv"][:5], dense.std(axis=0, ddof=1)[:5] / dense.mean(axis=0)[:5])
        assert np.allclose(cells["library"], dense.sum(axis=1)) and np.allclose(cells["detected"], (dense > 0).sum(axis=1))
    with pytest.raises(InputError, match="at least 2"):
        gene_statistics(x[:1])


def test_ks_equals_scipy_and_the_definition():
    a, b = (pd.DataFrame(m, columns=["u", "v"]) for m in clouds(60, d=2, shift=0.5))
    found, grid = ks_statistics(a, b), np.sort(np.r_[a["u"], b["u"]])
    direct = max(abs((a["u"].to_numpy() <= t).mean() - (b["u"].to_numpy() <= t).mean()) for t in grid)
    assert found["u"] == pytest.approx(direct) and found["v"] == pytest.approx(ks_2samp(a["v"], b["v"]).statistic)
    assert ks_statistics(a, a) == {"u": 0, "v": 0} and ks_statistics(a, a + 100) == {"u": 1, "v": 1}
    with pytest.raises(InputError, match="one kind"):
        ks_statistics(a, b[["u"]])


def test_gene_correlation_equals_numpy():
    a, b = clouds(80, d=7)
    b[:, 1] += b[:, 0]
    upper = np.triu_indices(4, k=1)
    u, v = (np.corrcoef(x[:, [0, 1, 2, 5]].T)[upper] for x in (a, b))
    found = gene_correlation(a, sp.csr_matrix(b), genes=[0, 1, 2, 5])
    assert found["gene_correlation"] == pytest.approx(np.corrcoef(u, v)[0, 1], abs=1e-5)
    assert found["gene_correlation_gap"] == pytest.approx(np.abs(u - v).mean(), abs=1e-5)
    assert gene_correlation(a, a) == {"gene_correlation": pytest.approx(1), "gene_correlation_gap": 0}
    with pytest.raises(InputError, match="at least 3"):
        gene_correlation(a, b, genes=[1, 2])


def test_genes_that_never_vary_do_not_break_correlations():
    a, b = clouds(30, d=4)
    b[:] = 1.0
    found = gene_correlation(a, b)
    assert found["gene_correlation"] == 0 and np.isfinite(found["gene_correlation_gap"])
    assert mean_correlation(a, b) == {"mean_pearson": 0, "mean_spearman": 0}


def test_mean_correlation():
    a, b = clouds(30, d=9)
    a, b = a + np.arange(9), b + np.arange(9)
    assert mean_correlation(a, b)["mean_pearson"] == pytest.approx(np.corrcoef(a.mean(axis=0), b.mean(axis=0))[0, 1])
    assert mean_correlation(a, np.exp(a.mean(axis=0)) * np.ones((30, 1)))["mean_spearman"] == pytest.approx(1)


# ---- labels


@pytest.fixture(scope="module")
def labelled():
    groups = {name: counts(n, seed=i) for i, (name, n) in enumerate((("train", 240), ("real", 120), ("fake", 120)))}
    return {k: (library_normalize(x), y) for k, (x, y) in groups.items()}


def test_fold_changes_are_means_compared(labelled):
    x, y = labelled["real"]
    dense = x.toarray()
    wanted = np.log2((1 + dense[y == "b"].mean(axis=0)) / (1 + dense[y != "b"].mean(axis=0)))
    for form in (x, dense):
        assert np.allclose(suite._fold_changes(form, y, ["a", "b"])[1], wanted, atol=1e-5)


def test_markers(labelled):
    (t, ty), (r, ry), (f, fy) = (labelled[k] for k in ("train", "real", "fake"))
    good = marker_logfc(r, ry, f, fy, t, ty, n_markers=8)
    assert set(good["marker_pearson"]) == {"all", "a", "b", "c"} and good["marker_pearson"]["all"] > 0.8
    same = marker_logfc(r, ry, r, ry, t, ty, n_markers=8)
    assert all(v == pytest.approx(1) for part in same.values() for v in part.values())
    mixed = marker_logfc(r, ry, f, np.random.default_rng(0).permutation(fy), t, ty, n_markers=8)
    assert mixed["marker_pearson"]["all"] < 0.5 and mixed["marker_jaccard"]["all"] < good["marker_jaccard"]["all"]
    assert marker_logfc(r, ry, f, fy, t, ty, min_cells=1000) == {"marker_pearson": {}, "marker_jaccard": {}}
    with pytest.raises(InputError, match="one label per cell"):
        marker_logfc(r, ry[:5], f, fy, t, ty)
    with pytest.raises(InputError, match="differ in genes"):
        marker_logfc(r, ry, f[:, 1:], fy, t, ty)


def test_train_on_synthetic_test_on_real(labelled):
    (t, ty), (r, ry), (f, fy) = ((x.log1p(), y) for x, y in (labelled[k] for k in ("train", "real", "fake")))
    found = tstr(f, fy, t, ty, r, ry)
    assert set(found["tstr"]) == {"all", "a", "b", "c"} and found["n"]["all"] <= 120
    assert abs(found["tstr"]["all"] - found["trtr"]["all"]) < 0.15 and found["tstr"]["all"] > 0.7
    assert found["tstr"]["all"] == pytest.approx(np.mean([found["tstr"][k] for k in "abc"]))
    wrong = tstr(f, np.random.default_rng(0).permutation(fy), t, ty, r, ry)
    assert wrong["tstr"]["all"] < 0.6 and wrong["trtr"]["all"] > 0.7
    same = tstr(t, ty, t, ty, r, ry)  # both classifiers learn from the same cells
    assert same["tstr"] == same["trtr"]
    assert tstr(f, ["a"] * 120, t, ty, r, ry)["tstr"] == {}
    some = np.asarray(fy) != "c"
    missing = tstr(f[some], np.asarray(fy)[some], t, ty, r, ry)
    assert missing["tstr"]["c"] == 0 and missing["trtr"]["c"] > 0.6 and missing["tstr"]["all"] < 0.7 < missing["trtr"]["all"]
    with pytest.raises(InputError, match="differ in genes"):
        tstr(f, fy, t[:, 1:], ty, r, ry)


def test_tstr_equals_a_classifier_by_hand(labelled):
    (t, ty), (r, ry) = ((x.log1p().toarray(), y) for x, y in (labelled[k] for k in ("train", "real")))
    found = tstr(t, ty, t, ty, r, ry, n_pcs=10)
    mean, axes = t.mean(axis=0), np.linalg.svd(t - t.mean(axis=0), full_matrices=False)[2][:10].T
    guess = LogisticRegression(max_iter=2000).fit((t - mean) @ axes, ty).predict((r - mean) @ axes)
    assert found["tstr"]["all"] == pytest.approx(f1_score(ry, guess, average="macro"), abs=0.02)


# ---- copies


def test_copies_and_strangers():
    x, _ = counts(300, seed=4)
    x = library_normalize(x).log1p().tocsr()
    train, heldout, fresh = x[:100], x[100:200], x[200:]
    honest, copies, reverse = memorisation(fresh, train, heldout), memorisation(train, train, heldout), memorisation(heldout, train, heldout)
    assert abs(honest.share - 0.5) < 0.2 and abs(honest.membership_auc - 0.5) < 0.15
    assert copies.share == 1 and np.allclose(copies.to_train, 0, atol=1e-4) and copies.membership_auc > 0.99 and copies.nndr < 0.01
    assert reverse.share == 0 and reverse.membership_auc < 0.01 and (honest.n, honest.n_reference) == (100, 100)


def test_ties_count_one_half():
    x, _ = counts(60, seed=5)
    x = library_normalize(x).log1p().tocsr()
    found = memorisation(x[30:], x[:30], x[:30])
    assert found.share == 0.5 and found.membership_auc == pytest.approx(0.5)
    assert memorisation(x[:30], x[:30], x[:30]).nndr_heldout < 0.01


@given(seed=st.integers(0, 200))
@settings(max_examples=15, deadline=None)
def test_training_and_heldout_cells_change_places(seed):
    x = np.random.default_rng(seed).normal(size=(90, 5))
    one, two = memorisation(x[:30], x[30:60], x[60:]), memorisation(x[:30], x[60:], x[30:60])
    assert one.share == pytest.approx(1 - two.share) and one.membership_auc == pytest.approx(1 - two.membership_auc)
    assert 0 <= one.share <= 1 and 0 <= one.nndr <= 1


def test_independent_cells_are_a_half_on_average():
    shares = []
    for seed in range(30):
        x = np.random.default_rng(seed).normal(size=(450, 60))
        shares.append(memorisation(x[:50], x[50:400], x[400:], n_pcs=20, seed=seed).share)  # far more training cells
    assert np.mean(shares) == pytest.approx(0.5, abs=4 * np.std(shares) / np.sqrt(30))


def test_distances_are_the_nearest_ones():
    x = np.random.default_rng(0).normal(size=(75, 4))
    found = memorisation(x[:15], x[15:45], x[45:], n_pcs=4)  # 4 components of 4 genes: a rotation
    direct = np.sort(np.linalg.norm(x[:15, None] - x[None, 15:45], axis=2), axis=1)
    assert np.allclose(found.to_train, direct[:, 0]) and found.nndr == pytest.approx(np.median(direct[:, 0] / direct[:, 1]))


def test_membership_score():
    rng = np.random.default_rng(0)
    members, others, fake, reference = rng.normal(size=(4, 80, 3))
    fake[:40] = members[:40] + 0.01
    near = lambda a, b: np.linalg.norm(a[:, None] - b[None], axis=2).min(axis=1)  # noqa: E731
    real, truth = np.vstack([members, others]), np.repeat([1, 0], 80)
    assert membership_auc(members, others, fake) == pytest.approx(roc_auc_score(truth, np.exp(-near(real, fake))))
    corrected = membership_auc(members, others, fake, reference=reference)
    assert corrected == pytest.approx(roc_auc_score(truth, near(real, reference) / near(real, fake))) and corrected > 0.7
    with pytest.raises(InputError, match="one dimension"):
        membership_auc(members, others, fake[:, :2])


def test_memorisation_refuses():
    x = np.zeros((10, 3))
    with pytest.raises(InputError, match="differ in genes"):
        memorisation(x[:, :2], x, x)
    with pytest.raises(InputError, match="heldout has 1 cells"):
        memorisation(x, x, x[:1])


def test_folds_are_those_of_the_paper_forest():
    for fit, held in suite._folds(20, 4, 7, False):
        assert len(fit) == 30 and len(held) == 10
    wanted = [tuple(map(tuple, p)) for p in StratifiedKFold(4, shuffle=True, random_state=7).split(np.zeros(40), np.repeat([1, 0], 20))]
    assert [tuple(map(tuple, p)) for p in suite._folds(20, 4, 7, False)] == wanted


# ---- choices of cells, genes and labels


def test_genes_with_a_high_mean_are_not_the_variable_ones():
    x = np.random.default_rng(0).normal(size=(40, 6)) * [1, 2, 3, 1, 1, 1] + [50, 0, 0, 0, 0, 90]
    assert list(variable_genes(x, 2)) == [1, 2] == list(variable_genes(sp.csr_matrix(x), 2))


def test_combined_judge_sees_library_sizes_alone():
    """Twice the counts: the same composition, and every gene detected."""
    x, y = np.random.default_rng(0).poisson(200, size=(2, 40, 8))
    assert combined_auc(x, 2 * y).auc > 0.95


def test_combined_judge_compares_compositions():
    """A share that differs by a fifth is lost among library sizes that differ a hundredfold, unless these are divided out."""
    rng = np.random.default_rng(0)
    sizes = np.exp(rng.uniform(0, np.log(100), (2, 100, 1)))
    x, y = rng.poisson(sizes * 3000 * np.array([[[1.0] * 6], [[1.2] + [1.0] * 5]]))
    assert combined_auc(x, y).auc > 0.95


def test_combined_judge_takes_negative_values_for_zeros():
    x, y = np.random.default_rng(0).poisson(1.0, size=(2, 40, 8)).astype(float)
    assert combined_auc(x, np.where(y == 0, -0.5, y)) == combined_auc(x, y)


def test_transport_draws_with_the_seed():
    a, b = clouds(60)
    assert wasserstein(a, b, n_max=20, seed=1) != wasserstein(a, b, n_max=20, seed=2)


def test_empty_questions_are_refused():
    with pytest.raises(InputError, match="n_neighbors 0"):
        ilisi(*clouds(20), n_neighbors=0)
    table = pd.DataFrame({"u": [1.0, 2.0]})
    for pair in ((table, table[:0]), (table[:0], table)):
        with pytest.raises(InputError, match="two filled tables"):
            ks_statistics(*pair)


def test_a_stored_zero_is_a_zero():
    x = sp.csr_matrix(np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
    x.data[2] = 0
    assert list(gene_statistics(x)["zeros"]) == [pytest.approx(1 / 3), 0] and list(cell_statistics(x)["detected"]) == [2, 1, 2]


def test_genes_that_vary_on_neither_side_are_alike():
    assert mean_correlation(np.ones((9, 4)), np.ones((9, 4))) == {"mean_pearson": 1, "mean_spearman": 1}


def test_labels_with_just_enough_cells_and_one_label_alone(labelled):
    (t, ty), (r, ry), (f, fy) = (labelled[k] for k in ("train", "real", "fake"))
    some = np.sort(np.concatenate([np.flatnonzero(fy == k)[:12] for k in "abc"]))
    assert set(marker_logfc(r, ry, f[some], fy[some], t, ty, min_cells=12)["marker_jaccard"]) == {"all", "a", "b", "c"}
    assert marker_logfc(r, ry, f[some], fy[some], t, ty, min_cells=13) == {"marker_pearson": {}, "marker_jaccard": {}}
    only = fy == "a"
    assert marker_logfc(r, ry, f[only], fy[only], t, ty) == {"marker_pearson": {}, "marker_jaccard": {}}


def test_test_cells_of_a_label_that_nobody_taught_do_not_count(labelled):
    (t, ty), (r, ry), (f, fy) = ((x.log1p(), y) for x, y in (labelled[k] for k in ("train", "real", "fake")))
    strange = np.where(np.arange(120) % 3, ry, "z")
    known = strange != "z"
    assert tstr(f, fy, t, ty, r, strange, n_pcs=5) == tstr(f, fy, t, ty, r[known], ry[known], n_pcs=5)


def test_cells_to_learn_from_are_drawn_with_the_seed():
    """Only some of many cells are learned from; which ones depends on the seed."""
    rng = np.random.default_rng(0)
    (f, t, r), y = rng.normal(size=(3, 120, 4)), np.repeat(["a", "b"], 60)
    few = np.r_[:15, 60:75]
    scores = {tstr(f, y, t[few], y[few], r, y, n_pcs=4, seed=seed)["tstr"]["all"] for seed in range(4)}
    assert len(scores) > 1


def test_more_heldout_than_training_cells_pull_nobody_away():
    x = np.random.default_rng(1).normal(size=(650, 20))
    found = memorisation(x[:200], x[200:250], x[250:])
    assert 0.35 < found.share < 0.65 and found.n_reference == 50


def test_reference_cells_are_drawn_and_not_the_first():
    """Training cells come sorted: the first half near, the second far; a prefix would send all far cells to the held-out side."""
    rng = np.random.default_rng(0)
    fake, train, heldout = (np.repeat([0.0, 30.0], n)[:, None] + rng.normal(size=(2 * n, 3)) for n in (40, 60, 30))
    assert memorisation(fake, train, heldout, n_pcs=3).share > 0.35


def test_of_honest_cells_one_in_twenty_is_called_copied():
    shares = []
    for seed in range(4):
        x = np.random.default_rng(seed).normal(size=(1200, 10))
        shares.append(memorisation(x[:400], x[400:800], x[800:], n_pcs=5, seed=seed).copied)
    assert np.mean(shares) == pytest.approx(0.05, abs=0.025)
