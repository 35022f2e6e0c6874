"""Which cells stand in each row of the tables: how models are asked, not what they answer."""

from types import SimpleNamespace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from conftest import planted_cells

from scld_nb import experiments as ex
from scld_nb import study as st
from scld_nb.data import InputError


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


def test_table_5_refuses_a_method_it_does_not_have(asked):
    study, calls, judged = asked
    for name in ("scld_bth", "scld", "scgan"):
        with pytest.raises(InputError, match=f"^unknown method '{name}'; known: cscgan, .*, scld_pre, scld_both$"):
            ex.table5(study, methods=["scld_pre", name])
    assert not calls and not judged


def test_figure_4_refuses_a_method_it_does_not_have(asked):
    study, calls, _ = asked
    with pytest.raises(InputError, match="^unknown method 'scld_both'; known: .*scld.*$"):
        ex.figure4(study, methods=["scld", "scld_both"])
    assert not calls


def test_figure_5_asks_for_one_label_at_each_omega(asked):
    study, calls, _ = asked
    ex.figure5(study)
    assert calls == [("add", "4", omega, 1) for omega in ex.OMEGAS]


def test_genes_of_the_gene_space_are_chosen_on_training_cells(asked, monkeypatch):
    study, seen = asked[0], []
    monkeypatch.setattr(st, "variable_genes_of", lambda x, n: seen.append((x.shape[0], n)) or np.arange(3))
    _ = study._judge.columns
    assert seen == [(study.train.n_obs, 1000)]


def test_a_reconstruction_is_judged_as_a_twin(tmp_path, monkeypatch):
    study, seen = ex.Study(seeds=(0,), root=tmp_path, device="cpu", progress=False, n_trees=4), {}
    monkeypatch.setattr(st, "evaluate", lambda *a, paired, method, **o: seen.update({method: paired}) or SimpleNamespace(records=[]))
    monkeypatch.setattr(study._judge, "controls", lambda seed: {})
    monkeypatch.setattr(study._judge, "gene_control", lambda seed: 0.5)
    monkeypatch.setattr(study._judge, "gene_space", lambda cells, seed, *, paired: seen.update(genes=paired) or 0.5)
    for method in ("scld", "reconstruction"):
        study.judge(study.test, 0, method)
    assert seen == {"scld": False, "reconstruction": True, "genes": True}


def test_both_stages_count_in_what_is_cut(cells):
    history = {"autoencoder": {"steps": 30_000, "seconds": 1.0}, "denoiser": {"steps": 20_000, "seconds": 1.0}}
    model = SimpleNamespace(history=history, config=SimpleNamespace(head="mse", keep=0.8))
    assert ex._scld_cost(model, False)["cut"] == ""
    history["autoencoder"]["steps"] = 5
    assert ex._scld_cost(model, False)["cut"] == "20,005 of 40,000 steps"


def test_a_model_is_found_only_for_the_same_training(tmp_path):
    def found(*, seed=0, fingerprint="f", scorer=False, budget_s=None, steps=(5, 5), clock=None, kept=None):
        history = {"denoiser": {"steps": 5, "budget_s": clock}, "autoencoder": {"steps": 5}} | (kept or {})
        ex.write_json(tmp_path / "config.json", {"fingerprint": "f", "seed": 0, "history": history})
        return st._is_trained(tmp_path, SimpleNamespace(fingerprint=fingerprint, seed=seed), steps, scorer, budget_s)

    assert found() and not found(seed=1) and not found(fingerprint="g") and not found(steps=(5, 6)) and not found(steps=(6, 5))
    assert not found(scorer=True) and found(scorer=True, kept={"scorer": {}})
    assert found(budget_s=4, clock=2.0, steps=(9, 9)) and not found(budget_s=6, clock=2.0, steps=(9, 9))
    assert not found(budget_s=4, clock=2.0, steps=(4, 9)) and not found(clock=2.0)


