"""benchmarks/rare_type.py on planted cells: nothing leaks, exactly the cells asked for are added, and finished seeds are not repeated."""

import json
import re
import subprocess
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from conftest import benchmark_script, planted_cells
from scipy.stats import ranksums
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score

from scld_nb.data import InputError, preprocess, split

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "rare_type.py"
SMALL = {"T": 20, "beta_T": 0.6, "latent": 8, "hidden": 32, "widths": (32,), "e_width": 16, "batch_size": 64, "scorer_cells": 128}


@pytest.fixture(scope="module")
def script():
    module = benchmark_script("rare_type")
    module.N_TREES = 20
    return module


@pytest.fixture(scope="module")
def rare():
    """1,000 cells with 20 of the planted rare type "T"."""
    cells = preprocess(planted_cells(1000, shares=(0.6, 0.38, 0.02), seed=3))
    assert (cells.obs["cell_type"] == "T").sum() == 20
    return cells


@pytest.fixture(scope="module")
def seen(script, rare):
    """One whole seed, with a note of the cells that every fit was given."""
    fitted = []

    class Spy(script.SCLD):
        def __init__(self, adata, *args, **options):
            fitted.append(("SCLD", set(adata.obs_names)))
            super().__init__(adata, *args, **options)

    def genes(x, n):
        fitted.append(("genes", x.shape[0]))
        return variable(x, n)

    class Linear:
        """Stands in for scVI: scales every training cell of the label, and remembers which cells those were."""

        def __init__(self, *, seed, steps, progress):
            self.rng, self.history = np.random.default_rng(seed), {"steps": steps}

        def fit(self, adata, key):
            fitted.append(("scVI", set(adata.obs_names)))
            self.x, self.y = adata.layers["counts"], adata.obs[key].to_numpy()
            return self

        def sample(self, n, label):
            return ad.AnnData(self.x[self.rng.choice(np.flatnonzero(self.y == label), n)] * 2)

    variable = script.variable_genes
    with pytest.MonkeyPatch.context() as patch:
        for name, stand_in in (("SCLD", Spy), ("ScVI", Linear), ("variable_genes", genes)):
            patch.setattr(script, name, stand_in)
        found = script.run(rare, "cell_type", 4, steps=30, ae_steps=30, sampling_steps=5, scvi_steps=7, settings=SMALL)
    return found, fitted


def test_no_fit_sees_a_test_cell(seen, rare):
    found, fitted = seen
    train, test = split(rare, test_size=0.3, stratify="cell_type", seed=4)
    assert not set(train.obs_names) & set(test.obs_names) and train.n_obs + test.n_obs == rare.n_obs
    assert [name for name, _ in fitted] == ["SCLD", "scVI", "genes"]
    assert all(cells == set(train.obs_names) for name, cells in fitted if name != "genes") and fitted[2][1] == train.n_obs
    assert (found["n_train"], found["n_test"]) == (train.n_obs, test.n_obs) == (700, 300)
    assert (found["labels"]["T"]["n_train"], found["labels"]["T"]["n_test"], found["labels"]["T"]["n_added"]) == (14, 6, 140)


def test_other_test_counts_change_no_training_set(script, rare, monkeypatch):
    given = []

    def note(x, y, x_test, y_test, label, seed, *, weights=None):
        given.append((x.toarray(), y, weights))
        return {}

    monkeypatch.setattr(script, "classify", note)
    monkeypatch.setattr(script, "compare_markers", lambda *args: {})
    train, test = split(rare, test_size=0.3, stratify="cell_type", seed=1)
    other = rare.copy()
    rows = other.obs_names.get_indexer(test.obs_names)
    counts = other.layers["counts"].toarray()
    counts[rows] = np.random.default_rng(0).permuted(counts[rows], axis=1)
    other.layers["counts"] = sp.csr_matrix(counts)
    for cells in (rare, other):
        found = script.run(cells, "cell_type", 1, steps=2, ae_steps=2, sampling_steps=2, scvi_steps=2, settings=SMALL | {"scorer_cells": 64})
    half = len(given) // 2
    assert half == 6 + ("scvi" not in found["skipped"]) and len(given) == 2 * half
    for mine, theirs in zip(given[:half], given[half:], strict=True):
        assert np.array_equal(mine[0], theirs[0]) and np.array_equal(mine[1], theirs[1])
    sizes = [pd.Series(y).value_counts() for _, y, _ in given[:half]]
    assert [s["T"] for s in sizes] == [14, 154, 14] + [154] * (half - 3) and all(s["B"] == sizes[0]["B"] for s in sizes)
    assert [w for *_, w in given[:half]] == [None, None, "balanced"] + [None] * (half - 3)


