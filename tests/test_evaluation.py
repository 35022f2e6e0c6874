"""The protocol: spaces, equal n, controls, reports."""

import json
import os

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse as sp

from scld_nb import controls
from scld_nb.data import InputError, library_normalize, split
from scld_nb.evaluation import COLUMNS, SPACES, Report, _flag, compare, evaluate, expression, make_controls
from scld_nb.metrics import auc_null_sd, mmd, mmd_bandwidth, rf_auc, rf_aucs

TYPES = np.array(["a", "b", "c"])


def cells(n, genes=40, seed=0, share=None):
    """Generated real cells with counts and types; profiles are the same for every seed."""
    rng = np.random.default_rng(seed)
    profiles = np.random.default_rng(99).gamma(0.5, 1, (3, genes)) + 0.05
    labels = rng.choice(3, size=n, p=share)
    counts = rng.poisson(rng.gamma(3, profiles[labels] * rng.gamma(4, 0.25, (n, 1)) * 2 / 3)).astype(np.float32)
    counts[:, 0] += 1  # no empty cell
    names = [f"gene{g}" for g in range(genes)]
    index = [f"cell{seed}-{i}" for i in range(n)]
    return ad.AnnData(
        sp.csr_matrix(counts), obs=pd.DataFrame({"type": pd.Categorical(TYPES[labels])}, index=index), var=pd.DataFrame(index=names)
    )


def synthetic(source, scale="counts20k", values=None, **uns):
    values = library_normalize(source.X) if values is None else values
    return ad.AnnData(values, obs=source.obs.copy(), var=source.var.copy(), uns={"scld": {"scale": scale, **uns}})


QUICK = {"n_trees": 15, "n_jobs": 1, "progress": False}


@pytest.fixture(scope="module")
def groups():
    return cells(60, seed=1), cells(90, seed=2), cells(150, seed=3)


@pytest.fixture(scope="module")
def report(groups):
    real, fake, train = groups
    return evaluate(real, synthetic(fake, method="m"), train=train, labels_key="type", min_cluster=10, dataset="d", **QUICK)


# --- spaces


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("space", SPACES)
def test_every_scale_comes_back_to_the_same_cells(space, dense):
    real = cells(30)
    linear = library_normalize(real.X)
    form = (lambda m: m.toarray()) if dense else (lambda m: m.copy())
    wanted = linear.toarray() if space == "counts20k" else np.log1p(linear.toarray())
    for given in (
        ad.AnnData(form(real.X), var=real.var),
        synthetic(real, "counts", form(real.X)),
        synthetic(real, "counts20k", form(linear)),
        synthetic(real, "log1p20k", form(linear.log1p())),
    ):
        before = given.X.copy()
        found = expression(given, space)
        found = found.toarray() if sp.issparse(found) else found
        assert found.dtype == np.float32 and np.allclose(found, wanted, rtol=1e-4, atol=1e-4)
        assert abs(given.X - before).max() == 0  # input left alone


def test_real_counts_come_from_the_layer():
    real = cells(10)
    normalised = ad.AnnData(library_normalize(real.X), var=real.var, layers={"counts": real.X, "raw": 2 * real.X})
    assert np.allclose(expression(normalised, "counts20k").toarray(), library_normalize(real.X).toarray())
    assert np.allclose(expression(normalised, "counts20k", layer="raw").toarray(), library_normalize(real.X).toarray())
    with pytest.raises(InputError):
        expression(ad.AnnData(library_normalize(real.X), var=real.var))


def test_negative_values_are_clipped_before_rescaling():
    values = np.array([[-5.0, 1.0, 3.0], [-1.0, -1.0, -1.0], [0.0, 0.0, 0.0]], dtype=np.float32)
    for form in (values, sp.csr_matrix(values)):
        found = expression(ad.AnnData(form, uns={"scld": {"scale": "counts20k"}}), "counts20k")
        found = found.toarray() if sp.issparse(found) else found
        assert np.allclose(found, [[0, 5000, 15000], [0, 0, 0], [0, 0, 0]])
    logs = expression(ad.AnnData(values, uns={"scld": {"scale": "log1p20k"}}), "counts20k")
    assert np.allclose(logs[0], [0, *np.expm1([1, 3]) / np.expm1([1, 3]).sum() * 20_000], rtol=1e-5)


def test_genes_are_matched_by_name_and_rescaled_after():
    real = cells(12, genes=6)
    order = ["gene4", "gene0", "gene2"]
    found = expression(real[:, ::-1].copy(), "counts20k", genes=order).toarray()
    wanted = real.X.toarray()[:, [4, 0, 2]]
    assert np.allclose(found, wanted / wanted.sum(axis=1, keepdims=True) * 20_000, rtol=1e-4)


@pytest.mark.parametrize(
    "given, options, message",
    [
        (lambda: cells(5), {"space": "raw"}, "'counts20k' or 'log1p'"),
        (lambda: synthetic(cells(5), "log2"), {}, "'log1p20k'"),
        (lambda: cells(5), {"genes": ["gene1", "x1", "x2", "x3", "x4"]}, "lacks 4 of 5 genes (x1, x2, x3, ...)"),
        (lambda: cells(5), {"genes": ["gene1", "x1"]}, "(x1)"),
        (lambda: synthetic(cells(5), "counts20k", np.full((5, 40), np.nan)), {}, "200 values that are not finite"),
        (lambda: synthetic(cells(5), "log1p20k", np.full((5, 40), 1000.0)), {}, "not finite"),
        (lambda: ad.AnnData(-np.eye(3, dtype=np.float32)), {}, "negative"),
    ],
)
def test_expression_refuses(given, options, message):
    with pytest.raises(InputError) as error:
        expression(given(), **options)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore:Variable names")
def test_expression_refuses_repeated_genes():
    twice = cells(5)
    twice.var_names = ["gene1", *twice.var_names[1:]]
    with pytest.raises(InputError, match="'gene1' more than once"):
        expression(synthetic(twice), name="synth")


# --- evaluate


