"""Everything that can be wrong with cells, at every door: one clear line with the mend, or the sensible thing, said; nothing is left behind."""

import shlex
import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
from conftest import TINY, planted_cells

from scld_nb import data
from scld_nb.cli import main
from scld_nb.data import InputError
from scld_nb.evaluation import evaluate
from scld_nb.experiments import Study
from scld_nb.model import SCLD

KEY = "cell_type"
SETTINGS = " ".join(f"--set {k}={','.join(map(str, v)) if isinstance(v, tuple) else v}" for k, v in TINY.items())


def replaced(value):
    def change(cells: ad.AnnData) -> None:
        x = cells.X.toarray().astype(np.float64)
        x[0, 0] = value
        cells.X = sp.csr_matrix(x)

    return change


def labels(change):
    def out(cells: ad.AnnData) -> None:
        column = cells.obs[KEY].astype(object).copy()
        change(column)
        cells.obs[KEY] = column

    return out


def repeated(cells: ad.AnnData) -> None:
    cells.var_names = [cells.var_names[0], *cells.var_names[:-1]]


def emptied(rows=slice(None), columns=slice(None)):
    def change(cells: ad.AnnData) -> None:
        x = cells.X.toarray()
        x[rows, columns] = 0
        cells.X = sp.csr_matrix(x)

    return change


# what is wrong: (how to make it, what is said at every door)
REFUSED = {
    "NaN": (replaced(np.nan), "holds NaN or infinite values; put raw counts there"),
    "infinite": (replaced(np.inf), "holds NaN or infinite values; put raw counts there"),
    "negative": (replaced(-1.0), "holds negative values (least -1): it looks scaled, not counts; put raw counts there"),
    "not whole": (replaced(0.5), "holds non-integer values (e.g. 0.5"),
    "no cells": (lambda cells: cells[:0].copy(), "is empty (0 cells x 60 genes); give cells x genes counts"),
    "no genes": (lambda cells: cells[:, :0].copy(), "is empty (300 cells x 0 genes); give cells x genes counts"),
    "gene names repeat": (repeated, "var_names_make_unique()"),
    "a label is missing": (labels(lambda column: column.__setitem__(0, np.nan)), "has 1 cells without a label"),
    "no column of labels": (lambda cells: cells.obs.drop(columns=KEY, inplace=True), f"no column {KEY!r}"),
}


@pytest.fixture(scope="module")
def good() -> ad.AnnData:
    return planted_cells()


def wrong(good: ad.AnnData, change) -> ad.AnnData:
    cells = good.copy()
    return cells if (out := change(cells)) is None else out


def one_line(error) -> str:
    text = str(error.value)
    assert isinstance(error.value, InputError) and "\n" not in text and len(text) < 400
    return text


@pytest.fixture
def told(tmp_path, monkeypatch, capsys):
    """Run a command that must be refused: its one line; and nothing but the input may be there afterwards."""
    monkeypatch.chdir(tmp_path)

    def run(line: str) -> str:
        before = sorted(Path().rglob("*"))
        capsys.readouterr()
        assert main(shlex.split(line)) == 2
        err = capsys.readouterr().err
        own = [text for text in err.splitlines() if not text.startswith("scld: note: ")]
        assert len(own) == 1 and own[0].startswith("scld: error: ") and "Traceback" not in err, err
        assert sorted(Path().rglob("*")) == before
        return own[0]

    return run


@pytest.mark.parametrize("what", REFUSED)
def test_cells_that_are_refused_at_every_door(what, good, tmp_path, told):
    change, message = REFUSED[what]
    cells = wrong(good, change)
    with pytest.raises(InputError) as error:
        SCLD(cells, KEY, device="cpu", **TINY)
    assert message in one_line(error)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                       # anndata on names that repeat
        cells.write_h5ad(tmp_path / "wrong.h5ad")
    file = tmp_path / "wrong.h5ad"
    for door in (lambda: data.load(file, labels=KEY), lambda: SCLD(file, KEY, device="cpu", **TINY), lambda: Study(str(file), labels=KEY)):
        with pytest.raises(InputError) as error:
            door()
        assert message in one_line(error)
    for line in ("train wrong.h5ad", "train wrong.h5ad --backed"):
        assert message in told(f"{line} -o model --labels {KEY} --device cpu {SETTINGS}")


@pytest.mark.parametrize("what", REFUSED)
def test_cells_that_are_not_compared(what, good):
    bad = wrong(good, REFUSED[what][0])
    for side, cells in (("real", (bad, good)), ("synth", (good, bad))):
        with pytest.raises(InputError) as error:
            evaluate(*cells, train=good, labels_key=KEY, n_trees=3, progress=False)
        text = one_line(error)
        assert text.startswith((f"{side}: ", f"{side} ", f"{side}.")) or "only 0 cells a side" in text or "X is empty" in text, text