def test_every_training_set_is_judged_and_markers_are_found(seen):
    rare_type = seen[0]["labels"]["T"]
    assert list(rare_type["scores"]) == ["real", "oversampled", "balanced", "scld", "scld_scorer", "scld_guided", "scvi"] and not seen[0]["skipped"]
    for scores in rare_type["scores"].values():
        for judge in ("logistic", "forest"):
            s = scores[judge]
            assert all(0 <= v <= 1 for v in s.values())
            assert s["f1"] == pytest.approx(2 * s["precision"] * s["recall"] / max(s["precision"] + s["recall"], 1e-12))
    assert list(rare_type["markers"]) == ["real", "scld", "scld_scorer", "scld_guided", "scvi"]
    assert rare_type["markers"]["real"]["pearson"] > 0.6 and all(0 <= m["overlap"] <= 20 for m in rare_type["markers"].values())
    assert seen[0]["steps"] == {"autoencoder": 30, "denoiser": 30, "scvi": 7} and seen[0]["provenance"]["packages"]["torch"]


def test_rare_labels_need_cells_on_both_sides_and_at_most_two_per_cent(script):
    def labels(**sizes):
        return np.repeat(list(sizes), list(sizes.values()))

    train = labels(big=660, edge=14, few_train=9, few_test=12, more=15)
    test = labels(big=270, edge=6, few_train=4, few_test=2, more=8)
    assert len(train) + len(test) == 1000
    assert script.rare_labels(train, test) == ["edge"]              # "more" has 23 cells, over 2 %
    assert script.rare_labels(labels(a=400, c=10, b=10), labels(a=567, c=3, b=10)) == ["c", "b"]
    assert script.rare_labels(labels(a=10, b=20), labels(a=3)) == []


def test_oversampling_adds_ten_times_the_rare_cells_and_nothing_else(script):
    x, y = sp.csr_matrix(np.arange(60.0).reshape(12, 5)), np.array(["a", "b", "b"] * 4, dtype=object)
    more, labels = script.oversample(x, y, "a", 0)
    assert more.shape == (12 + 40, 5) and (labels[12:] == "a").all() and (labels[:12] == y).all()
    assert np.array_equal(more[:12].toarray(), x.toarray())
    assert {tuple(row) for row in more[12:].toarray()} <= {tuple(row) for row in x[y == "a"].toarray()}
    assert np.array_equal(script.oversample(x, y, "a", 0)[0].toarray(), more.toarray())


def test_scores_are_those_of_scikit_learn(script, rare):
    train, test = split(rare, test_size=0.3, stratify="cell_type", seed=0)
    x, x_test = (script.log_normalised(part.layers["counts"]) for part in (train, test))
    y, y_test = (part.obs["cell_type"].astype(str).to_numpy(dtype=object) for part in (train, test))
    assert np.expm1(x.toarray()).sum(1) == pytest.approx(1e4, rel=1e-4)
    guess = LogisticRegression(max_iter=1000).fit(x.toarray(), y).predict(x_test.toarray())
    found = script.classify(x, y, x_test, y_test, "T", 0)["logistic"]
    hit, called, there = ((guess == "T") & (y_test == "T")).sum(), (guess == "T").sum(), (y_test == "T").sum()
    assert (found["precision"], found["recall"]) == (pytest.approx(hit / max(called, 1)), pytest.approx(hit / there))
    assert found["macro_f1"] == pytest.approx(np.mean([f1_score(y_test == t, guess == t) for t in ("B", "NK", "T")]))
    plain = script.classify(x, y, x_test, y_test, "T", 0, weights="balanced")
    numbers = {"B": "0", "NK": "10", "T": "9"}           # scikit-learn 1.9 stumbles over such names where classes are weighted
    y, y_test = (np.array([numbers[t] for t in v], dtype=object) for v in (y, y_test))
    assert script.classify(x, y, x_test, y_test, "9", 0, weights="balanced")["logistic"] == pytest.approx(plain["logistic"], abs=0.02)