def test_records_hold_what_the_functions_give(groups):
    real, fake, train = groups
    made = synthetic(fake[:60].copy())
    found = evaluate(real, made, train=train, seed=4, **QUICK)
    for space in SPACES:
        a, b = expression(real, space), expression(made, space)
        m = mmd_bandwidth(a, seed=4)
        assert found.value("rf_auc", space) == rf_auc(a, b, n_trees=15, seed=4).auc
        assert found.value("rf_auc_depth5", space) == rf_aucs(a, b, max_depths=(None, 5), n_trees=15, seed=4)[5].auc
        assert found.value("mmd_biased", space) == mmd(a, b, bandwidth=m).biased
        assert found.value("mmd_unbiased_squared", space) == mmd(a, b, bandwidth=m).unbiased_squared
        assert found.settings["bandwidth"][space] == m
    with pytest.raises(KeyError):
        found.value("rf_auc", cluster="none")


def test_records_are_complete(report):
    frame = report.to_frame()
    assert list(frame.columns) == COLUMNS and all(list(r) == COLUMNS for r in report.records)
    assert set(frame["dataset"]) == {"d"} and set(frame["method"]) == {"m"}
    pooled = frame[frame["cluster"] == "all"]
    assert sorted(pooled["metric"]) == sorted(2 * ["rf_auc", "rf_auc_depth5", "mmd_biased", "mmd_unbiased_squared"] + ["purity"])
    areas = pooled[pooled["metric"].str.startswith("rf_auc")]
    assert (areas["n"] == 60).all() and np.allclose(areas["null_sd"], auc_null_sd(60)) and areas["negative"].notna().all()
    assert np.allclose(areas["distance"], (areas["value"] - 0.5).abs())
    assert any("n_real = n_fake = 60 (of 60 real and 90 synthetic" in note for note in report.notes)


def test_flag_stands_in_the_line_of_the_result(report):
    for r in report.records:
        off = r["metric"].startswith("rf_auc") and r["control"] is not None and abs(r["control"] - 0.5) > 0.03
        assert bool(r["flag"]) == off
        if off:
            assert f"{r['control']:.3f} outside 0.50 ± 0.03" in r["flag"] and "null sd" in r["flag"]
            line = [s for s in str(report).splitlines() if r["flag"] in s and r["space"] in s and r["metric"] in s]
            assert line


def test_labels_are_judged_one_by_one(report, groups):
    real, fake, train = groups
    frame = report.to_frame().query("metric == 'rf_auc' and cluster != 'all'")
    sizes = pd.DataFrame({k: g.obs["type"].value_counts() for k, g in zip("rf", (real, fake))}).min(axis=1)
    assert dict(zip(frame["cluster"], frame["n"])) == {k: v for k, v in sizes.items() if v >= 10}
    assert set(frame["space"]) == set(SPACES) and frame["control"].notna().all()
    share = report.value("purity")
    assert share > 0.8 and report.to_frame().query("metric == 'purity'")["control"].iloc[0] > 0.8


def test_small_labels_are_left_out_by_name(groups):
    real, fake, _ = groups
    found = evaluate(real, synthetic(fake), labels_key="type", min_cluster=1000, spaces="log1p", negative=False, **QUICK)
    assert any(note.startswith("left out, fewer than 1000 cells: type a (") for note in found.notes)
    assert {r["cluster"] for r in found.records} == {"all"} and {r["space"] for r in found.records} == {"log1p"}
    assert all(r["negative"] is None for r in found.records)


def test_purity_notices_exchanged_labels(groups):
    real, fake, train = groups
    wrong = synthetic(fake)
    wrong.obs["type"] = wrong.obs["type"].map({"a": "b", "b": "c", "c": "a"})
    found = evaluate(real, wrong, train=train, labels_key="type", spaces="log1p", negative=False, **QUICK)
    assert found.value("purity") < 0.2


def test_reused_controls_change_nothing(groups, report):
    real, fake, train = groups
    stored = json.loads(json.dumps(report.controls))
    again = evaluate(real, synthetic(fake, method="m"), train=train, labels_key="type", min_cluster=10, dataset="d", controls=stored, **QUICK)
    assert again.records == report.records and again.controls == report.controls == stored
    other = evaluate(real, synthetic(cells(70, seed=8)), controls=stored, **QUICK)  # training cells are not needed then
    assert other.controls["spaces"] == report.controls["spaces"]
    for a, b in zip(other.records, report.records):
        assert (a["control"], a["negative"]) == (b["control"], b["negative"])


def test_make_controls_is_what_evaluate_uses(groups, report):
    real, _, train = groups
    made = make_controls(expression(real, "counts20k"), expression(train, "counts20k"), n=60, n_trees=15)
    assert made["spaces"] == report.controls["spaces"] and made["clusters"] == {}


@pytest.mark.parametrize(
    "change, options, message",
    [
        ({}, {"seed": 1}, "seed=0"),
        ({}, {"n_max": 50}, "n=60"),
        ({}, {"n_trees": 16}, "n_trees=15"),
        ({}, {"train": cells(80, seed=77)}, "train="),
        ({"real": "0"}, {}, "real=0"),
        ({"spaces": {}}, {}, "lack the space"),
        ({"spaces": {s: {"bandwidth": 1.0, "positive": {}, "negative": None} for s in SPACES}}, {}, "negative control"),
        ({"spaces": None}, {}, "not what Report.controls holds"),
    ],
)
def test_controls_of_another_comparison_are_refused(groups, report, change, options, message):
    real, fake, _ = groups
    with pytest.raises(InputError) as error:
        evaluate(real, synthetic(fake), controls=report.controls | change, **(QUICK | options))
    assert message in str(error.value)


