"""A researcher's own method among the competitors: registered, judged, refused in one line, and never shown with rows of other settings."""

import json
import re
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from conftest import planted_cells

from scld_nb import baselines
from scld_nb import experiments as ex
from scld_nb import study as st
from scld_nb.baselines import BASELINES, compete, model_space, settings_now
from scld_nb.baselines.base import Baseline
from scld_nb.baselines.random import RandomBaseline
from scld_nb.data import InputError
from scld_nb.plan import calibrate, plan

ROOT = Path(__file__).parent.parent
TOY = {"seeds": (0,), "T": 12, "widths": (16, 8), "hidden": 16, "latent": 16, "e_width": 16, "steps": 4, "n_trees": 8, "sampling_steps": 3, "budget": 3,
       "device": "cpu", "progress": False}


class Blurred(Baseline):
    """Training cells, moved towards their mean by a share that a test may change."""

    name, scale, share = "blurred", "counts", 0.0

    def settings(self):
        return super().settings() | {"share": self.share}

    def _learn(self, counts):
        self.cells = counts

    def _draw(self, n, code, seed):
        rng = np.random.default_rng(seed)
        pool = np.arange(self.cells.shape[0]) if code is None else np.flatnonzero(self.codes == code)
        x = self.cells[rng.choice(pool, n)].toarray()
        return rng.poisson((1 - self.share) * x + self.share * x.mean(0))


class Trained(Blurred):
    """The same after seven steps of nothing."""

    name, trains = "trained", True

    def steps_published(self, n_cells):
        return 7

    def _learn(self, counts):
        super()._learn(counts)
        for step in self._training_steps(counts.shape[0]):
            self._note_loss(step, loss=0.0)


@pytest.fixture
def register():
    """`register_baseline`, undone after the test."""
    before = set(st._REGISTERED)
    yield ex.register_baseline
    for name in st._REGISTERED - before:
        ex.unregister_baseline(name)


def toy(root, **changes):
    return ex.Study(root=root, **(TOY | changes))


def areas(lines, method):
    """Area under the curve of a row in log space."""
    return lines[(lines["method"] == method) & (lines["metric"] == "rf_auc") & (lines["space"] == "log1p")]["value"].tolist()


@pytest.mark.parametrize("experiment", ["table3", "table5", "figure4"])
def test_a_row_of_other_settings_is_made_again(register, tmp_path, monkeypatch, experiment):
    register(Trained, "Trained", table5=True, figure4=True)
    make = {"table3": lambda s: ex.table3(s, methods=["trained", "trained+scorer"]), "table5": lambda s: ex.table5(s, methods=["trained", "trained+scorer"]),
            "figure4": lambda s: ex.figure4(s, methods=["trained"])}[experiment]
    asked = {"tables": [experiment[-1]] if experiment != "figure4" else [], "figures": ["4"] if experiment == "figure4" else [], "methods": ["trained", "trained+scorer"]}
    first = make(toy(tmp_path))
    again = toy(tmp_path)
    make(again)
    assert len(again.reused) == first["method"].nunique() and not again.done
    assert "train trained" not in plan(toy(tmp_path), **asked).index
    monkeypatch.setattr(Trained, "share", 1.0)
    listed = plan(toy(tmp_path), **asked)
    assert listed.loc["train trained", "runs to do"] == 1 and listed.loc[f"judge {experiment}", "runs to do"] >= first["method"].nunique()
    other = toy(tmp_path)
    second = make(other)
    assert not other.reused and len(other.done) == first["method"].nunique()
    if experiment == "table3":
        assert areas(second, "trained")[0] > areas(first, "trained")[0]
    assert json.loads(other.path(experiment, "trained", 0).read_text())["cost"]["settings"]["share"] == 1.0


def test_rows_that_noted_no_settings_and_those_that_are_kept_here_are_found(register, tmp_path):
    register(Blurred, "Blurred")
    study = toy(tmp_path)
    ex.table3(study, methods=["blurred"])
    path = study.path("table3", "blurred", 0)
    record = json.loads(path.read_text())
    for cost in ({}, None, {k: v for k, v in record["cost"].items() if k != "settings"}):
        path.write_text(json.dumps(record | {"cost": cost}))
        assert study.stored("table3", "blurred", 0)
    kept = [json.loads(p.read_text("utf-8")) for p in sorted((ROOT / "results" / "pancreas_endocrinogenesis" / "table3-60s").glob("*.json"))]
    files = st._ResultFiles(ROOT, "pancreas_endocrinogenesis", "-60s")
    found = [files.stored("table3", r["method"], r["seed"], labels_key=r["labels_key"], settings=r["settings"], own=settings_now(r["method"].removesuffix("+scorer")))
             for r in kept if r["method"].removesuffix("+scorer") in BASELINES]
    assert len(found) >= 42 and all(found)