def test_markers_and_fold_changes(script):
    rng = np.random.default_rng(0)
    mean = np.full((2, 40), 3.0)
    mean[0, [5, 9, 30]] = [30.0, 20.0, 12.0]
    rare, rest = (script.log_normalised(sp.csr_matrix(rng.poisson(m, (n, 40)))) for m, n in zip(mean, (30, 300)))
    assert set(script.top_markers(rare, rest, 3)) == {5, 9, 30}
    score = [ranksums(rare.toarray()[:, g], rest.toarray()[:, g]).statistic for g in range(40)]
    assert set(script.top_markers(rare, rest, 10)) == set(np.argsort(score)[-10:])
    inside, outside = (np.expm1(x.toarray()).mean(0) for x in (rare, rest))
    assert script.fold_changes(rare, rest) == pytest.approx(np.log2((1 + inside) / (1 + outside)), rel=1e-4)
    both, y = sp.vstack([rare, rest], format="csr"), np.repeat(["a", "b"], [30, 300])
    found = script.compare_markers(both, y, both, y, "a", {"copy": rare, "other": rest})
    assert found["real"] == found["copy"] == {"pearson": pytest.approx(1), "pearson_all_genes": pytest.approx(1), "overlap": 20}
    assert found["other"]["pearson_all_genes"] < 0.5


def record(seed: int, f1: float = 0.5, skipped: dict | None = None) -> dict:
    score = {judge: {"f1": f1 + seed, "precision": 0.25, "recall": 0.75, "macro_f1": 0.5} for judge in ("logistic", "forest")}
    marker = {"pearson": 0.9, "pearson_all_genes": 0.8, "overlap": 12}
    return {"seconds": 1.0, "skipped": skipped or {}, "labels": {"T": {"n_train": 14, "n_test": 6, "n_added": 140,
            "scores": dict.fromkeys(("real", "scld"), score), "markers": dict.fromkeys(("real", "scld"), marker)}}}


def test_finished_seeds_are_reused_unless_options_differ(script, tmp_path, rare, monkeypatch, capsys):
    source, ran = tmp_path / "planted.h5ad", []
    rare.write_h5ad(source)
    monkeypatch.setattr(script, "run", lambda cells, key, seed, **options: ran.append((key, seed, options["steps"])) or record(seed))
    line = [str(source), "--labels", "cell_type", "--output", str(tmp_path / "out"), "--seeds"]
    assert script.main([*line, "0", "1"]) == 0 and ran == [("cell_type", 0, None), ("cell_type", 1, None)]
    text = capsys.readouterr().out
    assert re.search(r"real cells only +1\.000 ± 0\.707 +0\.250 ± 0\.000", text) and "T: 14 training cells, 140 added, 6 test cells, 2 seeds" in text
    assert "oversampled" not in text                                # an arm that no file has is not made up
    assert script.main([*line, "1", "2"]) == 0 and ran[2:] == [("cell_type", 2, None)]
    assert script.main([*line, "2", "--steps", "9"]) == 0 and ran[3:] == [("cell_type", 2, 9)]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["seed0.json", "seed1.json", "seed2.json"]
    assert json.loads((tmp_path / "out" / "seed2.json").read_text())["asked"]["steps"] == 9


def test_a_seed_without_scvi_is_made_anew_once_it_is_installed(script, tmp_path, monkeypatch):
    file, skipped = tmp_path / "seed0.json", {"scvi": "scvi needs scvi-tools: pip install 'scld-nb[scvi]'"}
    assert not script.usable(file, {"a": 1})
    file.write_text(json.dumps(record(0, skipped=skipped) | {"asked": {"a": 1}}))
    for installed in (None, object()):
        monkeypatch.setattr(script.importlib.util, "find_spec", lambda name, found=installed: found)
        assert script.usable(file, {"a": 1}) == (installed is None) and not script.usable(file, {"a": 2})
    assert "scvi left out: scvi needs scvi-tools" in script.table([record(0, skipped=skipped)])


def test_wrong_input_is_one_line_and_status_2(script, tmp_path, rare, capsys):
    source = tmp_path / "planted.h5ad"
    rare.write_h5ad(source)
    line = [sys.executable, "-W", "ignore", SCRIPT, str(source), "--labels", "no_such", "--output", str(tmp_path / "out")]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == "" and not (tmp_path / "out").exists()
    assert len(done.stderr.splitlines()) == 1 and "no column 'no_such' in obs" in done.stderr
    common = rare[rare.obs["cell_type"] != "T"].copy()
    common.write_h5ad(source)
    assert script.main([str(source), "--labels", "cell_type", "--output", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert len(message.splitlines()) == 1 and "no label of 'cell_type' has at most 2%" in message
    with pytest.raises(InputError, match="at most 2%"):
        script.run(common, "cell_type", 0)