def test_without_training_cells_result_and_control_have_the_same_n(groups):
    real, fake, _ = groups
    found = evaluate(real, synthetic(fake), spaces=["log1p"], **QUICK)
    assert all(r["control_n"] == r["n"] == 30 for r in found.records)
    assert "30 real cells against 30 other real cells, as no training cells were given" in str(found)
    few = evaluate(real, synthetic(fake[:20].copy()), spaces=["log1p"], negative=False, **QUICK)
    assert all(r["control_n"] == r["n"] == 20 for r in few.records)
    again = evaluate(real, synthetic(fake), spaces=["log1p"], controls=found.controls, **QUICK)
    assert again.records == found.records
    with pytest.raises(InputError, match="only 4 cells a side can be compared .9 real, half of them for the control"):
        evaluate(real[:9].copy(), synthetic(fake), **QUICK)
    with pytest.raises(InputError, match="only 2 real cells are left for the control"):
        make_controls(expression(real, "counts20k"), n=58)


def test_fewer_training_cells_are_said(groups):
    real, fake, train = groups
    found = evaluate(real, synthetic(fake), train=train[:40].copy(), spaces=["log1p"], negative=False, **QUICK)
    assert all(r["control_n"] == 40 for r in found.records) and "40 training cells (there are only 40: compare with n=60 with care)" in str(found)


def test_labels_of_another_kind_get_controls_of_their_own(groups):
    real, fake, train = (part.copy() for part in groups)
    for k, part in enumerate((real, fake, train)):                    # the same names, but another meaning among training cells
        part.obs["other"] = part.obs["type"].cat.rename_categories({"a": "b", "b": "a"}) if k == 2 else part.obs["type"]
    options = {"train": train, "min_cluster": 10, "spaces": ["log1p"], "negative": False} | QUICK
    known = evaluate(real, synthetic(fake), labels_key="type", **options).controls
    fresh = evaluate(real, synthetic(fake), labels_key="other", **options)
    reused = evaluate(real, synthetic(fake), labels_key="other", controls=known, **options)
    assert reused.records == fresh.records and fresh.value("rf_auc", cluster="c") is not None
    control = {r["cluster"]: r["control"] for r in fresh.records if r["metric"] == "rf_auc"}
    assert control["a"] > 0.8 > control["c"]


def test_twins_of_one_label_share_folds_too():
    real = cells(240, seed=1)
    thinned = real.copy()
    thinned.X.data = np.random.default_rng(0).binomial(thinned.X.data.astype(int), 0.9).astype(np.float32)
    thinned.X.eliminate_zeros()
    options = {"train": cells(400, seed=3), "labels_key": "type", "spaces": ["counts20k"], "negative": False} | QUICK
    areas = {paired: [r["value"] for r in evaluate(real, synthetic(thinned, "counts", thinned.X), paired=paired, **options).records
                      if r["metric"] == "rf_auc" and r["cluster"] != "all"] for paired in (False, True)}
    assert min(areas[True]) > 0.3 > max(areas[False])


def test_few_judged_cells_and_labels(groups):
    real, fake, train = groups
    found = evaluate(real, synthetic(fake), train=train, labels_key="type", min_cluster=10, n_judge=8, spaces=["log1p"], negative=False, **QUICK)
    assert {r["n"] for r in found.records if r["cluster"] != "all"} == {10}


def test_cells_in_both_groups_are_said(groups):
    real, fake, _ = groups
    found = evaluate(real, synthetic(fake), train=real, spaces=["log1p"], negative=False, **QUICK)
    assert "60 cell names are in both real and train" in str(found)


def test_real_cells_compared_do_not_depend_on_the_synthetic_ones(groups):
    real, fake, train = groups
    one = evaluate(real, synthetic(fake), train=train, n_max=40, spaces=["log1p"], **QUICK)
    two = evaluate(real, synthetic(cells(200, seed=9)), train=train, n_max=40, spaces=["log1p"], **QUICK)
    assert one.controls == two.controls and one.records[0]["n"] == 40
    assert one.records == evaluate(real, synthetic(fake), train=train, n_max=40, spaces=["log1p"], **QUICK).records


def test_the_scale_of_the_synthetic_cells_does_not_matter(groups):
    real, fake, train = groups
    linear = library_normalize(fake.X)
    reordered = synthetic(fake, "log1p20k", linear.log1p())[:, ::-1].copy()
    one = evaluate(real, synthetic(fake), train=train, negative=False, **QUICK)
    two = evaluate(real, reordered, train=train, negative=False, **QUICK)
    for a, b in zip(one.records, two.records):
        assert a["value"] == pytest.approx(b["value"], abs=4 * auc_null_sd(60) if a["metric"].startswith("rf") else 1e-4)


def test_control_of_a_thousand_cells_is_a_half_and_shuffled_cells_are_not():
    real, fake, train = cells(1000, seed=11), cells(1000, seed=12), cells(1500, seed=13)
    controls = make_controls(expression(real, "counts20k"), expression(train, "counts20k"), n=1000, n_trees=40, spaces=["log1p"])
    entry = controls["spaces"]["log1p"]
    assert abs(entry["positive"]["rf_auc"] - 0.5) <= 0.03 and abs(entry["positive"]["rf_auc_depth5"] - 0.5) <= 0.04
    assert abs(entry["positive"]["mmd_unbiased_squared"]) < 2e-3 and entry["negative"]["rf_auc"] > 0.9
    found = evaluate(real, synthetic(fake), controls=controls, spaces=["log1p"], n_trees=40, n_jobs=1, progress=False)
    assert abs(found.value("rf_auc") - 0.5) <= 0.03 and not any(r["flag"] for r in found.records if r["metric"] == "rf_auc")


def test_compare_gives_pairs():
    rng = np.random.default_rng(0)
    found = compare(*rng.normal(size=(2, 20, 5)), bandwidth=1.0, n_trees=5)
    assert found["rf_auc"][1] is not None and found["mmd_biased"][1] is None


def test_names_come_from_the_cells(groups):
    real, fake, _ = groups
    real = real.copy()
    real.uns["scld_data"] = {"name": "own"}
    found = evaluate(real, synthetic(fake, method="SCLD"), spaces=["log1p"], negative=False, **QUICK)
    assert {(r["dataset"], r["method"]) for r in found.records} == {("own", "SCLD")}
    assert {(r["dataset"], r["method"]) for r in evaluate(fake, real, spaces=["log1p"], negative=False, **QUICK).records} == {("data", "synthetic")}