def test_a_competitor_that_cannot_be_made_here_keeps_its_stored_rows(register, tmp_path, monkeypatch):
    register(Blurred, "Blurred")
    study = toy(tmp_path)
    ex.table3(study, methods=["blurred"])

    def missing(self):
        raise InputError("blurred needs its extra")

    monkeypatch.setattr(Blurred, "settings", missing)
    assert study.stored("table3", "blurred", 0) and settings_now("blurred") is None and study.has_draws("blurred", 0)


def test_log_expression_goes_to_the_scorer_as_it_is(cells):
    class Logs(RandomBaseline):
        name, scale = "logs", "log1p20k"

        def _draw(self, n, code, seed):
            return super()._draw(n, code, seed).log1p()

    linear, logged = (cls(seed=1).fit(cells).sample(30) for cls in (type("Linear", (RandomBaseline,), {"name": "logs"}), Logs))
    assert logged.uns["scld"] == {"scale": "log1p20k", "method": "logs", "target_sum": 20_000}
    assert np.allclose(model_space(logged).toarray(), model_space(linear).toarray(), rtol=1e-4)
    assert np.allclose(model_space(logged, "none").sum(1), 20_000, rtol=1e-4)
    with pytest.raises(InputError, match="is 'logs'; known: counts, counts20k, log1p20k"):
        model_space(ad.AnnData(logged.X, uns={"scld": {"scale": "logs"}}))
    with pytest.raises(InputError, match="blurred: the class has scale = 'log1p'; known: counts, counts20k, log1p20k"):
        type("Typo", (Blurred,), {"scale": "log1p"})()


def test_who_trains_says_so_and_goes_through_the_steps(cells):
    with pytest.raises(InputError, match="trained: the class Quiet trains by steps but does not say so; give it trains = True"):
        type("Quiet", (Trained,), {"trains": False})(steps=3).fit(cells)
    with pytest.raises(InputError, match="blurred: the class Loud has trains = True, but _learn does not go through self._training_steps"):
        type("Loud", (Blurred,), {"trains": True})(device="cpu").fit(cells)

    class Early(Trained):
        def _learn(self, counts):
            Blurred._learn(self, counts)
            for step in self._training_steps(counts.shape[0]):
                if step == 2:
                    break

    assert Early(device="cpu").fit(cells).history["steps"] == 2


WRONG = {
    "DataFrame": (lambda x: pd.DataFrame(x), "_draw returned DataFrame; let it return numbers as a numpy array or scipy sparse matrix"),
    "Tensor": (lambda x: torch.from_numpy(x), "_draw returned Tensor"),
    "nothing": (lambda x: None, "_draw returned NoneType"),
    "texts": (lambda x: x.astype(str), "_draw returned ndarray of <U"),
    "genes": (lambda x: x[:, 1:], r"_draw returned shape \(4, 59\); 4 cells of 60 genes were asked for"),
    "cells": (lambda x: np.vstack([x, x]), r"_draw returned shape \(8, 60\)"),
    "transposed": (lambda x: sp.csc_matrix(x.T), r"_draw returned shape \(60, 4\)"),
    "one cell": (lambda x: x[0], r"_draw returned shape \(60,\)"),
    "not finite": (lambda x: np.where(x == x.max(), np.inf, x), "of 240 values that _draw returned are not finite"),
    "negative": (lambda x: x - 1, "of 240 values that _draw returned are negative"),
    "fractions": (lambda x: x + 0.5, "240 of 240 values that _draw returned are not whole, while its scale is 'counts'"),
}


@pytest.mark.parametrize("slip", WRONG)
def test_what_is_no_cells_is_said_by_the_name_of_the_method(cells, slip):
    change, message = WRONG[slip]
    cls = type("Slip", (Blurred,), {"_draw": lambda self, n, code, seed: change(Blurred._draw(self, n, code, seed).astype(float))})
    with pytest.raises(InputError, match=f"^blurred: .*{message}") as caught:
        cls().fit(cells).sample(4)
    assert "\n" not in str(caught.value)


