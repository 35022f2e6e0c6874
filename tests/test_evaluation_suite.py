"""The whole suite within `evaluate`: records, controls, sizes, details."""

import json

import numpy as np
import pytest
from test_evaluation import QUICK, cells, synthetic

from scld_nb.data import InputError, library_normalize
from scld_nb.evaluation import COLUMNS, Report, evaluate, expression
from scld_nb.report import verdict, write_html


@pytest.fixture(scope="module")
def groups():
    return cells(60, seed=1), cells(90, seed=2), cells(150, seed=3)


SUITE = {
    "strict_forest", "strict_boosting", "combined", "precision", "recall", "density", "coverage", "wasserstein1", "wasserstein2",
    "lisi", "ilisi", "ks_mean", "ks_variance", "ks_cv", "ks_zeros", "gene_correlation", "gene_correlation_gap", "mean_pearson", "mean_spearman",
}
WITH_LABELS = {"marker_pearson", "marker_jaccard", "tstr"}
WITH_TRAIN = {"memorisation", "membership_auc", "copied", "nndr", "distance_to_train"}


def metrics_of(report):
    return {r["metric"] for r in report.records}


@pytest.fixture(scope="module")
def whole(groups):
    real, fake, train = groups
    made = synthetic(fake, "counts", fake.X)
    return evaluate(real, made, train=train, labels_key="type", min_cluster=10, suite=True, **QUICK)


def test_suite_is_added_to_what_was_there(groups, whole):
    real, fake, train = groups
    plain = evaluate(real, synthetic(fake, "counts", fake.X), train=train, labels_key="type", min_cluster=10, **QUICK)
    assert whole.records[: len(plain.records)] == plain.records and not metrics_of(plain) & SUITE and plain.details == {}
    assert metrics_of(whole) - metrics_of(plain) == SUITE | WITH_LABELS | WITH_TRAIN | {"ks_library", "ks_detected"}
    assert all(list(r) == COLUMNS for r in whole.records)
    added = whole.to_frame().iloc[len(plain.records) :]
    assert added["value"].notna().all() and added["control"].notna().all() and added["control_n"].notna().all()
    assert added.loc[added["metric"] != "tstr", "negative"].notna().all()
    assert set(added.loc[added["metric"] == "tstr", "cluster"]) == {"all", "a", "b", "c"}


def test_suite_records_hold_what_the_functions_give(groups, whole):
    from scld_nb import suite

    real, fake, train = groups
    chosen = np.sort(np.random.default_rng([0, 2]).choice(90, 60, replace=False))  # rows of the larger side
    a, b, t = (expression(x) for x in (real, fake[chosen].copy(), train))
    points = suite.joint_components(a, b)
    for name, value in (suite.precision_recall(*points) | suite.ilisi(*points)).items():
        assert whole.value(name) == pytest.approx(value)
    assert whole.value("wasserstein1") == pytest.approx(suite.wasserstein(*points)["wasserstein1"])
    assert whole.value("combined", "counts") == pytest.approx(suite.combined_auc(real.X, fake.X[chosen]).auc, abs=0.02)
    assert whole.value("memorisation") == suite.memorisation(b, t, a).share
    library = suite.ks_statistics(*(suite.cell_statistics(x) for x in (real.X, fake.X[chosen])))
    assert whole.value("ks_library", "counts") == pytest.approx(library["library"])


def test_suite_sees_through_nonsense(groups, whole):
    real, _, train = groups
    rng = np.random.default_rng(0)
    nonsense = synthetic(train, values=np.apply_along_axis(rng.permutation, 0, library_normalize(train.X).toarray()))
    found = evaluate(real, nonsense, train=train, labels_key="type", suite=True, negative=False, spaces=["log1p"], **QUICK)
    for metric, worse in (("coverage", -1), ("gene_correlation", -1), ("tstr", -1), ("marker_pearson", -1), ("strict_forest", 1)):
        assert worse * (found.value(metric) - whole.value(metric)) > 0.05
    assert "ks_library" not in metrics_of(found) and np.isfinite(found.value("combined", "counts20k"))  # not counts: no library sizes


def test_copies_are_found(groups):
    real, _, train = groups
    found = evaluate(real, synthetic(train), train=train, suite=True, negative=False, spaces=["log1p"], **QUICK)
    assert found.value("memorisation") > 0.6 and found.value("distance_to_train") < next(
        r["control"] for r in found.records if r["metric"] == "distance_to_train"
    )
    assert not metrics_of(found) & WITH_LABELS


def test_copies_are_found_among_many_training_cells(tmp_path):
    real, train = cells(120, seed=1), cells(3000, seed=3)
    fake = train[np.sort(np.random.default_rng(0).permutation(3000)[:120])].copy()
    options = {"train": train, "suite": True, "negative": False, "spaces": ["log1p"]} | QUICK
    thief, honest = (evaluate(real, synthetic(x), **options) for x in (fake, cells(120, seed=4)))
    for found, copied in ((thief, True), (honest, False)):
        assert verdict(next(r for r in found.records if r["metric"] == "memorisation")) == "like real"      # too few are looked at
        assert (found.value("copied") > 0.9) == (found.value("nndr") < 0.1) == copied
        assert ("No sign of" not in write_html(found, tmp_path / "r.html").read_text()) == copied


