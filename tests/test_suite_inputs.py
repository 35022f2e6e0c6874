"""Choices inside the suite: training cells or test cells, drawn or first, scaled or not."""

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
from scipy.stats import pearsonr, spearmanr
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from scld_nb import controls, metrics, suite
from scld_nb.data import InputError
from scld_nb.metrics import label_classifier, tsne
from scld_nb.report import verdict


def three(seed, n=60, genes=12):
    rng = np.random.default_rng(seed)
    return rng.gamma(1.0, 2.0, (n, genes)), rng.choice(list("abc"), n)


def test_markers_are_chosen_on_the_training_cells():
    (r, ry), (f, fy), (t, ty) = (three(s) for s in (1, 2, 3))
    found = suite.marker_logfc(r, ry, f, fy, t, ty, n_markers=4)["marker_pearson"]
    change = {k: suite._fold_changes(x, y, list("abc")) for k, x, y in (("r", r, ry), ("f", f, fy), ("t", t, ty))}
    best = np.argsort(-change["t"], axis=1)[:, :4]
    for i, label in enumerate("abc"):
        assert found[label] == pytest.approx(pearsonr(change["r"][i, best[i]], change["f"][i, best[i]]).statistic)


def test_a_label_with_few_synthetic_cells_has_no_markers():
    (r, ry), (f, fy), (t, ty) = (three(s) for s in (1, 2, 3))
    few = np.r_[np.flatnonzero(fy != "c"), np.flatnonzero(fy == "c")[:9]]
    assert set(suite.marker_logfc(r, ry, f[few], fy[few], t, ty)["marker_pearson"]) == {"all", "a", "b"}


def test_transport_compares_cells_drawn_at_random_and_not_the_first():
    rng = np.random.default_rng(0)
    real = np.repeat([0.0, 10.0], 100)[:, None] + rng.normal(0, 0.1, (200, 1))
    assert suite.wasserstein(real, rng.permutation(real), n_max=100)["wasserstein1"] < 2


def test_perplexity_is_at_most_a_third_of_the_neighbours():
    a, b = np.random.default_rng(0).normal(size=(2, 20, 3))
    assert suite.ilisi(a, b) == suite.ilisi(a, b, perplexity=13) != suite.ilisi(a, b, perplexity=12)


def test_ratios_of_distances_do_not_depend_on_the_heldout_cells():
    rng = np.random.default_rng(0)
    fake, train, one, two = rng.normal(size=(4, 60, 30))
    two[:, 0] *= 9
    a, b = (suite.memorisation(fake, train, x, n_pcs=3) for x in (one, two))
    assert a.nndr == pytest.approx(b.nndr, abs=1e-9)


def test_the_regression_of_the_combined_judge_sees_standardised_columns(monkeypatch):
    class Mute:
        def __init__(self, **options): pass
        def fit(self, x, y): return self
        def decision_function(self, x): return np.zeros(len(x))

    monkeypatch.setattr(suite, "HistGradientBoostingClassifier", Mute)
    rng = np.random.default_rng(0)
    real, fake = rng.poisson(2.0, (60, 15)), rng.poisson(2.2, (60, 15))
    found, x, y = suite.combined_auc(real, fake), np.vstack([suite._everything(real), suite._everything(fake)]), np.repeat([1, 0], 60)
    areas = []
    for fit, held in suite._folds(60, 5, 0, False):
        mean, sd = x[fit].mean(0), x[fit].std(0)
        z = np.clip((x - mean) / np.where(sd > 1e-6, sd, np.inf), -5, 5)
        areas.append(roc_auc_score(y[held], LogisticRegression(C=1e-3, max_iter=300).fit(z[fit], y[fit]).decision_function(z[held])))
    assert np.allclose(found.fold_aucs, areas, atol=0.01)


def test_of_a_label_that_was_not_delivered_the_control_learns_its_share(monkeypatch):
    seen, original = [], suite.label_classifier
    monkeypatch.setattr(suite, "label_classifier", lambda x, y, **o: seen.append(np.asarray(y)) or original(x, y, **o))
    (f, fy), (t, ty), (r, ry) = three(1, 30), three(2, 120), three(3, 60)
    some = fy != "c"
    suite.tstr(f[some], fy[some], t, ty, r, ry, n_pcs=3)
    fakes, control = seen
    assert (control == "c").sum() == round(some.sum() * (ty == "c").sum() / 120) and not (fakes == "c").any()


def test_perplexity_and_components_are_those_asked_for():
    x, y = three(0, 80)
    assert not np.allclose(tsne([x], perplexity=5)[0], tsne([x], perplexity=20)[0])
    assert label_classifier(x, y, n_pcs=3)["pca"].n_components_ == 3


@pytest.mark.parametrize(("value", "control", "null_sd", "word"), [(0.60, 0.50, 0.04, "like real"), (0.57, 0.45, None, "close")])
def test_of_copying_measures_only_what_is_above_a_half_counts_and_chance_is_granted(value, control, null_sd, word):
    assert verdict({"metric": "membership_auc", "value": value, "control": control, "null_sd": null_sd}) == word