def test_counts_are_no_logarithms_and_all_kinds_of_numbers_are_taken(cells):
    def drawn(scale, change):
        return type("As", (Blurred,), {"scale": scale, "_draw": lambda self, n, code, seed: change(Blurred._draw(self, n, code, seed))})().fit(cells).sample(4)

    with pytest.raises(InputError, match="are above 19.8, while its scale is 'log1p20k'"):
        drawn("log1p20k", lambda x: x + 20)
    same = drawn("counts", np.asarray).X.toarray()
    for change in (sp.csr_matrix, sp.coo_array, np.asmatrix, lambda x: x.astype(np.float64)):
        assert (drawn("counts", change).X.toarray() == same).all()


@pytest.mark.parametrize("n", [2.5, "3", None, True, 0, -1])
def test_numbers_of_cells_are_whole(cells, n):
    fitted = Blurred().fit(cells)
    with pytest.raises(InputError, match="n must be a whole number of at least 1"):
        fitted.sample(n)
    assert fitted.sample(np.int64(4)).n_obs == fitted.sample(4.0).n_obs == 4


def test_any_error_of_a_competitor_is_its_row_and_ctrl_c_is_not(register, tmp_path, monkeypatch, capsys):
    register(Blurred, "Blurred")
    said = {}
    for error in (ValueError("singular\nmatrix"), np.linalg.LinAlgError("no inverse"), KeyError("k"), MemoryError(), InputError("too few cells")):
        def fail(self, counts, error=error):
            raise error

        monkeypatch.setattr(Blurred, "_learn", fail)
        lines = ex.table3(toy(tmp_path), methods=["positive", "blurred"])
        said[type(error).__name__] = lines[lines["method"] == "blurred"]["failed"].iloc[0]
        assert lines[lines["method"] == "positive"]["value"].notna().all()
    assert said == {"ValueError": "ValueError: singular matrix", "LinAlgError": "LinAlgError: no inverse", "KeyError": "KeyError: 'k'", "MemoryError": "out of memory",
                    "InputError": "too few cells"}
    assert capsys.readouterr().err.count("Traceback") == 3                # for whoever has to mend it; refusals need none
    assert "blurred" not in calibrate(toy(tmp_path), ["blurred"], seconds=0.3)

    def stop(self, counts):
        raise KeyboardInterrupt

    monkeypatch.setattr(Blurred, "_learn", stop)
    with pytest.raises(KeyboardInterrupt):
        ex.table3(toy(tmp_path), methods=["blurred"])


def test_errors_of_scld_itself_are_no_row(tmp_path, monkeypatch):
    def broken(*args, **options):
        raise ValueError("gone")

    monkeypatch.setattr(ex._CellsOfRows, "of", broken)
    with pytest.raises(ValueError, match="gone"):
        ex.table3(toy(tmp_path), methods=["scld"])


def test_an_error_for_one_label_leaves_the_others(register, cells, tmp_path):
    class Partly(Blurred):
        name = "partly"

        def _draw(self, n, code, seed):
            if code == 2:
                raise ZeroDivisionError("no such cells")
            return super()._draw(n, code, seed)

    register(Partly, "Partly")
    drawn = compete("partly", cells, "cell_type", tmp_path / "p.h5ad", n=20, clusters={"T": 5, "NK": 5}, device="cpu", progress=False)
    assert baselines.remaining(drawn, 5, label="NK").n_obs == 5
    with pytest.raises(InputError, match="ZeroDivisionError: no such cells"):
        baselines.remaining(drawn, 5, label="T")


def test_a_method_without_training_steps_is_named_in_figure_4(register, tmp_path, monkeypatch):
    register(Blurred, "Blurred")
    monkeypatch.setitem(st.FIGURE4_METHODS, "blurred", "Blurred")            # as one would have to, past register_baseline
    lines = ex.figure4(toy(tmp_path), methods=["scld", "blurred"])
    assert "blurred went through no training steps" in lines[lines["method"] == "blurred"]["failed"].iloc[0]
    assert list(ex.figure4_table(lines, "mine").index) == ["SCLD"] and len(ex.draw_figure4(lines).axes[0].patches) == 1