def test_genes_of_a_study_are_chosen_on_training_cells_and_empty_cells_go():
    train, one, two = (planted_cells(200, 60, seed=s) for s in (1, 2, 3))
    kept = ex.variable_genes(train, one, 10)[0].var_names
    assert list(kept) == list(ex.variable_genes(train, two, 10)[0].var_names) != list(ex.variable_genes(two, train, 10)[0].var_names)
    alone = two.copy()
    alone.X = sp.csr_matrix(alone.X.toarray() * ~(np.isin(alone.var_names, kept)[None, :] & (np.arange(200) < 7)[:, None]))
    assert list(ex.variable_genes(train, alone, 10)[1].obs_names) == list(two.obs_names[7:])


@pytest.fixture
def small(tmp_path):
    return ex.Study(seeds=(0,), root=tmp_path, device="cpu", progress=False, n_trees=4, steps=4, budget=2)


def test_ten_test_cells_make_a_cluster(small):
    whole, is_one = small.test, (small.test.obs["louvain"].astype(str) == "1").to_numpy()
    for n, wanted in ((10, True), (9, False)):
        small.test = whole[np.sort(np.r_[np.flatnonzero(~is_one), np.flatnonzero(is_one)[:n]])]
        assert ("1" in small.clusters()) == wanted
    assert "2" in small.clusters()


def test_a_cluster_is_compared_with_training_cells_of_its_own(small):
    is_one = (small.train.obs["louvain"].astype(str) == "1").to_numpy()
    small.train = small.train[np.sort(np.r_[np.flatnonzero(~is_one), np.flatnonzero(is_one)[:8]])].copy()
    records = small.judge_cluster(small.test[small.test.obs["louvain"].astype(str) == "1"].copy(), "1", "1", 0)
    assert {(r["n"], r["control_n"]) for r in records} == {(24, 8)}


def test_the_control_in_gene_space_is_real_cells_against_other_real_cells(small):
    assert 0.3 < small.gene_control(0) < 0.7


def test_results_of_other_cells_genes_or_budgets_are_others(small, tmp_path):
    def settings(method="scld", **change):
        return ex.Study(seeds=(0,), root=tmp_path, device="cpu", progress=False, **({"n_trees": 4, "steps": 4, "budget": 2} | change)).settings(method)

    same = settings()
    assert same == small.settings() == settings(budget=3)
    assert all(settings(**change) != same for change in ({"n_max": 50}, {"n_genes": 100}, {"n_trees": 5}, {"steps": 5}, {"hidden": 16}, {"sampling_steps": 3}))
    assert settings("scgan") != settings("scgan", budget=3) and settings("scgan+scorer") != settings("scgan+scorer", budget=3)
    assert settings("scld_counts", steps=5) != settings("scld_counts")


def lines(values: dict, **more) -> pd.DataFrame:
    """Two seeds of AUC and MMD in both spaces: {method: {(metric, space): mean}}."""
    return pd.DataFrame([{"method": m, "seed": seed, "space": space, "metric": metric, "cluster": "all", "n": 50, "value": v + (seed - 0.5) * 0.002, "failed": "", "cut": ""} | more
                         for m, found in values.items() for (metric, space), v in found.items() for seed in (0, 1)])


def of_space(counts: float, logs: float) -> dict:
    return {(metric, space): v for metric in ex.HEAD for space, v in (("counts20k", counts), ("log1p", logs))}


def test_the_paper_is_compared_in_un_logged_space():
    table = ex.paper_beside(lines({"scld": {("rf_auc", "counts20k"): 0.68, ("rf_auc", "log1p"): 0.99, ("mmd_biased", "counts20k"): 0.82, ("mmd_biased", "log1p"): 2.0}}),
                            ex.METHODS, ex.PAPER_TABLE3, "brain_small")
    assert set(table.loc["SCLD", ["verdict AUC", "verdict MMD"]]) == {"reproduced within tolerance"}
    assert table.loc["SCLD", "AUC counts20k"] == "0.680 ± 0.001" and table.loc["SCLD", "MMD log1p"] == "2.000 ± 0.001"


def test_a_small_mmd_is_better_whatever_a_half_is():
    assert ex.verdict(0.2, 0.0, 0.6, metric="MMD") == "better" and ex.verdict(0.6, 0.0, 0.2, metric="MMD") == "worse"


