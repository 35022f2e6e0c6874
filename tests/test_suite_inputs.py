"""Choices inside the suite: training cells or test cells, drawn or first, scaled or not."""

import numpy as np
import pytest
from scipy.stats import pearsonr
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from scld_nb import suite
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