@pytest.mark.parametrize("kind", ["cells", "text", "other"])
def test_a_file_of_something_else_is_left_alone(cells, tmp_path, kind):
    path = tmp_path / "mine.h5ad"
    if kind == "text":
        path.write_text("not HDF5")
    else:
        ad.AnnData(cells.X, uns={} if kind == "cells" else {"competitor": {"settings": 1}}).write_h5ad(path)
    before = path.read_bytes()
    with pytest.raises(InputError, match=re.escape(f"{path} holds no cells that compete() drew; move it away, or give another path")):
        compete("random", cells, "cell_type", path, n=10, device="cpu", progress=False)
    assert path.read_bytes() == before


def test_a_registered_method_is_in_every_table_and_the_plan(register, tmp_path):
    before = [list(rows) for rows in (BASELINES, st.TITLES, st.METHODS, st.TABLE5_METHODS, st.FIGURE4_METHODS)]
    register(Trained, "Mine", table5=True, figure4=True)
    register(Blurred, "Blurred")
    assert {"trained", "trained+scorer", "blurred", "blurred+scorer"} <= set(ex.default_methods()) and ex.METHODS is st.METHODS
    assert list(st.METHODS).index("trained") < list(st.METHODS).index("reconstruction") and "blurred" not in {*st.TABLE5_METHODS, *st.FIGURE4_METHODS}
    study, methods = toy(tmp_path), ["trained", "trained+scorer"]
    listed = plan(study, tables=["3", "5"], figures=["4"], methods=methods, speed={"trained": 2.0, "autoencoder": 1, "denoiser": 1, "sampling": 1, "judge": 1})
    assert listed.loc["train trained", ["runs to do", "seconds each"]].tolist() == [1, 6.0] and listed.loc["judge table3", "runs to do"] == 2
    assert listed.loc["judge table5", "runs to do"] == len(st.TABLE5_METHODS) and listed.loc["judge figure4", "runs to do"] == len(st.FIGURE4_METHODS)
    table3 = ex.table3(study, methods=methods)
    assert list(ex.summarise(table3, ex.METHODS).index) == ["Mine", "Mine + Scorer"]
    assert set(ex.paper_beside(table3, ex.METHODS, ex.PAPER_TABLE3, "pbmc68k")["verdict AUC"]) == {"no figure in the paper"}
    assert {"Mine", "Mine + Scorer"} <= set(ex.table5_beside(ex.table5(study, methods=methods), study.name).index)
    assert list(ex.figure4_table(ex.figure4(study, methods=["trained"]), study.name).index) == ["Mine"]
    for name in ("trained", "blurred"):
        ex.unregister_baseline(name)
    assert [list(rows) for rows in (BASELINES, st.TITLES, st.METHODS, st.TABLE5_METHODS, st.FIGURE4_METHODS)] == before
    with pytest.raises(InputError, match="'scgan' was not registered; there are: none"):
        ex.unregister_baseline("scgan")


def test_the_row_behind_the_scorer_alone_asks_for_cells_of_clusters(register, tmp_path, monkeypatch):
    register(Blurred, "Blurred")
    monkeypatch.setitem(st.TABLE5_METHODS, "blurred+scorer", "Blurred + Scorer")
    lines = ex.table5(toy(tmp_path), methods=["blurred+scorer"])
    assert lines["value"].notna().all() and set(lines["failed"]) == {""}


def variant(**given):
    return type("Variant", (Blurred,), given)