def test_progress_is_quiet_in_notebook_tests(groups, capfd, monkeypatch):
    real, fake, _ = groups
    options = QUICK | {"progress": None, "spaces": ["log1p"], "negative": False, "n_trees": 2}
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.setenv("IN_TEST", "1")
    evaluate(real, synthetic(fake), **options)
    assert capfd.readouterr().err == ""
    monkeypatch.delenv("IN_TEST")
    evaluate(real, synthetic(fake), **options)
    assert "evaluate" in capfd.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        ({"spaces": ["raw"]}, "counts20k, log1p"),
        ({"spaces": []}, "counts20k, log1p"),
        ({"n_trees": 0}, "n_trees is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"n_max": 4}, "only 4 cells a side"),
        ({"n_max": 4}, "at least 5"),
        ({"train": cells(3)}, "train has 3 cells"),
        ({"labels_key": "kind"}, "real.obs has no column 'kind': it has type"),
        ({"train": cells(30, genes=30)}, "train lacks 10 of 40 genes"),
        ({"train": cells(50, share=[0.5, 0.5, 0]), "labels_key": "type"}, "synth has the label 'c'"),
    ],
)
def test_evaluate_refuses(groups, options, message):
    real, fake, _ = groups
    with pytest.raises(InputError) as error:
        evaluate(real, synthetic(fake), **(QUICK | options))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_evaluate_refuses_missing_genes(groups):
    real, fake, _ = groups
    with pytest.raises(InputError, match="synth lacks 1 of 40 genes"):
        evaluate(real, synthetic(fake)[:, 1:].copy(), **QUICK)


# --- the report


def test_report_round_trip(report, tmp_path):
    report.tsne()
    assert report.save(tmp_path / "new" / "folder") == tmp_path / "new" / "folder"
    again = Report.load(tmp_path / "new" / "folder")
    assert again == report and str(again) == str(report) and again.tsne() == report.tsne()
    table = pd.read_csv(tmp_path / "new" / "folder" / "report.csv")
    assert list(table.columns) == COLUMNS and np.allclose(table["value"], [r["value"] for r in report.records])
    content = json.loads((tmp_path / "new" / "folder" / "report.json").read_text())
    assert content["format"] == 1 and content["records"] == report.records
    assert sorted(os.listdir(tmp_path / "new" / "folder")) == ["report.csv", "report.json"]


def test_report_shows_itself(report):
    text, page = str(report), report._repr_html_()
    assert all(note in text for note in report.notes) and "<table" in page and "control" in page
    assert str(Report([], {}, ["nothing"], {})) == "nothing\n(no result)"


def test_report_coordinates(report, groups):
    coords = report.tsne()
    assert np.shape(coords["real"]) == np.shape(coords["synthetic"]) == (60, 2)
    assert set(coords["real_labels"]) <= set(TYPES) and len(coords["synthetic_labels"]) == 60
    assert report.tsne() is coords
    real, fake, _ = groups
    plain = evaluate(real, synthetic(fake), spaces=["log1p"], negative=False, **QUICK).tsne()
    assert sorted(plain) == ["real", "synthetic"]


def test_a_file_is_never_half_written(report, tmp_path, monkeypatch):
    report.save(tmp_path)
    before = (tmp_path / "report.json").read_bytes()

    def broken(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="disk full"):
        Report([], {}, [], {}).save(tmp_path)
    assert (tmp_path / "report.json").read_bytes() == before and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("content", [None, "{", "[]", '{"format": 2}'])
def test_load_refuses(content, tmp_path):
    if content is not None:
        (tmp_path / "report.json").write_text(content)
    with pytest.raises(InputError, match="report"):
        Report.load(tmp_path)


# --- files that stay on disk


@pytest.fixture
def files(groups, tmp_path):
    real, fake, train = groups
    paths = {name: tmp_path / f"{name}.h5ad" for name in ("real", "synth", "train")}
    for path, adata in zip(paths.values(), (real, synthetic(fake, "counts", fake.X, method="m"), train)):
        adata.write_h5ad(path)
    return paths


@pytest.mark.parametrize("backed", [False, True])
def test_files_are_judged_like_cells_in_memory(files, groups, backed):
    """Every record, the suite and the labels included, and the pictures' cells."""
    real, fake, train = groups
    options = {"labels_key": "type", "min_cluster": 10, "suite": True, **QUICK}
    whole = evaluate(real, synthetic(fake, "counts", fake.X, method="m"), train=train, **options)
    there = {k: ad.read_h5ad(p, backed="r") if backed else str(p) for k, p in files.items()}
    lazy = evaluate(there["real"], there["synth"], train=there["train"], **options)
    pd.testing.assert_frame_equal(lazy.to_frame(), whole.to_frame())
    assert lazy.notes == whole.notes and lazy.controls == whole.controls and lazy.details == whole.details


def test_of_a_file_no_more_is_read_than_is_compared(files, groups, monkeypatch):
    from scld_nb.large import DiskCounts

    real, fake, train = groups
    read, entries = [], DiskCounts._entries
    monkeypatch.setattr(DiskCounts, "_entries", lambda self, a, b: read.append((self.path.stem, b - a)) or entries(self, a, b))
    monkeypatch.setattr("scld_nb.large.GAP", 0)                # no entry of a cell between two chosen ones
    options = {"n_max": 20, "negative": False, **QUICK}
    few = evaluate(files["real"], files["synth"], train=files["train"], **options)
    for name, adata in zip(files, groups):
        assert sum(n for who, n in read if who == name) < adata.X.nnz / 2
    assert few.notes[1:4] == [f"20 of {n} cells of {k} were read, drawn at random" for k, n in (("real", 60), ("synth", 90), ("train", 150))]
    one, other = synthetic(fake, "counts", fake.X), few.settings["bandwidth"]
    drawn = evaluate(real, one, train=train, **options)
    for space in SPACES:                                       # the same cells as from memory
        assert few.value("rf_auc", space) == drawn.value("rf_auc", space)
    assert other != drawn.settings["bandwidth"]                # which are all that the file's bandwidth is made from


