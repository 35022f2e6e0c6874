"""Which cells stand in each row of the tables: how models are asked, not what they answer."""

from types import SimpleNamespace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from scld_nb import experiments as ex


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """A study whose models only write down what they are asked for."""
    study, calls = ex.Study(seeds=(0,), root=tmp_path, device="cpu", progress=False, sampling_steps=3, steps=4, n_trees=4, budget=2), []

    class Model:
        config, device, history = SimpleNamespace(keep=0.8, head="mse"), "cpu", {}

        def __init__(self, variant):
            self.variant = variant

        def sample(self, n, label=None, *, omega=0.0, keep=None, seed=0, sampling_steps=None, progress=None):
            calls.append((self.variant, label, omega, keep))
            obs = pd.DataFrame({"score": np.arange(n) / n}, index=[str(i) for i in range(n)])
            return ad.AnnData(sp.csr_matrix(study.train.layers["counts"][np.arange(n) % study.train.n_obs]), obs=obs, var=study.train.var[[]])

    judged = []
    monkeypatch.setattr(study, "model", lambda variant, seed: Model(variant))
    monkeypatch.setattr(study, "judge", lambda cells, seed, method: judged.append((method, cells.n_obs)) or [])
    monkeypatch.setattr(study, "judge_cluster", lambda cells, number, label, seed: judged.append((number, cells.obs["score"].min())) or [{"space": "log1p"}])
    monkeypatch.setattr(ex, "_scld_cost", lambda *a: {})
    return study, calls, judged


@pytest.mark.parametrize(("method", "call"), [
    ("scld", ("none", None, -1, 1)), ("scld_post", ("none", None, -1, 1)), ("scld_pre", ("add", None, -1, 1)), ("scld_both", ("add", None, -1, 1)),
    ("scld_pre_matched", ("add", None, 0.0, 1)), ("scld_both_matched", ("add", None, 0.0, None)), ("scld_counts", ("counts", None, 0.0, 1)),
    ("scld_counts_post", ("counts", None, 0.0, None))])
def test_how_the_cells_of_each_row_of_table_3_are_drawn(asked, method, call):
    study, calls, _ = asked
    ex.table3(study, methods=[method])
    assert calls == [call]


def test_tables_4_and_5_draw_holistic_cells_and_cells_of_a_label(asked):
    study, calls, judged = asked
    ex.table4(study, fusions=["cat", "attn"])
    assert calls == [("cat", None, -1, 1), ("attn", None, -1, 1)]
    calls.clear(), judged.clear()
    ex.table5(study, methods=["scld_pre", "scld_both"])
    assert calls == [("add", label, 0, 1) for label, _ in study.clusters().values()]     # one pool for both rows
    plain, best = judged[:len(judged) // 2], judged[len(judged) // 2:]
    assert all(a[1] == 0 < b[1] for a, b in zip(plain, best))                          # the row with the Scorer has lost its worst


def test_figure_5_asks_for_one_label_at_each_omega(asked):
    study, calls, _ = asked
    ex.figure5(study)
    assert calls == [("add", "4", omega, 1) for omega in ex.OMEGAS]


def test_genes_of_the_gene_space_are_chosen_on_training_cells(asked, monkeypatch):
    study, seen = asked[0], []
    monkeypatch.setattr(ex, "variable_genes_of", lambda x, n: seen.append((x.shape[0], n)) or np.arange(3))
    study._variable_columns()
    assert seen == [(study.train.n_obs, 1000)]


def test_a_reconstruction_is_judged_as_a_twin(tmp_path, monkeypatch):
    study, seen = ex.Study(seeds=(0,), root=tmp_path, device="cpu", progress=False, n_trees=4), {}
    monkeypatch.setattr(ex, "evaluate", lambda *a, paired, method, **o: seen.update({method: paired}) or SimpleNamespace(records=[]))
    monkeypatch.setattr(study, "controls", lambda seed: {})
    monkeypatch.setattr(study, "gene_control", lambda seed: 0.5)
    monkeypatch.setattr(study, "gene_space", lambda cells, seed, *, paired: seen.update(genes=paired) or 0.5)
    for method in ("scld", "reconstruction"):
        study.judge(study.test, 0, method)
    assert seen == {"scld": False, "reconstruction": True, "genes": True}


def test_both_stages_count_in_what_is_cut(cells):
    history = {"autoencoder": {"steps": 30_000, "seconds": 1.0}, "denoiser": {"steps": 20_000, "seconds": 1.0}}
    model = SimpleNamespace(history=history, config=SimpleNamespace(head="mse", keep=0.8))
    assert ex._scld_cost(model, False)["cut"] == ""
    history["autoencoder"]["steps"] = 5
    assert ex._scld_cost(model, False)["cut"] == "20,005 of 40,000 steps"