@pytest.mark.parametrize("cls, title, options, message", [
    (dict, "Mine", {}, "a competitor is a class derived from scld_nb.baselines.base.Baseline, got <class 'dict'>"),
    (Blurred(), "Mine", {}, "a competitor is a class derived from"),
    (variant(name="scgan"), "Mine", {}, "the name 'scgan' is taken; give the class another"),
    (variant(name="scld"), "Mine", {}, "the name 'scld' is taken"),
    (variant(name="cat"), "Mine", {}, "the name 'cat' is taken"),
    (variant(name="baseline"), "Mine", {}, "the name 'baseline' is taken"),
    (variant(name="my/method"), "Mine", {}, "has name = 'my/method'; give it one of small letters, digits and _"),
    (variant(name="a+scorer"), "Mine", {}, "has name = 'a.scorer'; give it one"),
    (variant(name="a,b"), "Mine", {}, "has name = 'a,b'; give it one"),
    (variant(name=None), "Mine", {}, "has name = None; give it one"),
    (variant(name="b", scale="log"), "Mine", {}, "has scale = 'log'; known: counts, counts20k, log1p20k"),
    (variant(name="b", __init__=lambda self, k=3: None), "Mine", {}, "cannot be made with a seed and a budget .*write def __init__"),
    (type("Empty", (Baseline,), {"name": "empty"}), "Mine", {}, "must define _learn"),
    (variant(name="b"), "SC-GAN", {}, "the title 'SC-GAN' is taken"),
    (variant(name="b"), " ", {}, "the title must be a text"),
    (variant(name="b"), "SC-GAN + Scorer", {}, "the title must be a text"),
    (variant(name="b"), "Mine", {"figure4": True}, "has trains = False, and Figure 4 compares trainings"),
])
def test_what_cannot_be_registered_is_refused_and_leaves_nothing(cls, title, options, message):
    before = [dict(rows) for rows in (BASELINES, st.TITLES, st.METHODS, st.TABLE5_METHODS, st.FIGURE4_METHODS)]
    with pytest.raises(InputError, match=message) as caught:
        ex.register_baseline(cls, title, **options)
    assert "\n" not in str(caught.value)
    assert [dict(rows) for rows in (BASELINES, st.TITLES, st.METHODS, st.TABLE5_METHODS, st.FIGURE4_METHODS)] == before


def test_a_name_is_registered_once(register):
    register(Blurred, "Blurred")
    with pytest.raises(InputError, match="the name 'blurred' is taken; unregister_baseline takes it back"):
        register(Blurred, "Other")


def example() -> str:
    """The module that the tutorial shows."""
    cells = json.loads((ROOT / "nbs" / "tutorials" / "paper.ipynb").read_text("utf-8"))["cells"]
    return next(found[1] for c in cells if (found := re.search(r"```python\n(\"\"\"my_methods\.py.*?)```", "".join(c["source"]), re.S)))


@pytest.fixture
def module(tmp_path, monkeypatch, register):
    """The tutorial's module in a folder that Python finds; forgotten after the test."""
    (tmp_path / "my_methods.py").write_text(example())
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("my_methods", None)


def test_the_method_of_the_tutorial_goes_through_table_3_and_5(module, tmp_path):
    assert ex.load_plugins(" my_methods ,") == ["my_methods"] and len(example().splitlines()) < 40
    study, methods = toy(tmp_path), ["gaussian_pca", "gaussian_pca+scorer"]
    lines = ex.table3(study, methods=["positive", "random", *methods])
    assert set(lines["failed"]) == {""} and lines["value"].notna().all()
    assert areas(lines, "positive")[0] < areas(lines, "gaussian_pca")[0]
    assert set(ex.table5(study, methods=methods)["failed"]) == {""}
    assert json.loads(study.path("table3", "gaussian_pca", 0).read_text())["cost"]["settings"]["n_pcs"] == 20


@pytest.mark.parametrize("text, message", [
    (None, "plugins: the module 'no_such_module_here' cannot be imported .ModuleNotFoundError: No module named 'no_such_module_here'.; it must be installed or lie in /"),
    ("1 / 0", "plugins: the module 'broken_module' cannot be imported .ZeroDivisionError: division by zero."),
])
def test_a_module_that_cannot_be_imported_is_named(tmp_path, monkeypatch, text, message):
    monkeypatch.syspath_prepend(tmp_path)
    name = "no_such_module_here" if text is None else "broken_module"
    if text:
        (tmp_path / f"{name}.py").write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        ex.load_plugins(f"json,{name}")
    assert "\n" not in str(caught.value)


def test_all_names_of_the_study_come_with_a_star():
    names = {}
    exec("from scld_nb.experiments import *", names)
    assert set(st.__all__) <= set(names) and names["Study"] is st.Study and "table3" in names


def test_own_cells_and_types(tmp_path):
    """A file of one's own, where nothing is numbered as in the paper."""
    planted_cells(200, 40).write_h5ad(tmp_path / "own.h5ad")
    study = toy(tmp_path, dataset=str(tmp_path / "own.h5ad"), labels="cell_type")
    assert study.has_draws("random", 0) is False
    study.draws("random", 0)
    assert study.has_draws("random", 0)