def test_a_wrong_seed_is_named_before_files_are_read(files):
    with pytest.raises(InputError, match="seed is -1: choose one from 0"):
        evaluate(files["real"], files["synth"], train=files["train"], **(QUICK | {"n_max": 20, "seed": -1}))


def test_without_n_max_a_file_gives_ten_thousand_cells(files, monkeypatch):
    monkeypatch.setattr("scld_nb.evaluation.FROM_DISK", 30)
    report = evaluate(files["real"], files["synth"], train=files["train"], **QUICK)
    assert set(report.to_frame()["n"]) == {30} and set(report.to_frame()["control_n"]) == {30}


def test_twins_of_two_files_stay_together(files, groups, tmp_path):
    real, fake, _ = groups
    synthetic(real, "counts", real.X * 2).write_h5ad(tmp_path / "twins.h5ad")
    report = evaluate(files["real"], tmp_path / "twins.h5ad", paired=True, n_max=40, negative=False, **QUICK)
    assert abs(report.value("mmd_unbiased_squared")) < 1e-9     # twice the counts is the same cell: the same rows were drawn
    with pytest.raises(InputError, match="paired cells need equal numbers, got 60 real and 90 synthetic"):
        evaluate(files["real"], files["synth"], paired=True, n_max=20, **QUICK)


def test_cells_that_were_normalised_after_they_were_drawn_are_refused(groups):
    real, fake, _ = groups
    drawn = synthetic(fake, "counts", fake.X.copy())
    logged = drawn.copy()
    sc.pp.normalize_total(logged)
    for part, message in ((logged, "synth.X holds non-integer values.*was X changed since"), (sc.pp.log1p(logged, copy=True), "synth.X holds non-integer values.*was X changed since"),
                          (sc.pp.log1p(synthetic(fake, "counts20k"), copy=True), "log-transformed after the cells were drawn")):
        with pytest.raises(InputError, match=message) as error:
            evaluate(real, part, **QUICK)
        assert "synth" in str(error.value)


def test_what_a_generated_file_holds_is_in_x(files, groups, tmp_path):
    real, fake, _ = groups
    made = synthetic(fake, "log1p20k", library_normalize(fake.X).log1p())
    made.layers["counts"] = sp.csr_matrix(np.ones(fake.shape, np.float32))
    made.write_h5ad(tmp_path / "made.h5ad")
    report = evaluate(files["real"], tmp_path / "made.h5ad", **QUICK)
    assert report.value("rf_auc") == evaluate(real, made, **QUICK).value("rf_auc")


@pytest.mark.parametrize(
    ("broken", "options", "message"),
    [
        (lambda a: a, {"labels_key": "kind"}, r"synth\.obs has no column 'kind': it has type"),
        (lambda a: ad.AnnData(a.X.toarray(), a.obs, a.var, uns=a.uns), {}, r"X of synth\.h5ad is dense.*rewrite it once"),
        (lambda a: ad.AnnData(a.X.tocsc(), a.obs, a.var, uns=a.uns), {}, r"X of synth\.h5ad is CSC.*rewrite it once"),
        (lambda a: a[:, 3:].copy(), {}, r"synth lacks 3 of 40 genes \(gene0, gene1, gene2\)"),
    ],
)
def test_files_that_cannot_be_judged(files, groups, broken, options, message):
    real, fake, _ = groups
    broken(synthetic(fake, "counts", fake.X)).write_h5ad(files["synth"])
    if options:
        fake = real.copy()
        fake.obs["kind"] = "x"
        fake.write_h5ad(files["real"])
    with pytest.raises(InputError, match=message):
        evaluate(files["real"], files["synth"], **options, **QUICK)
    with pytest.raises(InputError, match="no such file"):
        evaluate(files["real"], files["real"].with_name("nowhere.h5ad"), **QUICK)


def test_drawn_cells_may_have_gone_through_scanpy_if_their_counts_are_there():
    real, fake = cells(60, seed=1), cells(60, seed=2)
    made = synthetic(fake, "counts", fake.X)
    plain = evaluate(real, made, **QUICK)
    made.layers["counts"] = made.X.copy()
    made.X = made.X.astype(np.float32).log1p()
    made.uns["log1p"] = {"base": None}
    assert evaluate(real, made, **QUICK).records == plain.records
    made.X = made.layers["counts"].copy()
    del made.layers["counts"]                                   # counts again, whatever uns says
    assert evaluate(real, made, **QUICK).records == plain.records


def test_repeated_draws_are_noted():
    real, fake = cells(60, seed=1), cells(30, seed=2)
    twice = ad.concat([fake, fake], index_unique="-")
    notes = evaluate(real, synthetic(twice, "counts", twice.X), train=cells(60, seed=3), **QUICK).notes
    assert any("30 of 60 synthetic cells repeat another one exactly (real cells: 0): the same seed draws the same cells" in note for note in notes)
    whole = cells(60, seed=2)
    assert not any("repeat" in note for note in evaluate(real, synthetic(whole, "counts", whole.X), train=cells(60, seed=3), **QUICK).notes)


def test_nothing_in_common_and_nothing_at_all():
    real, fake = cells(60, seed=1), cells(60, seed=2)
    real.obs["type"], fake.obs["type"] = "T cell", "T-cell"
    with pytest.raises(InputError, match="no label of 'type' in common .'T cell', 'T-cell'.: use the same names"):
        evaluate(real, synthetic(fake), labels_key="type", **QUICK)
    with pytest.raises(InputError, match="synth must be an AnnData or the path of an .h5ad file, got NoneType"):
        evaluate(real, None, **QUICK)


def test_a_report_shows_itself_as_a_table(tmp_path):
    report = evaluate(cells(60, seed=1), synthetic(cells(60, seed=2)), **QUICK)
    assert repr(report) == str(report) and "rf_auc" in repr(report)
    (tmp_path / "report.json").write_text('{"format": 1}')
    with pytest.raises(InputError, match="not a report of format 1"):
        Report.load(tmp_path)