def test_corners_of_the_ablation_are_the_four_versions():
    table = ex.ablation(lines({m: of_space(0.1 * i, 0.1 * i + 0.05) for i, m in enumerate(("scld", "scld_post", "scld_pre", "scld_both"))}))
    assert list(table["AUC log1p"].str[:5]) == ["0.050", "0.150", "0.250", "0.350"] and list(table["MMD counts20k"].str[:5]) == ["0.000", "0.100", "0.200", "0.300"]
    assert list(table.index) == [("without", "without"), ("without", "with"), ("with", "without"), ("with", "with")]


def test_mean_and_spread_over_the_seeds_there_are():
    assert ex.mean_sd(pd.Series([0.5, 0.6, np.nan])) == "0.550 ± 0.071" and ex.mean_sd(pd.Series([0.5])) == "0.500" and ex.mean_sd(pd.Series([np.nan])) == "–"


def test_notes_name_the_shortest_and_the_longest_training():
    found = pd.concat([lines({"scgan": of_space(0.9, 0.9)}).query("seed == @k").assign(cut=f"{n} of 1,000,000 steps") for k, n in ((0, "1,165"), (1, "148"))])
    assert ex.summarise(found, ex.METHODS).loc["SC-GAN", "note"] == "148 to 1,165 of 1,000,000 steps"


def test_figure_4_names_the_fastest_and_hatches_what_was_cut():
    found = pd.DataFrame([{"method": m, "seed": seed, "value": 9.0, "steps": steps, "steps_published": 100, "hours_published": hours}
                          for m, steps, hours in (("scld", 100, 2.0), ("scgan", 5, 1.0)) for seed in (0, 1)])
    assert "not reproduced: scgan trains fastest" in ex.figure4_table(found, "pbmc68k").loc["SCLD", "verdict"]
    assert "SCLD trains fastest" in ex.figure4_table(found.assign(hours_published=found["hours_published"].replace(2.0, 0.5)), "pbmc68k").loc["SCLD", "verdict"]
    assert [bar.get_hatch() for bar in ex.draw_figure4(found).axes[0].patches] == ["", "///"]


def test_the_paper_stands_in_the_un_logged_panels_unless_no_kernel_allows_it():
    figure = ex.draw_table3(lines({"splatter": of_space(1.0, 1.0), "scld": of_space(0.6, 0.6)}), "pbmc68k")
    paper = {axes.get_title(): list(next(line for line in axes.get_lines() if line.get_marker() == "D").get_xdata()) for axes in figure.axes}
    assert paper["AUC, counts20k"] == [1.0, 0.65] and np.isnan(paper["AUC, log1p"]).all() and np.isnan(paper["MMD, log1p"]).all()
    assert np.isnan(paper["MMD, counts20k"][0]) and paper["MMD, counts20k"][1] == 0.77


def test_figure_5_names_the_share_among_test_cells(asked):
    study = asked[0]
    found, panels = ex.figure5(study)
    assert np.allclose(found["share_in_test"], (study.test.obs["louvain"].astype(str) == "4").mean()) and list(found["n"]) == panels["counts"]


@pytest.mark.parametrize(("method", "best"), [("scld", False), ("scld_post", True), ("scld_pre", False), ("scld_both", True)])
def test_rows_with_the_scorer_have_lost_the_worst_of_a_larger_pool(asked, monkeypatch, method, best):
    study, seen = asked[0], []
    monkeypatch.setattr(study, "judge", lambda cells, seed, name: seen.append((cells.n_obs, cells.obs["score"].min() > 0)) or [])
    ex.table3(study, methods=[method])
    assert seen == [(study.n, best)]


def test_costs_are_those_of_the_model_that_drew_the_cells(asked, monkeypatch):
    study, seen = asked[0], {}
    for method in ("scld", "scld_post", "scld_pre", "scld_both", "scld_pre_matched", "scld_both_matched", "scld_counts", "scld_counts_post"):
        monkeypatch.setattr(ex, "_scld_cost", lambda model, post: seen.update({method: (model.variant, post)}) or {})
        ex.table3(study, methods=[method])
    assert seen == {"scld": ("none", False), "scld_post": ("none", True), "scld_pre": ("add", False), "scld_both": ("add", True),
                    "scld_pre_matched": ("add", False), "scld_both_matched": ("add", True), "scld_counts": ("counts", False), "scld_counts_post": ("counts", True)}