def test_lists_of_markers_are_real_against_synthetic_and_all_takes_every_marker():
    (r, ry), (f, fy), (t, ty) = (three(s) for s in (1, 2, 3))
    found = suite.marker_logfc(r, ry, f, fy, t, ty, n_markers=4)
    change = {k: suite._fold_changes(x, y, list("abc")) for k, x, y in (("r", r, ry), ("f", f, fy), ("t", t, ty))}
    best = {k: np.argsort(-c, axis=1)[:, :4] for k, c in change.items()}
    shared = {label: len(set(best["r"][i]) & set(best["f"][i])) for i, label in enumerate("abc")}
    assert {k: found["marker_jaccard"][k] for k in "abc"} == {k: s / (8 - s) for k, s in shared.items()}
    mine, theirs = (np.take_along_axis(change[k], best["t"], axis=1).ravel() for k in "rf")
    assert found["marker_pearson"]["all"] == pytest.approx(pearsonr(mine, theirs).statistic)


A, B = (np.random.default_rng(seed).poisson(2.0, (30, 12)).astype(float) for seed in range(2))
TAKE_MATRICES = {
    "rf_auc": lambda x: metrics.rf_auc(x, B, n_trees=5), "rf_auc, second": lambda x: metrics.rf_auc(B, x, n_trees=5), "rf_aucs": lambda x: metrics.rf_aucs(x, B, n_trees=5),
    "mmd": lambda x: metrics.mmd(x, B, bandwidth=1.0), "mmd_bandwidth": metrics.mmd_bandwidth, "permute_genes": metrics.permute_genes,
    "tsne": lambda x: metrics.tsne([B, x]), "label_classifier": lambda x: metrics.label_classifier(x, LABELS),
    "purity": lambda x: metrics.purity(metrics.label_classifier(B, LABELS), x, "a"),
    "variable_genes": suite.variable_genes, "strict_aucs": lambda x: suite.strict_aucs(x, B, n_trees=5), "combined_auc": lambda x: suite.combined_auc(x, B),
    "gene_statistics": suite.gene_statistics, "cell_statistics": suite.cell_statistics, "gene_correlation": lambda x: suite.gene_correlation(x, B),
    "mean_correlation": lambda x: suite.mean_correlation(B, x), "marker_logfc": lambda x: suite.marker_logfc(B, LABELS, x, LABELS, B, LABELS),
    "tstr": lambda x: suite.tstr(x, LABELS, B, LABELS, B, LABELS), "joint_components": lambda x: suite.joint_components(x, B),
    "precision_recall": lambda x: suite.precision_recall(x, B), "wasserstein": lambda x: suite.wasserstein(x, B), "ilisi": lambda x: suite.ilisi(x, B),
    "memorisation": lambda x: suite.memorisation(B, x, B), "membership_auc": lambda x: suite.membership_auc(x, B, B),
    "compare": lambda x: controls.compare(x, B, bandwidth=1.0, n_trees=5), "make_controls": lambda x: controls.make_controls(x, B, n=10, n_trees=5),
    "make_controls, train": lambda x: controls.make_controls(B, x, n=10, n_trees=5),
}
LABELS = np.array(["a", "b"])[np.arange(30) % 2]


@pytest.mark.parametrize("name", TAKE_MATRICES)
def test_an_anndata_is_no_matrix_and_both_kinds_of_matrices_will_do(name):
    call = TAKE_MATRICES[name]
    with pytest.raises(InputError, match=r"^(real|fake|cells|counts|train|train_log|members|group 1) is an AnnData: give a matrix.*expression\(adata\)") as error:
        call(ad.AnnData(A))
    assert "\n" not in str(error.value)
    call(A)
    call(sp.csr_matrix(A))
    call(A.tolist())


def test_the_attack_takes_sparse_points_too():
    c = np.random.default_rng(2).poisson(2.0, (30, 12))
    for reference in (None, c):
        wanted = suite.membership_auc(A, B, A[:9], reference=reference)
        assert suite.membership_auc(*map(sp.csr_matrix, (A, B, A[:9])), reference=None if reference is None else sp.csr_matrix(reference)) == wanted


@pytest.mark.parametrize("kind", [np.float32, np.float64, int])
def test_means_of_whole_numbers_have_the_same_ties_dense_and_sparse(kind):
    a, b = (np.random.default_rng(seed).poisson(2.0, (60, 200)).astype(kind) for seed in range(2))
    found = [suite.mean_correlation(f(a), g(b)) for f in (np.asarray, sp.csr_matrix) for g in (np.asarray, sp.csr_matrix)]
    assert all(f == found[0] for f in found)
    assert found[0]["mean_spearman"] == spearmanr(a.sum(axis=0), b.sum(axis=0)).statistic
    logs = sp.csr_matrix(np.log1p(a).astype(np.float32))
    assert np.array_equal(suite._gene_means(logs), np.asarray(logs.mean(axis=0), dtype=np.float64).ravel())


@pytest.mark.parametrize("form", [np.asarray, sp.csr_matrix])
def test_fold_changes_of_negative_values_are_refused(form):
    for at, name in ((0, "real"), (2, "fake"), (4, "train")):
        given = [B, LABELS, B, LABELS, B, LABELS]
        given[at] = form(A - 3)
        with pytest.raises(InputError, match=f"^{name} holds negative values .least -3"):
            suite.marker_logfc(*given)