# --- which cells, labels and layers


def test_a_real_cell_without_a_count_stays_empty():
    real = cells(10)
    real.X = sp.csr_matrix(real.X.toarray() * (np.arange(10) != 3)[:, None])
    found = expression(real, "counts20k").toarray().sum(axis=1)
    assert found[3] == 0 and np.allclose(np.delete(found, 3), 20_000, rtol=1e-4)


def test_twins_stay_together_before_the_judges():
    real = cells(60, seed=1)
    found = evaluate(real, synthetic(real, "counts", real.X), paired=True, n_judge=20, spaces=["log1p"], negative=False, **QUICK)
    assert abs(found.value("mmd_unbiased_squared")) < 1e-9 and found.records[0]["n"] == 20


def test_a_label_with_just_enough_cells_is_judged(groups):
    real, fake, _ = groups
    sizes = pd.DataFrame({k: g.obs["type"].value_counts() for k, g in zip("rf", (real, fake))}).min(axis=1)
    options = {"labels_key": "type", "spaces": ["log1p"], "negative": False} | QUICK
    for least, wanted in ((sizes.min(), set(sizes.index)), (sizes.min() + 1, set(sizes.index[sizes > sizes.min()]))):
        assert {r["cluster"] for r in evaluate(real, synthetic(fake), min_cluster=int(least), **options).records} == wanted | {"all"}


def test_a_label_with_few_training_cells_has_a_smaller_control(groups):
    real, fake, train = groups
    c = np.flatnonzero(train.obs["type"] == "c")
    few = train[np.setdiff1d(np.arange(150), c[12:])].copy()
    found = evaluate(real, synthetic(fake), train=few, labels_key="type", min_cluster=10, spaces=["log1p"], negative=False, **QUICK)
    record = next(r for r in found.records if r["cluster"] == "c")
    assert record["n"] > 12 == record["control_n"] and 0 <= record["control"] <= 1
    assert not record["flag"] or f"null sd {auc_null_sd(12):.3f}" in record["flag"]


def test_twins_with_other_labels_are_left_out_of_both():
    real = cells(120, seed=1)
    made = synthetic(real, "counts", real.X)
    made.obs["type"] = np.where(np.arange(120) % 4, real.obs["type"].astype(str), "a")
    found = evaluate(real, made, paired=True, labels_key="type", min_cluster=10, spaces=["log1p"], negative=False, **QUICK)
    both = ((real.obs["type"].astype(str) == made.obs["type"]) & (made.obs["type"] == "b")).sum()
    assert next(r["n"] for r in found.records if r["cluster"] == "b") == both


def test_purity_of_real_cells_leaves_out_labels_that_training_cells_lack(groups):
    real, fake, train = groups
    real = real.copy()
    real.obs["type"] = np.where(np.arange(60) < 20, "new", real.obs["type"].astype(str))
    found = evaluate(real, synthetic(fake), train=train, labels_key="type", spaces=["log1p"], negative=False, **QUICK)
    record = next(r for r in found.records if r["metric"] == "purity")
    assert record["control_n"] == 40 and record["control"] > 0.7


@pytest.mark.parametrize("on_disk", [False, True])
def test_real_and_training_counts_come_from_the_layer(groups, tmp_path, on_disk):
    real, fake, train = groups
    moved = [ad.AnnData(library_normalize(part.X).log1p(), obs=part.obs, var=part.var, layers={"raw": part.X}) for part in (real, train)]
    wanted = evaluate(real, synthetic(fake), train=train, spaces=["log1p"], negative=False, **QUICK)
    if on_disk:
        for part, name in zip(moved, ("real", "train")):
            part.write_h5ad(tmp_path / f"{name}.h5ad")
        moved = [tmp_path / "real.h5ad", tmp_path / "train.h5ad"]
    assert evaluate(moved[0], synthetic(fake), train=moved[1], layer="raw", spaces=["log1p"], negative=False, **QUICK).records == wanted.records


def test_known_negative_controls_are_shown_only_where_wanted(groups, report):
    real, fake, train = groups
    found = evaluate(real, synthetic(fake), train=train, controls=report.controls, negative=False, **QUICK)
    assert all(r["negative"] is None for r in found.records) and any(r["negative"] for r in report.records)


def test_the_control_of_few_judged_cells_says_how_many(groups):
    real, fake, train = groups
    found = evaluate(real, synthetic(fake), train=train, n_judge=20, spaces=["log1p"], negative=False, **QUICK)
    assert all(r["n"] == r["control_n"] == 20 for r in found.records)
    assert all(f"null sd {auc_null_sd(20):.3f}" in r["flag"] for r in found.records if r["flag"])


def test_repeats_that_real_cells_have_too_are_no_news():
    real, fake = (ad.concat([part, part], index_unique="-") for part in (cells(30, seed=1), cells(30, seed=2)))
    assert not any("repeat" in note for note in evaluate(real, synthetic(fake, "counts", fake.X), train=cells(60, seed=3), spaces=["log1p"], negative=False, **QUICK).notes)


def test_labels_of_the_map_are_those_of_its_cells(groups, report):
    chosen = np.sort(np.random.default_rng([0, 2]).choice(90, 60, replace=False))
    coords = report.tsne()
    assert coords["synthetic_labels"] == list(groups[1].obs["type"].iloc[chosen]) and coords["real_labels"] == list(groups[0].obs["type"])


def test_a_seed_that_no_forest_takes_is_refused_first(groups):
    with pytest.raises(InputError, match="seed is 4294967296: choose one from 0"):
        evaluate(groups[0], synthetic(groups[1]), **(QUICK | {"seed": 2**32}))


def test_repeats_are_counted_among_the_cells_that_are_compared():
    thrice = ad.concat([cells(30, seed=2)] * 3, index_unique="-")
    notes = evaluate(cells(60, seed=1), synthetic(thrice, "counts", thrice.X), train=cells(60, seed=3), spaces=["log1p"], negative=False, **QUICK).notes
    chosen = np.random.default_rng([0, 2]).choice(90, 60, replace=False)
    assert any(f"{60 - len(set(chosen % 30))} of 60 synthetic cells repeat" in note for note in notes)