def test_competitors_rows_with_the_scorer_are_those_that_went_through_it(asked, monkeypatch):
    study, seen = asked[0], []
    monkeypatch.setattr(study, "draws", lambda name, seed: name)
    monkeypatch.setattr(ex, "competitor_cost", lambda drawn, post: seen.append((drawn, post)) or {})
    monkeypatch.setattr(ex, "remaining", lambda drawn, n, *, post, keep, label="": seen.append((drawn, post, label)) or study.model("add", 0).sample(n))
    ex.table3(study, methods=["scgan", "scgan+scorer"])
    assert seen == [("scgan", False, ""), ("scgan", False), ("scgan", True, ""), ("scgan", True)]
    seen.clear()
    ex.table5(study, methods=["cscgan", "cscgan+scorer"])
    labels = [label for label, _ in study.clusters().values()]
    assert seen == [part for post in (False, True) for part in [("cscgan", post), *(("cscgan", post, label) for label in labels)]]


def test_the_judge_of_figure_5_learned_from_training_cells(asked, monkeypatch):
    study, seen, original = asked[0], [], ex.label_classifier
    monkeypatch.setattr(ex, "label_classifier", lambda x, y, **o: seen.append((x.shape[0], len(y))) or original(x, y, **o))
    ex.figure5(study)
    assert seen == [(study.train.n_obs, study.train.n_obs)]


def test_fewer_genes_or_another_clock_have_folders_of_their_own(small, tmp_path):
    def folders(**change):
        study = ex.Study(seeds=(0,), root=tmp_path, device="cpu", progress=False, steps=4, **change)
        return study.models, study.drawn, study.path("table3", "scld", 0)

    for change in ({"n_genes": 100}, {"budget_s": 5}):
        assert all(a != b for a, b in zip(folders(), folders(**change)))


def test_fewer_test_cells_are_drawn_and_not_the_first(small, tmp_path):
    few = ex.Study(seeds=(0,), root=tmp_path, device="cpu", progress=False, n_max=50).test
    assert few.n_obs == 50 and set(few.obs_names) <= set(small.test.obs_names) and list(few.obs_names) != list(small.test.obs_names[:50])


def test_table_5_has_the_control_of_each_seed_once_and_is_compared_un_logged():
    rows = [{"method": m, "seed": seed, "space": space, "metric": "rf_auc", "cluster": "1", "n": 24, "value": value if space == "counts20k" else 0.99,
             "control": 0.4 + 0.2 * seed, "failed": "", "cut": "", "missing": ""} for m, value in (("cscgan", 0.82), ("scld_both", 0.6))
            for seed in (0, 1) for space in ex.SPACES]
    table = ex.table5_beside(pd.DataFrame(rows), "pbmc68k")
    assert table.loc["Positive (real against real)", "cluster 1 counts20k"] == "0.500 ± 0.141"
    assert table.loc["cscGAN", "verdict"] == "1: reproduced within tolerance" and table.loc["SCLD ‡", "verdict"] == "1: better"


def test_panels_of_figure_5_belong_to_their_omegas(asked):
    study = asked[0]
    two = ex.figure5(study, omegas=(0.0, 2.0))
    five = ex.figure5(study)
    assert two[1]["omegas"] == sorted(set(two[0]["omega"])) == [0.0, 2.0] and five[1]["omegas"] == sorted(set(five[0]["omega"])) == list(ex.OMEGAS)
    for omegas in ((), (-1, -0.5, 0, 1, 2, 3)):
        with pytest.raises(InputError, match="omegas must be 1 to 5"):
            ex.figure5(study, omegas=omegas)


def test_a_method_given_twice_counts_once():
    assert ex.choose("methods", "scld, scld,random", ["random", "scld"]) == ["scld", "random"]
    with pytest.raises(InputError, match="unknown budget"):
        ex.read_budget("²")


@pytest.mark.parametrize("wrong", [{"n_trees": -1}, {"steps": 2.5}, {"n_max": -5}, {"n_genes": "100"}])
def test_numbers_of_a_study_are_whole(wrong, tmp_path):
    with pytest.raises(InputError, match=f"{next(iter(wrong))} must be a whole number"):
        ex.Study(root=tmp_path, **wrong)