@pytest.mark.parametrize("content, why", [(None, "no such file"), (b"hello", "cannot read"), (b"", "cannot read"), ("cut", "cannot read")])
def test_files_that_are_none(content, why, good, tmp_path, told):
    file = tmp_path / "cells.h5ad"
    if content == "cut":
        good.write_h5ad(file)
        content = file.read_bytes()[:6000]
    if content is not None:
        file.write_bytes(content)
    for door in (lambda: data.load(file, labels=KEY), lambda: SCLD(file, KEY, device="cpu"), lambda: Study(str(file), labels=KEY)):
        with pytest.raises(InputError) as error:
            door()
        assert why in one_line(error) and "cells.h5ad" in one_line(error)
    for line in ("train cells.h5ad -o model", "train cells.h5ad --backed -o model", "evaluate cells.h5ad cells.h5ad"):
        assert why in told(f"{line} --labels {KEY}")


def train(cells: ad.AnnData, **settings) -> tuple[SCLD, list[str]]:
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        model = SCLD(cells, KEY, device="cpu", **TINY | settings).train(2, ae_steps=2, progress=False)
    return model, [str(w.message) for w in heard if issubclass(w.category, UserWarning)]


@pytest.mark.parametrize("change, note", [
    (labels(lambda column: column.__setitem__(0, "single")), "'single' (1)"),
    (labels(lambda column: column.__setitem__(slice(None), "same")), "all cells have one label"),
    (lambda cells: cells[:40].copy(), "40 cells are fewer than a batch of 64"),
])
def test_little_is_enough_and_is_said(change, note, good):
    model, heard = train(wrong(good, change))
    assert any(note in text for text in heard), heard
    assert model.sample(7, progress=False, seed=0).n_obs == 7


def test_nothing_is_said_of_ordinary_cells(good):
    assert train(good)[1] == []


def test_too_few_cells_for_the_scorer_are_found_before_training(good, monkeypatch):
    monkeypatch.setattr("scld_nb.model.train_autoencoder", lambda *a, **k: pytest.fail("trained before it was checked"))
    with pytest.raises(InputError, match="at least 10 training cells, got 9; give more, or pass scorer=False"):
        SCLD(good[:9].copy(), KEY, device="cpu", **TINY).train(2, ae_steps=2, progress=False)


def test_empty_cells_are_refused_by_the_model_and_left_out_by_the_reader(good, tmp_path):
    cells = wrong(good, emptied(rows=slice(0, 3)))
    with pytest.raises(InputError, match="3 cells without a single count.*remove them"):
        SCLD(cells, KEY, device="cpu", **TINY)
    cells.write_h5ad(tmp_path / "cells.h5ad")
    with pytest.warns(UserWarning, match="of 300 cells are left out"):
        read = data.load(tmp_path / "cells.h5ad", labels=KEY)
    assert read.n_obs <= 297 and np.asarray(read.layers["counts"].sum(1)).min() > 0


def test_genes_never_seen_stay_unseen(good):
    model, _ = train(wrong(good, emptied(columns=slice(0, 3))), head="zinb")
    drawn = model.sample(20, progress=False, seed=0)
    assert list(drawn.var_names) == list(good.var_names) and np.isfinite(drawn.X.data).all()


def test_fewer_genes_than_components(good):
    few = good[:, :8].copy()
    few = few[np.asarray(few.X.sum(1)).ravel() > 0].copy()
    half = few.n_obs // 2
    report = evaluate(few[:half].copy(), few[half:].copy(), n_trees=5, suite=True, progress=False)
    assert 0 <= report.value("rf_auc") <= 1 and np.isfinite(report.value("coverage"))


def test_genes_in_another_order_or_missing(good, tiny_model):
    straight = tiny_model.get_latent_representation(good)
    assert np.allclose(tiny_model.get_latent_representation(good[:, ::-1]), straight, atol=1e-5)
    with pytest.raises(InputError, match="2 of the model's 60 genes are missing in adata, e.g. gene0, gene1; pass cells with the same genes"):
        tiny_model.get_latent_representation(good[:, 2:])


ASKED = [
    ({"n": 0}, "n must be a whole number of at least 1, got 0"), ({"n": -3}, "got -3"), ({"n": 2.5}, "got 2.5"), ({"n": "5"}, "got '5'"),
    ({"label": "Z"}, "unknown label 'Z'; known: B, NK, T"), ({"omega": 3.1}, "omega must lie in"), ({"omega": float("nan")}, "omega must lie in"),
    ({"keep": 0}, "keep must lie in"), ({"sampling_steps": 0}, "sampling_steps must be"), ({"sampling_steps": 10**6}, "sampling_steps must lie in"),
    ({"sampler": "euler"}, "unknown sampler 'euler'; known: ddpm"), ({"seed": -1}, "seed must be"), ({"batch_size": 0}, "batch_size must be"),
]


@pytest.mark.parametrize("asked, message", ASKED)
def test_requests_that_are_refused(asked, message, tiny_model):
    with pytest.raises(InputError) as error:
        tiny_model.sample(**{"n": 5, "progress": False} | asked)
    assert message in one_line(error)


def test_a_folder_that_cannot_be_written(good, tmp_path, told):
    good.write_h5ad(tmp_path / "cells.h5ad")
    (tmp_path / "file").write_text("in the way")
    for line in ("train cells.h5ad -o file/model", "train cells.h5ad -o file", "evaluate cells.h5ad cells.h5ad -o file/report"):
        assert "file" in told(f"{line} --labels {KEY}")