# --- what was given: mixed-up files, other proportions

LITTLE = {"spaces": ["log1p"], "negative": False} | QUICK


def doubts_of(real, synth, **options):
    found = evaluate(real, synth, **(LITTLE | options))
    assert all(doubt in found.notes for doubt in found.settings["doubts"])
    return " / ".join(found.settings["doubts"])


def test_drawn_cells_are_not_taken_for_real_ones(groups):
    real, fake, train = groups
    drawn = synthetic(fake, "counts", fake.X, model="m")
    for order in ({"real": drawn, "synth": real}, {"real": real, "synth": drawn, "train": drawn}):
        with pytest.raises(InputError, match="cells that a model drew: the order is"):
            evaluate(**order, **LITTLE)
    assert doubts_of(real, drawn, train=train, labels_key="type", min_cluster=1000) == ""


def test_the_training_part_is_no_test_part(groups):
    train, test = split(cells(200, seed=5), test_size=0.4, seed=0)
    fake = synthetic(groups[1])
    assert "the real cells are the training part" in doubts_of(train, fake) and doubts_of(test, fake, train=train) == ""


def test_synthetic_cells_that_are_real_ones_are_recognised(groups):
    real, fake, train = groups
    copies = synthetic(real, "counts", real.X)
    assert "60 of 60 synthetic cells equal one of the real cells" in doubts_of(real, copies, train=train)
    mixed = ad.concat([fake[:55], train[:35]], index_unique="-")
    found = doubts_of(real, synthetic(mixed, "counts", mixed.X), train=train)
    rows = np.random.default_rng([0, 2]).choice(90, 60, replace=False)
    assert f"{(rows >= 55).sum()} of 60 synthetic cells equal one of the training cells" in found and "real cells in every gene" not in found


def test_other_proportions_of_labels_are_named(groups):
    real, _, train = groups
    even = [cells(120, seed=s, share=[1 / 3, 1 / 3, 1 / 3]) for s in (11, 12)]
    skewed = cells(120, seed=13, share=[0.8, 0.1, 0.1])
    assert doubts_of(even[0], synthetic(even[1]), labels_key="type", train=train, min_cluster=1000) == ""
    found = doubts_of(even[0], synthetic(skewed), labels_key="type", train=train, min_cluster=1000)
    assert f"labels come in other proportions: a is {(even[0].obs['type'] == 'a').mean():.0%} of the real" in found and "sample(real.obs['type'].value_counts())" in found
    some = synthetic(even[1][even[1].obs["type"] != "c"].copy())
    share = (even[0].obs["type"] == "c").mean()
    assert f"{share:.0%} of the real cells have labels that no synthetic cell has: c" in doubts_of(even[0], some, labels_key="type", train=train, min_cluster=1000)


def test_genes_without_a_name_in_common_are_another_matter(groups):
    real, fake, _ = groups
    other = synthetic(fake)
    other.var_names = [f"ENSG{g}" for g in range(40)]
    with pytest.raises(InputError, match="symbols on one side and ids on the other"):
        evaluate(real, other, **LITTLE)
    with pytest.raises(InputError, match=r"real\[:, real.var_names.isin\(synth.var_names\)\]"):
        evaluate(real, synthetic(fake[:, :30].copy()), **LITTLE)


