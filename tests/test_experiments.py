"""The results store, the tables and Figure 5 on a tiny study, and the parameters of the front door."""
import json
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import planted_cells

from scld_nb import experiments as ex
from scld_nb import study as st
from scld_nb import training
from scld_nb.baselines.random import RandomBaseline
from scld_nb.data import InputError

TINY = {"T": 12, "widths": (16, 8), "hidden": 16, "latent": 16, "e_width": 16, "steps": 4, "n_trees": 8, "sampling_steps": None, "device": "cpu", "progress": False,
            "budget": 2}
ROWS = ["positive", "random", "random+scorer", "splatter_matched", "scgan", "scgan+scorer", "reconstruction", "scld", "scld_post", "scld_pre", "scld_both",
        "scld_pre_matched", "scld_both_matched", "scld_counts", "scld_counts_post"]
ROOT = Path(__file__).parent.parent


def make_study(root, **changes):
    return ex.Study(seeds=(0, 1), root=root, **{k: v for k, v in (TINY | changes).items() if v is not None} | {"sampling_steps": 3})


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return make_study(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def lines3(study):
    return ex.table3(study, methods=ROWS)


def test_every_row_of_table3_has_both_seeds_spaces_and_the_same_n(study, lines3):
    pooled = lines3[lines3["metric"].isin(["rf_auc", "mmd_biased"]) & (lines3["cluster"] == "all")]
    counted = pooled.groupby(["method", "seed", "space", "metric"]).size()
    assert len(counted) == len(ROWS) * 2 * (2 * 2 + 1) and (counted == 1).all()      # one more for the forest in gene space
    assert set(pooled["n"]) == {study.test.n_obs}


def test_shuffled_cells_are_told_apart_and_real_ones_are_not(lines3):
    auc = lines3[(lines3["metric"] == "rf_auc") & (lines3["space"] == "log1p")].groupby("method")["value"].mean()
    assert auc["random"] > 0.85 and abs(auc["positive"] - 0.5) < 0.12


def test_a_result_file_says_where_it_comes_from(study, lines3):
    record = json.loads((study.results / "table3" / "scld_both-seed1.json").read_text())
    assert record["format"] == 1 and record["seed"] == 1 and record["settings"]["data_sha256"] == study.sha256
    assert record["settings"]["steps"] == 4 and record["settings"]["options"]["T"] == 12
    assert {"commit", "dirty", "packages", "device", "peak_memory_gib"} <= set(record["provenance"])
    assert record["provenance"]["packages"]["torch"] and record["provenance"]["peak_memory_gib"] > 0.1
    assert record["cost"]["kept_share"] == 0.8 and record["cost"]["scorer"]["n_real"] == record["cost"]["scorer"]["n_fake"]


def test_finished_runs_are_reused_and_other_settings_are_not(study, lines3):
    again = make_study(study.root)
    pd.testing.assert_frame_equal(ex.table3(again, methods=ROWS), lines3)
    assert not again.done and len(again.reused) == 30
    assert "0 runs made now, 30 finished runs reused" in again.summary()
    other = make_study(study.root / "other", n_trees=9)
    copy = other.results / "table3" / "positive-seed0.json"
    copy.parent.mkdir(parents=True)
    copy.write_bytes((study.results / "table3" / "positive-seed0.json").read_bytes())
    ex.table3(other, methods=["positive"])
    assert len(other.done) == 2 and not other.reused
    assert not list(other.results.rglob("*.tmp"))


def test_a_result_for_other_labels_is_not_reused(tmp_path):
    study, calls = make_study(tmp_path), []
    make = lambda: calls.append(1) or {"records": []}
    study.run("demo", "x", 0, make)
    study.run("demo", "x", 0, make)
    assert len(calls) == 1
    study.labels_key = "bulk_labels"
    assert study.run("demo", "x", 0, make)["labels_key"] == "bulk_labels" and len(calls) == 2


def test_models_are_reused_from_their_folder_and_share_round_and_map(study, lines3):
    fresh = make_study(study.root)
    a, b = fresh.model("add", 0), fresh.model("none", 0)
    assert all((p == q).all() for p, q in zip(a.autoencoder.state_dict().values(), b.autoencoder.state_dict().values()))
    assert b.history["autoencoder"]["shared"] and not (fresh.models / "add-seed0" / "checkpoints").exists()
    again, found = ex.trained_model(fresh.train, "louvain", fresh.models / "add-seed0", steps=4, seed=0, scorer=True, device="cpu", head="mse", fusion="add",
                                    **fresh.options)
    assert found
    _, found = ex.trained_model(fresh.train, "louvain", fresh.models / "add-seed0", steps=5, seed=0, scorer=False, device="cpu", head="mse", fusion="add",
                                progress=False, **fresh.options)
    assert not found


def test_a_training_that_was_cut_off_goes_on_only_if_it_is_the_same(study, tmp_path, monkeypatch):
    """Other numbers of steps begin anew; what a killed process left goes; the provenance is there before the model is."""
    asked, calls, fit = {"seed": 0, "scorer": False, "device": "cpu", "head": "mse", "progress": False, **study.options}, [], training.diffusion_loss

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("gone")
        return fit(*args, **kwargs)

    monkeypatch.setattr(training, "diffusion_loss", interrupted)
    with pytest.raises(RuntimeError, match="gone"):
        ex.trained_model(study.train, "louvain", tmp_path / "m", steps=4, **asked)
    assert (tmp_path / "m" / "checkpoints" / "autoencoder.safetensors").exists()
    (tmp_path / "m" / "checkpoints" / ".tmpAbCdEf").touch()
    model, found = ex.trained_model(study.train, "louvain", tmp_path / "m", steps=5, **asked)
    assert not found and model.history["autoencoder"]["steps"] == model.history["denoiser"]["steps"] == 5
    fresh, _ = ex.trained_model(study.train, "louvain", tmp_path / "fresh", steps=5, **asked)
    assert all(torch.equal(a, b) for a, b in zip(model.denoiser.state_dict().values(), fresh.denoiser.state_dict().values()))
    assert not (tmp_path / "m" / "checkpoints").exists()
    (tmp_path / "m" / "checkpoints").mkdir()
    (tmp_path / "m" / "checkpoints" / "denoiser.safetensors").touch()      # killed while it cleared up
    assert ex.trained_model(study.train, "louvain", tmp_path / "m", steps=5, **asked)[1] and not (tmp_path / "m" / "checkpoints").exists()

    def full(self, folder):
        assert (folder / "provenance.json").exists()
        raise OSError("no space left on device")

    monkeypatch.setattr(ex.SCLD, "save", full)
    with pytest.raises(OSError, match="no space"):
        ex.trained_model(study.train, "louvain", tmp_path / "full", steps=5, **asked)


def test_post_guidance_keeps_the_best_of_the_pool_pre_guidance_was_drawn_from(study, lines3):
    model = study.model("add", 0)
    pool = model.sample(ex.n_to_generate(study.n, 0.8), omega=-1, keep=1, seed=0, sampling_steps=3, progress=False)
    direct = model.sample(study.n, omega=-1, seed=0, sampling_steps=3, progress=False)
    kept = pool[ex.keep_top(pool.obs["score"].to_numpy(), keep=0.8)]
    assert kept.n_obs == study.n and (kept.X != direct.X).nnz == 0


def test_table3_stands_beside_the_paper(lines3):
    table = ex.paper_beside(lines3, ex.METHODS, ex.PAPER_TABLE3, "pbmc68k_reduced")
    assert list(table.index) == [title for method, title in ex.METHODS.items() if method in ROWS]
    assert table.loc["SCLD ‡", "paper pbmc68k AUC"] == "0.59" and table.loc["SCLD ‡", "paper brain_small MMD"] == "0.72"
    assert (table["verdict"] == "not comparable: other cells").all() and table.loc["Random", "paper pbmc68k MMD"] == "-"
    assert " ± " in table.loc["SCLD", "AUC counts20k"] and (table["seeds"] == 2).all()
    own = ex.paper_beside(lines3, ex.METHODS, ex.PAPER_TABLE3, "brain_small")
    assert "paper pbmc68k AUC" not in own and own.loc["SCLD ‡", "verdict AUC"] == "not comparable: 8 of 40,000 steps"
    assert own.loc["SC-GAN", "verdict MMD"] == "not comparable: 2 of 1,000,000 steps" and own.loc["SC-GAN", "note"] == "2 of 1,000,000 steps"
    assert own.loc["Map(Round(test cell))", "verdict AUC"] == "no figure in the paper"


@pytest.mark.parametrize("ours, sd, paper, expected", [
    (0.60, 0.0, 0.59, "reproduced within tolerance"), (0.66, 0.03, 0.59, "reproduced within tolerance"), (0.70, 0.01, 0.59, "worse"),
    (0.52, 0.01, 0.59, "better"), (0.5, np.nan, None, "no figure in the paper"), (0.6, np.nan, 0.605, "reproduced within tolerance")])
def test_verdicts(ours, sd, paper, expected):
    assert ex.verdict(ours, sd, paper) == expected


def test_verdicts_say_why_there_is_nothing_to_compare():
    assert ex.verdict(0.9, 0.1, 129.52, metric="MMD") == "not comparable: the kernel allows at most 2.45"
    assert ex.verdict(0.9, 0.1, 0.9, metric="MMD", cut="5 of 10 steps") == "not comparable: 5 of 10 steps"
    assert ex.verdict(np.nan, np.nan, 0.9, failed="needs labels") == "not run: needs labels"
    assert ex.verdict(0.9, 0.01, 0.9, failed="one seed of three ran out of memory") == "reproduced within tolerance"


@pytest.mark.parametrize(("ours", "paper", "expected"), [(0.30, 0.51, "worse"), (0.05, 0.64, "worse"), (0.45, 0.64, "better"), (0.36, 0.64, "as far from 0.5")])
def test_an_area_is_best_at_a_half(ours, paper, expected):
    assert ex.verdict(ours, 0.0, paper) == expected


def test_results_of_other_autoencoder_steps_are_others(tmp_path):
    short, long = (ex.Study(root=tmp_path, ae_steps=n, device="cpu", progress=False) for n in (500, 3000))
    assert all(short.settings(m) != long.settings(m) for m in ex.COUNTED)


def test_the_scorer_stands_behind_every_corner_of_the_ablation(lines3):
    table = ex.ablation(lines3)
    assert list(table.index) == [("without", "without"), ("without", "with"), ("with", "without"), ("with", "with")]
    assert table["AUC log1p"].str.contains(" ± ").all() and (ex.ablation(lines3[lines3["method"] == "scld"]) == "–").sum().sum() == 12


def test_the_scorers_rows_are_the_best_of_a_pool_the_plain_rows_come_from(study, lines3):
    drawn = study.draws("scgan", 1)
    pool, about = drawn[drawn.obs["requested"] == ""], json.loads(drawn.uns["competitor"])
    assert pool.n_obs == ex.n_to_generate(study.n, 0.8) and about["history"]["steps"] == 2
    kept = ex.remaining(drawn, study.n, post=True)
    assert kept.n_obs == study.n and kept.obs["score"].min() >= np.sort(pool.obs["score"])[pool.n_obs - study.n]
    record = json.loads((study.results / "table3" / "scgan+scorer-seed1.json").read_text())
    assert record["cost"]["kept_share"] == 0.8 and record["cost"]["scorer"]["n_real"] == study.train.n_obs
    assert record["settings"]["baselines"] == 2 and record["cost"]["cut"] == "2 of 1,000,000 steps"


def test_a_competitor_that_cannot_run_is_marked_and_tried_again(tmp_path, monkeypatch):
    study = make_study(tmp_path)

    def refuse(*args, **options):
        raise InputError("class 'x' has one cell")

    monkeypatch.setattr(st, "compete", refuse)
    lines = ex.table3(study, methods=["positive", "scgan"])
    failed = lines[lines["method"] == "scgan"]
    assert failed["value"].isna().all() and set(failed["failed"]) == {"class 'x' has one cell"}
    table = ex.paper_beside(lines, ex.METHODS, ex.PAPER_TABLE3, "brain_small")
    assert table.loc["SC-GAN", "verdict AUC"] == "not run: class 'x' has one cell" and table.loc["SC-GAN", "AUC log1p"] == "–"
    assert table.loc["SC-GAN", "seeds"] == 0 and ex.draw_table3(lines, study.name)
    assert study.stored("table3", "scgan", 0) is None and study.stored("table3", "positive", 0)
    with pytest.raises(InputError, match="one cell"):
        study.run("demo", "scgan", 0, refuse)


def test_table5_judges_cells_of_one_cluster_beside_its_control(study):
    assert study.clusters() == {"1": ("1", 24), "2": ("2", 23), "3": ("3", 14)} and "cscgan" in ex.TABLE5_METHODS
    lines = ex.table5(study, methods=["cscgan", "cscgan+scorer", "scld_pre", "scld_both"])
    assert set(lines["cluster"]) == {"1", "2", "3"} and set(lines["n"]) == {24, 23, 14}
    assert lines["control"].between(0, 1).all() and lines["value"].between(0, 1).all()
    assert lines.groupby(["seed", "space", "cluster"])["control"].nunique().eq(1).all()
    table = ex.table5_beside(lines, "pbmc68k")
    assert list(table.index) == ["Positive (real against real)", "cscGAN", "cscGAN + Scorer", "SCLD †", "SCLD ‡", "test cells (n)"]
    assert table.loc["SCLD ‡", "paper 3"] == "0.70" and table.loc["SCLD ‡", "verdict"].startswith("1: not comparable: 8 of 40,000 steps; 2: ")
    assert table.loc["test cells (n)", "cluster 2 log1p"] == "23"
    assert ex.table5_beside(lines, "pbmc68k_reduced").loc["cscGAN", "verdict"] == "not comparable: other cells"


def test_table5_without_clusters_is_refused(tmp_path):
    study = make_study(tmp_path, n_max=20)
    assert study.clusters() == {}
    with pytest.raises(InputError, match="none of the clusters 1, 2, 3 and 6 has 10 test cells"):
        ex.table5(study)


def test_figure4_extrapolates_by_seconds_per_step(study, lines3):
    lines = ex.figure4(study, methods=["scld", "scgan"])
    one = lines[(lines["method"] == "scgan") & (lines["seed"] == 0)].iloc[0]
    assert one["hours_published"] == pytest.approx(one["value"] / one["steps"] * 1_000_000 / 3600) and one["steps"] == 2
    scld = lines[(lines["method"] == "scld") & (lines["seed"] == 0)].iloc[0]
    stages = study.model("add", 0).history
    by_hand = sum(stages[k]["seconds"] / stages[k]["steps"] * 20_000 / 3600 for k in ("autoencoder", "denoiser"))
    assert scld["hours_published"] == pytest.approx(by_hand) and scld["steps_published"] == 40_000
    table = ex.figure4_table(lines, "brain_small")
    assert list(table.index) == ["SCLD", "SC-GAN"] and "the paper prints no hours" in table.loc["SCLD", "verdict"]
    assert list(ex.figure4_table(lines, study.name)["verdict"]) == ["not comparable: other cells", ""]
    assert [p.get_hatch() for p in ex.draw_figure4(lines).axes[0].patches] == ["///", "///"]


def test_the_count_head_takes_more_steps_for_many_cells(tmp_path, monkeypatch):
    planted_cells(120).write_h5ad(tmp_path / "own.h5ad")
    steps = {n: ex.Study(str(tmp_path / "own.h5ad"), labels="cell_type", root=tmp_path, steps=n).budget.count_steps for n in (None, 50)}
    assert steps == {None: 6000, 50: 50}
    monkeypatch.setattr(st, "count_denoiser_steps", lambda n_cells: 6000 + n_cells)
    study = ex.Study(str(tmp_path / "own.h5ad"), labels="cell_type", root=tmp_path)
    assert study.budget.count_steps == 6000 + study.train.n_obs == study.settings("scld_counts")["count_steps"]
    assert ex.Study(str(tmp_path / "own.h5ad"), labels="cell_type", root=tmp_path, steps=6010).budget.count_steps == 6010
    assert ex.Study(root=tmp_path).budget.count_steps == 1500                      # the embedded set has its own budget


def test_budgets_are_read_and_kept_apart(tmp_path):
    assert [ex.read_budget(b) for b in ("", None, 0, "7", 7, "paper", " equal ")] == [None, None, None, 7, 7, "paper", "equal"]
    with pytest.raises(InputError, match="unknown budget 'long'; known: equal, paper, or a number of training steps"):
        make_study(tmp_path, budget="long")
    with pytest.raises(InputError, match="budget_s must be a positive number of seconds, got -1"):
        make_study(tmp_path, budget_s=-1)
    clock = make_study(tmp_path, budget_s=0.4, steps=None)
    assert clock.budget.steps == 20_000 and clock.tag == "-0.4s" and "0.4 s of training each" in repr(clock)
    assert clock.path("table3", "scld", 0).parent.name == "table3-0.4s" and clock.settings("scgan")["budget_s"] == 0.4
    model = clock.model("add", 0)
    assert all(0 < model.history[k]["steps"] < 20_000 for k in ("autoencoder", "denoiser"))
    assert make_study(tmp_path, budget_s=0.4, steps=None).model("add", 0).history["denoiser"]["steps"] == model.history["denoiser"]["steps"]
    assert make_study(tmp_path, budget="paper").tag == "-paper"


def test_equal_means_as_long_as_scld(study, tmp_path, monkeypatch):
    asked = {}
    monkeypatch.setattr(st, "compete", lambda name, *args, **options: asked.update({name: options}))
    other = make_study(tmp_path, budget="equal")
    other._models = study._models
    for name in ("scgan", "sugar"):
        other.draws(name, 0)
    seconds = sum(study.model("add", 0).history[k]["seconds"] for k in ("autoencoder", "denoiser"))
    assert asked["scgan"]["budget_s"] == round(seconds, 1) and "budget_s" not in asked["sugar"] and "steps" not in asked["scgan"]


def test_table4_has_one_denoiser_per_fusion(study):
    lines = ex.table4(study)
    assert set(lines["method"]) == {"add", "cat", "attn"}
    table = ex.paper_beside(lines, ex.FUSION_NAMES, ex.PAPER_TABLE4, study.name)
    assert list(table.index) == ["Add", "Cat", "Atten"] and table.loc["Atten", "paper pbmc68k AUC"] == "0.68"


def test_figure5_counts_and_panels(study):
    lines, panels = ex.figure5(study)
    assert panels["cluster"] == "4" and panels["counts"] == [136, 113, 91, 68, 45]
    assert [len(c) for c in panels["tsne"]] == [136, *panels["counts"]]
    assert panels["target_real"].sum() == (study.test.obs["louvain"] == "4").sum()
    assert list(lines.groupby("omega").size()) == [2] * 5 and lines["value"].between(0, 1).all()
    assert lines["accuracy_on_test"].min() > 0.7
    with pytest.raises(InputError, match="unknown cluster 'x'; known: 0"):
        ex.figure5(study, cluster="x")


def test_results_can_be_redrawn_without_training(study, lines3):
    found = ex.read_results(study.root, study.name, "table3")
    key = ["method", "seed", "space", "metric", "cluster"]
    pd.testing.assert_frame_equal(found.sort_values(key).reset_index(drop=True)[key + ["value"]],
                                  lines3.sort_values(key).reset_index(drop=True)[key + ["value"]])
    path = study.save_figure("table3", ex.draw_table3(found, study.name))
    assert path.read_bytes().startswith(b"\x89PNG") and path in study.written
    study.save_table("table3", ex.summarise(found, ex.METHODS))
    assert (study.results / "table3.csv").read_text().startswith(",AUC counts20k")
    with pytest.raises(InputError, match="no results of 'table9'"):
        ex.read_results(study.root, study.name, "table9")


def test_the_same_n_is_a_rule(study):
    few = RandomBaseline().fit(study.train).sample(10)
    with pytest.raises(InputError, match="the same n is a rule"):
        study.judge(few, 0, "random")


def test_wrong_names_are_said_before_data_are_read(tmp_path):
    with pytest.raises(InputError, match="unknown setting 'fusoin'; known: transform"):
        ex.Study("no-such-set", fusoin="add", root=tmp_path)
    with pytest.raises(InputError, match="seeds must be different"):
        ex.Study(seeds=(1, 1), root=tmp_path)
    with pytest.raises(InputError, match="unknown method 'gan'; known: positive"):
        ex.table3(make_study(tmp_path), methods=["gan"])


def test_parameters_are_validated():
    known = ["dataset", "seed"]
    ex.check_parameters({"dataset": "x", "seed": 1, "_private": 2, "os": sys, "In": []}, known)
    with pytest.raises(InputError, match="unknown parameter datset, sed; known: dataset, seed"):
        ex.check_parameters({"dataset": "x", "sed": 1, "datset": "y"}, known)
    assert ex.choose("tables", "2, 4", ["2", "3", "4"]) == ["2", "4"] and ex.choose("tables", 3, ["2", "3"]) == ["3"]
    assert ex.choose("tables", "", ["2", "3"]) == ["2", "3"]
    assert ex.choose("tables", "none", ["2", "3"], none=True) == []
    with pytest.raises(InputError, match="unknown value 'none' in methods; known: a, b$"):
        ex.choose("methods", "none", ["a", "b"])
    with pytest.raises(InputError, match="unknown value 'none' in tables; known: 2, 3, or none$"):
        ex.choose("tables", "2,none", ["2", "3"], none=True)
    with pytest.raises(InputError, match="unknown value '9' in tables; known: 2, 3"):
        ex.choose("tables", "2,9", ["2", "3"])


def test_root_and_text_files(tmp_path):
    assert ex.project_root(ROOT / "nbs") == ROOT
    assert ex.project_root(tmp_path) == tmp_path.resolve()
    path = ex.write_json(tmp_path / "a" / "b.json", {"x": np.float64(0.5), "y": np.arange(2)})
    assert json.loads(path.read_text()) == {"x": 0.5, "y": [0, 1]}
    with pytest.raises(TypeError, match="cannot write object"):
        ex.write_json(path, {"x": object()})
    assert json.loads(path.read_text())["x"] == 0.5 and [p.name for p in path.parent.iterdir()] == ["b.json"]
    outside = ex.provenance(root=tmp_path)
    assert outside["commit"] is None and outside["dirty"] is None


def test_the_front_door_refuses_what_it_does_not_know(tmp_path):
    done = subprocess.run([sys.executable, "-m", "papermill", "nbs/reproduce.ipynb", str(tmp_path / "out.ipynb"), "-p", "datset", "x"], cwd=ROOT,
                          stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 1 and "unknown parameter datset; known: dataset, labels, layer, seed" in done.stderr.replace("\n", "")


@pytest.mark.parametrize("parameter, message", [
    ({"datset": "x"}, "unknown parameter datset; known: dataset, labels, layer, seed"),
    ({"dataset": "brain"}, "unknown dataset 'brain'; known: pbmc68k_reduced, pbmc68k, brain_small"),
    ({"tables": "7"}, "unknown value '7' in tables; known: 2, 3, 4, 5"),
    ({"methods": "scld,gan"}, "unknown value 'gan' in methods; known: positive, random"),
    ({"plugins": "no_such_module"}, "plugins: the module 'no_such_module' cannot be imported .ModuleNotFoundError"),
    ({"budget": "long"}, "unknown budget 'long'; known: equal, paper, or a number of training steps")])
def test_the_first_cells_of_the_front_door_refuse_it_before_any_work(parameter, message, monkeypatch):
    """The cells up to the one that reads the data, with the parameters in the place where papermill puts them."""
    monkeypatch.delenv("IN_TEST", raising=False)
    names = {}
    with pytest.raises(InputError, match=message):
        for cell in nbformat.read(ROOT / "nbs" / "reproduce.ipynb", 4).cells:
            if cell.cell_type == "code":
                exec(cell.source, names)
                names |= parameter if "parameters" in cell.metadata.get("tags", []) else {}
                assert "lines3" not in names


def test_random_baseline_repeats_the_pool_and_checks_its_input(study):
    base = RandomBaseline(seed=3).fit(study.train, "louvain")
    many = base.sample(study.train.n_obs + 7)
    assert many.n_obs == study.train.n_obs + 7 and list(many.var_names) == list(study.train.var_names)
    assert np.allclose(np.asarray(many.X.sum(1)).ravel(), 20_000, rtol=1e-4)
    assert (base.sample(20).X != RandomBaseline(seed=3).fit(study.train).sample(20).X).nnz == 0
    with pytest.raises(InputError, match="n must be a whole number of at least 1"):
        base.sample(0)
    with pytest.raises(InputError, match="unknown label 'x'; known: none, fit with labels_key"):
        RandomBaseline().fit(study.train).sample(3, label="x")


def test_a_class_of_one_cell_or_too_little_memory_marks_the_row_and_the_table_goes_on(tmp_path, monkeypatch):
    from conftest import planted_cells

    from scld_nb.baselines import base

    cells = planted_cells(200, 40)
    types = cells.obs["cell_type"].astype(str).to_numpy(copy=True)
    types[7] = "rare"
    cells.obs["cell_type"] = pd.Categorical(types)
    cells.write_h5ad(tmp_path / "mine.h5ad")
    study = ex.Study(tmp_path / "mine.h5ad", labels="cell_type", seeds=(0,), root=tmp_path, **{k: v for k, v in TINY.items() if v is not None})
    assert (study.train.obs["cell_type"] == "rare").sum() == 1
    lines = ex.table3(study, methods=["random", "cscgan", "splatter_matched"])
    table = ex.paper_beside(lines, ex.METHODS, ex.PAPER_TABLE3, study.name)
    assert "'rare'" in table.loc["cscGAN", "note"] and "\n" not in table.loc["cscGAN", "note"] and table.loc["cscGAN", "AUC log1p"] == "–"
    assert table.loc["Random", "AUC log1p"] != "–" and table.loc["Splatter, own gene means", "AUC log1p"] != "–"
    monkeypatch.setattr(base, "free_memory", lambda: 1000)
    note = ex.table3(study, methods=["scgan"])["failed"].iloc[0]
    assert "GiB of memory" in note and ex.table3(study, methods=["random"])["failed"].eq("").all()


def test_table5_says_which_cluster_is_missing_and_why(study, tmp_path, monkeypatch):
    def few(drawn, n, *, label="", post=False, keep=0.8):
        if label == "2":
            raise InputError("ACTINN gave label 2 to 0 of 10000 prior draws")
        return drawn[drawn.obs["requested"] == label][:n].copy()

    monkeypatch.setattr(ex, "remaining", few)
    other = make_study(tmp_path)
    other._models, other.drawn = study._models, study.drawn
    table = ex.table5_beside(ex.table5(other, methods=["cscgan", "scld_pre"]), study.name)
    assert table.loc["cscGAN", "cluster 2 log1p"] == "–" and table.loc["cscGAN", "cluster 1 log1p"] != "–"
    assert table.loc["cscGAN", "note"] == "2 of 1,000,000 steps; cluster 2: ACTINN gave label 2 to 0 of 10000 prior draws"
    assert table.loc["SCLD †", "note"] == "8 of 40,000 steps"


def test_a_result_is_reused_only_for_the_same_question(tmp_path):
    file, made = tmp_path / "deep" / "seed0.json", []

    def make() -> dict:
        made.append(1)
        return {"value": len(made)}

    asked = {"widths": (256, 128), "steps": np.int64(3)}
    assert [ex.reuse_json(file, asked, make)["value"] for _ in range(2)] == [1, 1]
    assert ex.reuse_json(file, asked | {"steps": 4}, make)["value"] == 2
    assert [p.name for p in file.parent.iterdir()] == ["seed0.json"]