def test_what_looks_for_the_nearest_cell_is_left_out_for_twins(groups):
    real, _, train = groups
    found = evaluate(real, synthetic(real), train=train, suite=True, paired=True, negative=False, spaces=["log1p"], **QUICK)
    assert not metrics_of(found) & (WITH_TRAIN | {"precision", "recall", "density", "coverage", "wasserstein1", "ilisi"})
    assert metrics_of(found) >= {"strict_forest", "combined", "ks_mean", "gene_correlation"} and "its own original" in str(found)


def test_a_label_that_was_not_delivered_is_said_and_counts(groups):
    real, fake, train = groups
    found = evaluate(real, synthetic(fake[fake.obs["type"] != "c"].copy()), train=train, labels_key="type", min_cluster=10, suite=True, negative=False,
                     spaces=["log1p"], **QUICK)
    assert found.value("tstr", cluster="c") == 0 and "no synthetic cell is labelled type c: F1 0 there in tstr" in str(found)


def test_suite_without_training_cells(groups):
    real, fake, _ = groups
    found = evaluate(real, synthetic(fake), labels_key="type", suite=True, negative=False, **QUICK)
    assert not metrics_of(found) & (WITH_TRAIN | WITH_LABELS) and "no training cells were given" in str(found)
    assert next(r for r in found.records if r["metric"] == "coverage")["control_n"] == 30 and "distances" not in found.details and all(r["n"] <= 30 for r in found.records)


def test_suite_controls_are_reused(groups, whole, monkeypatch):
    from scld_nb import evaluation

    real, fake, train = groups
    options = {"train": train, "labels_key": "type", "min_cluster": 10, "suite": True} | QUICK
    stored = json.loads(json.dumps(whole.controls))
    quick = evaluate(real, synthetic(fake), train=train, **QUICK).controls
    added = evaluate(real, synthetic(fake, "counts", fake.X), controls=quick, **options)  # those of a quick report are completed
    assert added.controls["suite"] == stored["suite"] and added.records == whole.records
    with pytest.raises(InputError, match="made with training cells: give train too"):
        evaluate(real, synthetic(fake, "counts", fake.X), controls=quick, suite=True, **QUICK)
    monkeypatch.setattr(evaluation, "_suite_controls", lambda *a: pytest.fail("computed again"))
    assert evaluate(real, synthetic(fake, "counts", fake.X), controls=stored, **options).records == whole.records


def test_judges_may_see_fewer_cells(groups):
    real, fake, train = groups
    found = evaluate(real, synthetic(fake), train=train, suite=True, n_judge=20, negative=False, spaces=["log1p"], **QUICK)
    sizes = {r["metric"]: r["n"] for r in found.records}
    assert sizes["rf_auc"] == sizes["strict_forest"] == sizes["combined"] == sizes["wasserstein1"] == sizes["mmd_biased"] == 20
    assert sizes["coverage"] == sizes["ilisi"] == 60 and "see 20 cells a side" in str(found)
    with pytest.raises(InputError, match="n_judge=20"):
        evaluate(real, synthetic(fake), train=train, controls=found.controls, negative=False, spaces=["log1p"], **QUICK)
    with pytest.raises(InputError, match="at least 5 cells"):
        evaluate(real, synthetic(fake), n_judge=4, **QUICK)


def test_trees_depend_on_the_number_of_cells(groups, monkeypatch):
    from scld_nb import evaluation

    real, fake, _ = groups
    monkeypatch.setattr(evaluation, "make_controls", lambda *a, **k: (_ for _ in ()).throw(RuntimeError(str(k["n_trees"]))))
    for options, trees in (({}, "1000"), ({"suite": True}, "1000"), ({"n_trees": 7}, "7")):
        with pytest.raises(RuntimeError, match=f"^{trees}$"):
            evaluate(real, synthetic(fake), progress=False, **options)
    big = cells(5000, genes=8, seed=5)
    with pytest.raises(RuntimeError, match="^100$"):
        evaluate(big, synthetic(big), suite=True, progress=False)


def test_report_with_details_comes_back(whole, tmp_path):
    whole.save(tmp_path)
    again = Report.load(tmp_path)
    assert again == whole and set(again.details) == {"genes", "correlation", "distances"}
    assert len(again.details["genes"]["real"]["mean"]) == 40 and np.shape(again.details["correlation"]["synthetic"]) == (40, 40)
    assert sum(again.details["distances"]["train"]) == sum(again.details["distances"]["heldout"]) == 60
    assert set(again.details["correlation"]["genes"]) == {f"gene{i}" for i in range(40)}