@pytest.mark.parametrize("wrong", [{"seed": None}, {"seed": 0.5}, {"n_max": "10"}, {"n_judge": 20.0}, {"n_trees": "5"}, {"labels_key": ["type"]}, {"min_cluster": None}, {"n_jobs": 0}, {"n_jobs": 1.5}])
def test_options_of_another_kind_are_named(groups, wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        evaluate(groups[0], synthetic(groups[1]), train=groups[2], **(LITTLE | wrong))


def test_numbers_of_numpy_are_numbers(groups, tmp_path):
    numbers = {"seed": np.int64(3), "n_max": np.int64(30), "n_trees": np.int32(5), "n_judge": np.int64(20)}
    found = evaluate(groups[0], synthetic(groups[1]), train=groups[2], **(LITTLE | numbers))
    assert Report.load(found.save(tmp_path)) == found and "the rest of the suite" not in str(found)


def test_controls_of_other_genes_are_not_reused_by_the_suite(groups, monkeypatch):
    real, fake, train = groups
    first = evaluate(real, synthetic(fake), train=train, suite=True, **LITTLE)
    for module in ("controls", "evaluation"):
        monkeypatch.setattr(f"scld_nb.{module}.compare", lambda *a, **k: pytest.fail("refused too late"))
    with pytest.raises(InputError, match="controls were made with training cells: give train too"):
        evaluate(real, synthetic(fake), controls=first.controls, suite=True, **LITTLE)


def test_no_label_is_called_all(groups):
    named = [part.copy() for part in groups]
    for part in named:
        part.obs["type"] = part.obs["type"].astype(str).replace({"a": "all"})
    with pytest.raises(InputError, match="has a label 'all'"):
        evaluate(named[0], synthetic(named[1]), train=named[2], labels_key="type", **LITTLE)


def test_controls_of_more_cells_than_there_are(groups):
    with pytest.raises(InputError, match="n is 100, but there are 60"):
        make_controls(*(expression(part, "counts20k") for part in (groups[0], groups[2])), n=100, n_trees=5)


def test_a_control_at_the_edge_of_the_window_is_not_flagged():
    assert 0.53 - 0.5 > 0.03 and _flag(0.53, 136) is None and _flag(0.47, 136) is None
    assert _flag(0.531, 136).startswith("control 0.531 outside 0.50 ± 0.03 (null sd 0.035")


def borrowed(drawn, around):
    """Drawn counts in X of a copy of other cells, whose own counts stay in the layer."""
    around = around.copy()
    around.layers["counts"] = around.X.copy()
    made = around[: drawn.shape[0]].copy()
    made.X = drawn
    return made


@pytest.mark.parametrize("form", [sp.csr_matrix, sp.csc_matrix, np.asarray])
@pytest.mark.parametrize("way", ["memory", "view", "record", "path", "backed"])
def test_counts_in_x_beside_others_in_the_layer_are_refused(groups, tmp_path, form, way):
    real, fake, train = groups
    made = borrowed(form(np.random.default_rng(0).poisson(5.0, real.shape).astype(np.float32)), real)
    if way == "record":
        made.uns["scld"] = {"scale": "counts"}
    made.write_h5ad(tmp_path / "made.h5ad")
    given = {"view": lambda: made[np.arange(made.n_obs)], "path": lambda: tmp_path / "made.h5ad", "backed": lambda: ad.read_h5ad(tmp_path / "made.h5ad", backed="r")}
    with pytest.raises(InputError, match=r"^synth.X and synth.layers\['counts'\] both hold counts and differ \(cell 'cell1-0', gene 'gene\d+': \d+ and \d+\): del synth.layers") as error:
        evaluate(real, given.get(way, lambda: made)(), train=train, **LITTLE)
    assert "\n" not in str(error.value)
    if way not in ("path", "backed"):
        with pytest.raises(InputError, match="^fake.X and fake.layers"):
            expression(made, name="fake")


def test_both_ways_to_mend_cells_whose_x_and_layer_differ(groups):
    real, fake, train = groups
    made = borrowed(fake.X[:60], real)
    mine, theirs = made.copy(), made.copy()
    del mine.layers["counts"]
    theirs.X = theirs.layers["counts"]
    assert evaluate(real, mine, train=train, **QUICK).records == evaluate(real, ad.AnnData(fake.X[:60], var=fake.var), train=train, **QUICK).records
    assert evaluate(real, theirs, train=train, **QUICK).records == evaluate(real, real, train=train, **QUICK).records
    assert (expression(made, layer="counts") != expression(real)).nnz == 0 and (expression(made, layer="X") != expression(fake[:60])).nnz == 0


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("make", [
    lambda x: x.copy(), lambda x: x.toarray(), lambda x: x.log1p(), library_normalize, lambda x: library_normalize(x, 1e6).rint(), lambda x: 3 * x, lambda x: 0 * x, lambda x: -x,
])
def test_what_is_made_of_the_layer_may_lie_in_x(groups, tmp_path, make, on_disk):
    real, fake, train = groups
    wanted = evaluate(real, fake, train=train, negative=False, spaces="log1p", **QUICK).records
    fake, real = fake.copy(), real.copy()
    for cells_ in (fake, real):
        cells_.layers["counts"] = cells_.X.copy()
        cells_.X = make(cells_.X)
    if on_disk:
        fake.write_h5ad(tmp_path / "fake.h5ad")
        fake = tmp_path / "fake.h5ad"
    assert evaluate(real, fake, train=train, negative=False, spaces="log1p", **QUICK).records == wanted


def test_real_cells_keep_the_counts_of_their_layer_whatever_x_holds(groups):
    real, fake, train = groups
    made = synthetic(fake)
    wanted = evaluate(real, made, train=train, negative=False, **QUICK).records
    other = [borrowed(np.ones(c.shape, np.float32), c) for c in (real, train)]
    assert evaluate(other[0], made, train=other[1], negative=False, **QUICK).records == wanted


def test_only_the_first_cells_are_looked_at(groups, monkeypatch):
    real, fake, _ = groups
    made = borrowed(fake.X[:60], real)
    made.X = sp.vstack([made.layers["counts"][:20], made.X[20:]]).tocsr()
    monkeypatch.setattr(controls, "_LOOKED_AT", 20)
    expression(made)
    monkeypatch.setattr(controls, "_LOOKED_AT", 21)
    with pytest.raises(InputError, match="cell 'cell1-20'"):
        expression(made)


def test_genes_in_another_case_are_no_missing_genes(groups):
    real, fake, _ = groups
    made = synthetic(fake)
    made.var_names = [g.upper() if i > 2 else g for i, g in enumerate(made.var_names)]
    with pytest.raises(InputError, match="^synth lacks 37 of 40 genes, 37 of which it has in another case .'GENE3' for 'gene3'.: rename them, case") as error:
        evaluate(real, made, **LITTLE)
    scope = {"real": real, "synth": made}
    exec(str(error.value).split("rename them, ")[1], scope)    # the mend is true
    assert list(made.var_names) == list(real.var_names)
    evaluate(real, made, **LITTLE)


def test_genes_may_be_one_name():
    some = cells(5, genes=12)
    assert expression(some, genes="gene11").shape == (5, 1)
    assert (expression(some, genes="gene11") != expression(some, genes=["gene11"])).nnz == 0
    with pytest.raises(InputError, match=r"none of the genes \('gene'"):
        expression(some, genes="gene")
    for numbers in ([0, 1], np.arange(2)):
        with pytest.raises(InputError, match=r"genes are found by their names, got .*0.*: give texts"):
            expression(some, genes=numbers)


@pytest.mark.parametrize("given", [np.ones((3, 2)), sp.csr_matrix(np.ones((3, 2))), "cells.h5ad"])
def test_expression_takes_an_anndata(given):
    with pytest.raises(InputError, match=f"adata must be an AnnData, got {type(given).__name__}"):
        expression(given)


def test_unequal_groups_are_not_compared():
    a = np.random.default_rng(0).normal(size=(60, 8))
    for pair in ((a[:10], a[10:]), (a, a[:10])):
        for options in ({}, {"n_judge": 5}):
            with pytest.raises(InputError, match=r"real has \d\d cells and fake \d\d: subsample the larger"):
                compare(*pair, bandwidth=1.0, n_trees=5, **options)
    assert compare(a.tolist(), a.tolist(), bandwidth=1.0, n_trees=5) == compare(a, a, bandwidth=1.0, n_trees=5)


def test_a_value_that_is_not_there(report):
    with pytest.raises(KeyError, match="no rf_auc of cluster x in log1p"):
        report.value("rf_auc", cluster="x")