@pytest.mark.parametrize("n", [5, 11])
def test_suite_of_very_few_cells(groups, n):
    real, fake, train = groups
    found = evaluate(real[:n].copy(), synthetic(fake[:n].copy()), train=train, labels_key="type", suite=True, spaces=["log1p"], **(QUICK | {"n_trees": 5}))
    assert SUITE <= metrics_of(found) and np.isfinite(found.to_frame()["value"]).all()


def test_genes_labels_and_copies_hold_what_the_functions_give(groups, whole):
    from scld_nb import suite

    real, fake, train = groups
    fake = fake[np.sort(np.random.default_rng([0, 2]).choice(90, 60, replace=False))].copy()
    a, b, t = (expression(x) for x in (real, fake, train))
    ya, yb, yt = (x.obs["type"].astype(str).to_numpy() for x in (real, fake, train))
    by = {(r["metric"], r["cluster"]): r for r in whole.records if r["space"] == "log1p"}
    wanted = {f"ks_{k}": v for k, v in suite.ks_statistics(suite.gene_statistics(a), suite.gene_statistics(b)).items()}
    wanted |= suite.mean_correlation(a, b) | suite.gene_correlation(a, b, genes=suite.variable_genes(t, 500))
    assert {k: by[k, "all"]["value"] for k in wanted} == pytest.approx(wanted)
    marks = suite.marker_logfc(*(p for x, y in ((real, ya), (fake, yb), (train, yt)) for p in (expression(x, "counts20k"), y)))
    taught, copies = suite.tstr(b, yb, t, yt, a, ya), suite.memorisation(b, t, a)
    for label in ("all", "a", "b", "c"):
        assert by["marker_pearson", label]["value"] == pytest.approx(marks["marker_pearson"][label])
        record = by["tstr", label]
        assert (record["value"], record["control"]) == (taught["tstr"][label], taught["trtr"][label])
        assert record["n"] == record["control_n"] == taught["n"]["all"]
    near = by["distance_to_train", "all"]
    assert (near["value"], near["control"], near["control_n"]) == (np.median(copies.to_train), np.median(copies.to_heldout), 60)


def test_areas_of_the_suite_have_a_distance_and_a_flag_like_the_others(whole):
    areas = {"rf_auc", "rf_auc_depth5", "strict_forest", "strict_boosting", "combined", "membership_auc"}
    for r in whole.records:
        assert (r["distance"] is not None) == (r["metric"] in areas)
        if r["metric"] in areas:
            assert r["distance"] == abs(r["value"] - 0.5) and bool(r["flag"]) == (abs(r["control"] - 0.5) > 0.03)


def test_shuffled_cells_are_the_worst_in_the_suite_too(whole):
    by = {(r["metric"], r["cluster"]): r for r in whole.records}
    assert by["coverage", "all"]["negative"] < by["coverage", "all"]["control"]
    assert by["gene_correlation", "all"]["negative"] < 0.3 < by["gene_correlation", "all"]["control"]
    assert by["distance_to_train", "all"]["negative"] > by["distance_to_train", "all"]["value"]


def test_known_negative_controls_of_the_suite_are_shown_only_where_wanted(groups, whole):
    real, fake, train = groups
    found = evaluate(real, synthetic(fake, "counts", fake.X), train=train, labels_key="type", min_cluster=10, suite=True, negative=False, controls=whole.controls, **QUICK)
    assert all(r["negative"] is None for r in found.records)


def test_pictures_are_drawn_from_what_was_measured(groups, whole):
    from scld_nb import suite

    real, fake, train = groups
    fake = fake[np.sort(np.random.default_rng([0, 2]).choice(90, 60, replace=False))].copy()
    a, b, t = (expression(x) for x in (real, fake, train))
    copies, found = suite.memorisation(b, t, a), whole.details["distances"]
    edges = np.linspace(0, max(copies.to_train.max(), copies.to_heldout.max()), 41)
    assert found["train"] == np.histogram(copies.to_train, edges)[0].tolist() and found["heldout"] == np.histogram(copies.to_heldout, edges)[0].tolist()
    columns = [int(name.removeprefix("gene")) for name in whole.details["correlation"]["genes"]]
    for name, cells_of in (("real", a), ("synthetic", b)):
        assert np.allclose(whole.details["correlation"][name], np.corrcoef(cells_of.toarray()[:, columns].T), atol=1e-3)


def test_controls_draw_training_cells_and_not_the_first(groups):
    """Training cells sorted by type: the first sixty are hardly more than one type."""
    real, fake, train = groups
    train = train[np.argsort(train.obs["type"].astype(str), kind="stable")].copy()
    found = evaluate(real, synthetic(fake), train=train, suite=True, negative=False, spaces=["log1p"], **QUICK)
    controls = {r["metric"]: r["control"] for r in found.records}
    assert abs(controls["mmd_unbiased_squared"]) < 0.03 and controls["strict_forest"] < 0.65
